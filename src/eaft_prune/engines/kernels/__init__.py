"""Triton kernels: what surrounds the matmuls on CUDA. Imported only where there is a GPU."""
