"""hydra/sweeper=eaft_checked: Hydra's own, of points that were composed and checked before."""

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore


class CheckedSweeper(BasicSweeper):
    """Composes no point only to see whether it composes: the command line has done that."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Every point is legal."""


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="eaft_checked",
    node={
        "_target_": f"{__name__}.{CheckedSweeper.__name__}",
        "max_batch_size": None,
        "params": None,
    },
    provider="eaft_sweeper",
)
