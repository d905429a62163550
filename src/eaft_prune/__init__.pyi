from eaft_prune.api import (
    Result,
    Results,
    RunFailed,
    UserError,
    load_result,
    load_results,
    run,
)

__version__: str
__all__ = ["Result", "Results", "RunFailed", "UserError", "load_result", "load_results", "run"]
