"""What is known of devices without torch agrees with what torch says."""

from __future__ import annotations

import pytest
import torch

from eaft_prune.config import RuntimeSettings
from eaft_prune.engines.loading import resolve_dtype
from eaft_prune.engines.registry import dtype_of
from eaft_prune.engines.world import built_for_gpus


def test_a_torch_with_gpus_was_built_for_them() -> None:
    assert built_for_gpus() == (torch.version.cuda is not None or torch.version.hip is not None)


@pytest.mark.parametrize("device", ["auto", "cpu"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_precision_is_what_loading_takes(device: str, dtype: str) -> None:
    places = {"store_dir": "unused", "checkpoint_dir": "unused"}
    runtime = RuntimeSettings.model_validate({"device": device, "dtype": dtype, **places})
    assert dtype_of(runtime) == resolve_dtype(runtime)
