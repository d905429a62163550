"""Rows of text: where they come from, what an assistant wrote of them, and their tokens."""
