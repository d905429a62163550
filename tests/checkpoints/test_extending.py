"""A format of docs/examples works like ours, once it is listed."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support import tiny
from support.runs import REPOSITORY

from eaft_prune.checkpoints import formats
from eaft_prune.checkpoints.families import gpt_oss
from eaft_prune.checkpoints.families.table import checked, stored
from eaft_prune.checkpoints.read import file_hashes, open_model, tensor_bytes
from eaft_prune.core.types import KeepPlan, UserError
from eaft_prune.stages.export import Target, export

pytest_plugins = ("support.worlds",)

PLAN = KeepPlan(((0, 2, 3, 7), (1, 2, 4, 5)), 8)
HOW = {"base": {"label": "tiny", "digest": "0"}}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(REPOSITORY / "docs" / "examples"))

    def of(name: str) -> ModuleType:
        return importlib.import_module(name)

    return of


def nothing(done: int) -> None:
    pass


def int8_checkpoint(path: Path, form: Any) -> Path:
    """tiny's gpt-oss with float experts, their projections stored as the format has them."""
    tiny.write_checkpoint(path, shards=1)
    shard = next(path.glob("*.safetensors"))
    weights = load_file(shard)
    for name in [name for name in weights if name.endswith("_blocks")]:
        stem = name.removesuffix("_blocks")
        parts = tuple(torch.from_numpy(weights.pop(n)) for n in formats.MXFP4.names(stem))
        dense = formats.MXFP4.decode(parts)
        weights |= {n: t.numpy() for n, t in form.encoded(stem, dense).items()}
    save_file(weights, shard, metadata={"format": "pt"})
    index = path / "model.safetensors.index.json"
    if index.exists():
        index.unlink()
        shard.rename(path / "model.safetensors")
    return path


def family_with(form: Any) -> Any:
    """gpt-oss whose projections are stored so."""

    def table(model: Any) -> Any:
        config = model.config
        count = gpt_oss.FAMILY.n_experts(config)
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        table = {
            name: spec
            for name, spec in gpt_oss.tensor_table(config).items()
            if not name.endswith(("_blocks", "_scales"))
        }
        for layer in range(gpt_oss.FAMILY.n_layers(config)):
            experts = f"model.layers.{layer}.mlp.experts."
            gate_up, down = (count, 2 * inner, hidden), (count, hidden, inner)
            table |= stored(f"{experts}gate_up_proj", form, gate_up, layer)
            table |= stored(f"{experts}down_proj", form, down, layer)
        return checked("gpt_oss", table, model)

    return replace(gpt_oss.FAMILY, table=table)


def test_a_format_of_the_users_is_read_sliced_and_checked(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = example("format").INT8
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, form))
    base = open_model(int8_checkpoint(tmp_path / "base", form))
    family = family_with(form)
    family.table(base)
    stem = "model.layers.1.mlp.experts.down_proj"
    found = formats.format_of(stem, base.tensors)
    assert found is form
    assert formats.weights_of(f"{stem}_q_scale", "F32") == 0

    out = export(family, base, PLAN, Target(tmp_path / "out", "k", 10**9, HOW), nothing).path
    kept = open_model(out)
    for name in form.names(stem):
        rows = b"".join(part for i in PLAN.kept[1] for part in tensor_bytes(base, name, i))
        assert b"".join(tensor_bytes(kept, name)) == rows

    weights = load_file(out / kept.tensors[f"{stem}_q"].file)
    values, scale = weights[f"{stem}_q"].astype(np.float64), weights[f"{stem}_q_scale"]
    exact = (values * scale.astype(np.float64)).transpose(0, 2, 1)
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    np.testing.assert_allclose(form.decoded(stem, tensors).numpy(), exact, rtol=1e-6)
    again = form.encode(form.decoded(stem, tensors))
    assert torch.equal(again[0], tensors[f"{stem}_q"])  # what it can hold it holds


def test_nan_in_a_scale_of_the_users_format_is_found(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = example("format").INT8
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, form))
    path = int8_checkpoint(tmp_path / "base", form)
    shard = path / "model.safetensors"
    weights = load_file(shard)
    name = "model.layers.0.mlp.experts.gate_up_proj_q_scale"
    weights[name] = weights[name].copy()
    weights[name][3, 5] = np.nan
    save_file(weights, shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} holds NaN"):
        file_hashes(open_model(path), nothing)
