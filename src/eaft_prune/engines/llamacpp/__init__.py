"""Evaluation by llama.cpp: GGUF by its own converter, logits by its C API in another process."""
