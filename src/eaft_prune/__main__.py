"""python -m eaft_prune"""

import sys


def run() -> None:
    """The console entry point."""
    from eaft_prune.cli import main

    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
