"""Checkpoints on disk: read, sliced, padded; one file a family, one a format. Runs no model."""
