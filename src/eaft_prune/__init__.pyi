from eaft_prune.api import (
    Result as Result,
    Results as Results,
    RunFailed as RunFailed,
    UserError as UserError,
    load_result as load_result,
    load_results as load_results,
    run as run,
)

__version__: str
