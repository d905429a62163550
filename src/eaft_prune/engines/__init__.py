"""Who runs a model: every engine by its name (registry.py) behind the Protocols of base.py."""
