"""python -m eaft_prune"""

import gc
import sys


def run() -> None:
    """The console entry point."""
    # imports make a million objects and no garbage: collecting meanwhile is a fifth of the start
    gc.set_threshold(50_000, 20, 50)
    from eaft_prune.cli.main import main

    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
