"""Evaluation by an SGLang server over HTTP, given or launched."""
