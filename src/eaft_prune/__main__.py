"""python -m eaft_prune"""

import gc
import sys


def run() -> None:
    """The console entry point."""
    # imports make a million objects and no garbage: collecting meanwhile is a fifth of the start
    gc.set_threshold(50_000, 20, 50)
    try:
        from eaft_prune.cli.main import main

        code = main(sys.argv[1:])
    except KeyboardInterrupt:  # before there was anything to record
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    run()
