"""Reports of kept experts that other programs write."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from eaft_prune.core.types import UserError
from eaft_prune.records.kept_experts import read_kept


@pytest.fixture
def kept() -> dict[int, tuple[int, ...]]:
    """Layers that do not begin at 0, as where the first has no experts."""
    rng = np.random.default_rng(0)
    return {layer: tuple(sorted(rng.choice(8, 4, replace=False).tolist())) for layer in (1, 2, 10)}


def test_llm_compressors_report(tmp_path: Path, kept: dict[int, tuple[int, ...]]) -> None:
    """`_retained_experts` of its REAPPruningModifier: modules' names and ids in any order."""
    path = tmp_path / "report.json"
    listed = {f"model.layers.{layer}.mlp": list(ids)[::-1] for layer, ids in kept.items()}
    path.write_text(json.dumps(listed))
    assert read_kept(path, "reap", 4) == kept


def test_our_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"digest": "x", "n_experts": 8, "kept": [[0, 1], [2, 7]]}))
    assert read_kept(path, "reap", 4) == {0: (0, 1), 1: (2, 7)}


def test_reaps_observations(tmp_path: Path, kept: dict[int, tuple[int, ...]]) -> None:
    """Its state is a mapping of metrics a layer; keep_n is ours to say, ties go to the lower id."""
    import torch

    path = tmp_path / "observations.pt"
    scores = {
        layer: torch.tensor([float(i in ids) for i in range(8)]) for layer, ids in kept.items()
    }
    torch.save({layer: {"reap": of, "expert_frequency": -of} for layer, of in scores.items()}, path)
    assert read_kept(path, "reap", 4) == kept
    dropped = {layer: tuple(i for i in range(8) if i not in ids) for layer, ids in kept.items()}
    assert read_kept(path, "expert_frequency", 4) == dropped
    assert {ids[:4] for ids in read_kept(path, "reap", 8).values()} == {(0, 1, 2, 3)}
    with pytest.raises(UserError, match=r"ean_sum.*expert_frequency, reap"):
        read_kept(path, "ean_sum", 4)
    with pytest.raises(UserError, match="keep_n = 9"):
        read_kept(path, "reap", 9)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    import torch

    path, ran = tmp_path / "observations.pt", tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (eval, (f"open({str(ran)!r}, 'w').close()",))

    torch.save({0: {"reap": Evil()}}, path)
    with pytest.raises(UserError, match="more than tensors"):
        read_kept(path, "reap", 4)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "lists no kept experts"),
        ("{}", "lists no kept experts"),
        ("{", "not JSON"),
        ('{"mlp": [1]}', "numbered layer"),
        ('{"layers.0.a": [1], "layers.0.b": [2]}', "numbered layer"),
        ('{"layers.0.mlp": [1, 1]}', "one twice"),
        ('{"layers.0.mlp": []}', "no expert"),
        ('{"layers.0.mlp": [true]}', "no list"),
        ('{"layers.0.mlp": [-1]}', "no list"),
        ('{"layers.0.mlp": "01"}', "no list"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        read_kept(path, "reap", 4)
