"""The command line: Hydra composes, everything is checked, then jobs run."""
