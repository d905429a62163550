"""Exit codes of the command line."""

OK, CRASHED, MISUSED, NOT_PROVEN, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143
