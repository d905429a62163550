"""Prune experts out of Mixture-of-Experts language models and prove that nothing was lost."""

__version__ = "0.1.0"
