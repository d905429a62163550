"""Stub: sglang.utils imports HTML and display for notebooks."""
