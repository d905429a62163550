"""Evaluation by a vLLM server over its OpenAI-compatible HTTP, given or launched."""
