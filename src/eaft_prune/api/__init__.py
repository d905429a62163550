"""The Python side: what the command line does, with results as typed values."""

from eaft_prune.api.run import RunFailed, run
from eaft_prune.core.types import UserError
from eaft_prune.records.results import Result, Results, load_result, load_results

__all__ = ["Result", "Results", "RunFailed", "UserError", "load_result", "load_results", "run"]
