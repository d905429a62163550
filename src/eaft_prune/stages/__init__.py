"""The stages: each a pure function of its settings and inputs; none imports another."""
