"""Tables of the experts of every token: with fewer experts each token still has as many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import architectures

from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.read import file_hashes, open_model
from eaft_prune.checkpoints.token_tables import remapped
from eaft_prune.checks.verify import check_base
from eaft_prune.core.types import KeepPlan, UserError
from eaft_prune.records.manifest import read_manifest
from eaft_prune.stages.export import Target, export

BASE = {"label": "tiny", "digest": "0" * 64}


def nothing(done: int) -> None:
    pass


def by_hand(row: list[int], kept: list[int]) -> list[int]:
    """One token's: the rule as docs/definitions.md has it."""
    places = [expert if expert in kept else None for expert in row]
    for place, expert in enumerate(row):
        if places[place] is None:
            after = [e for e in kept if e >= expert] + [e for e in kept if e < expert]
            places[place] = next(e for e in after if e not in places)
    return [kept.index(expert) for expert in places if expert is not None]


@given(st.data())
def test_dropped_experts_go_to_the_next_kept_one(data: st.DataObject) -> None:
    experts, top_k = data.draw(st.integers(3, 9)), data.draw(st.integers(1, 3))
    ids = st.permutations(range(experts))
    rows = [row[:top_k] for row in data.draw(st.lists(ids, min_size=1, max_size=20))]
    kept = sorted(data.draw(ids)[: data.draw(st.integers(top_k, experts))])
    new = remapped(np.array(rows, np.int32), kept)
    assert new.tolist() == [by_hand(row, kept) for row in rows]
    assert new.dtype == np.int32


def test_verify_expects_the_plans_table(tmp_path: Path) -> None:
    architectures.write(tmp_path / "base", "deepseek_v4")
    files = open_model(tmp_path / "base")
    family = family_of(files.config)
    plan = KeepPlan(((0, 1, 2, 3, 4, 7), (1, 2, 3, 4, 5, 6), (0, 2, 4, 5, 6, 7)), 8)
    target = Target(tmp_path / "out", "k", 10**9, {"base": BASE})
    out = export(family, files, plan, target, nothing).path
    hashes = file_hashes(files, nothing)
    assert check_base(family, read_manifest(out), files, hashes, nothing) == []
    (shard,) = out.glob("*.safetensors")
    weights = load_file(shard)
    name = "model.layers.1.ffn.gate.tid2eid"
    assert int(weights[name].max()) == 5
    weights[name][7] = weights[name][7].flip(0)
    save_file(weights, shard, metadata={"format": "pt"})
    (found,) = check_base(family, read_manifest(out), files, hashes, nothing)
    assert found.tensor == name
    with pytest.raises(UserError, match=r"eval.top_k = 1: .*in a table"):
        family.with_top_k(files.config, 1)
    weights = load_file(files.path / "model.safetensors")
    weights[name] = weights[name].to(torch.float32)
    save_file(weights, files.path / "model.safetensors", metadata={"format": "pt"})
    target = Target(tmp_path / "no", "k", 10**9, {"base": BASE})
    with pytest.raises(UserError, match="a table of experts is integers"):
        export(family, open_model(files.path), plan, target, nothing)
