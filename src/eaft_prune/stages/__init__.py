"""The arrow's stages: each gives its output for its settings and inputs; none imports another."""
