"""Blocks that cannot be had name the setting that asked for them."""

from __future__ import annotations

import pytest
from support.runs import World

pytest_plugins = ("support.worlds",)


@pytest.mark.parametrize(
    ("setting", "asked"),
    [
        ("profile.num_blocks", []),
        ("eval.num_blocks", ["eval.packs=[alpha]", "gate.pack=alpha"]),
        ("marginal.num_blocks", ["task=profile", "pruning=leave_one_out"]),
        ("compensation.num_blocks", ["pruning.compensation=bias"]),
        ("search.num_blocks", ["task=search", "search.n_trials=1"]),
    ],
)
def test_too_few_rows_name_the_setting_to_lower(
    world: World, setting: str, asked: list[str]
) -> None:
    error = world.run(*asked, f"{setting}=100000").failed()
    assert error.endswith(f"lower {setting}"), error
