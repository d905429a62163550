"""Compensation: the stage against numpy on explicit features, the checkpoint against the stage."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from safetensors import safe_open
from support import tiny
from support.runs import World

from eaft_prune.checkpoints import formats
from eaft_prune.checkpoints.families.gpt_oss import FAMILY
from eaft_prune.checkpoints.formats.base import Storage
from eaft_prune.checkpoints.read import TensorEntry, open_model
from eaft_prune.config import CompensationSettings
from eaft_prune.core.types import Blocks, KeepPlan, UserError
from eaft_prune.engines.transformers import TransformersEngine
from eaft_prune.repair import memory
from eaft_prune.repair.compensate import Compensation, LayerResult, compensate
from eaft_prune.repair.layer import How, Level
from eaft_prune.stages.export import Target, export

pytest_plugins = ("support.worlds",)

CPU = torch.device("cpu")
PLAN = KeepPlan(((0, 2, 3, 7), (1, 2, 4, 5)), 8)
RIDGE = 0.3
ATOL = 6e-3  # of weights near 0.15: conjugate gradients end before the last digit
F32 = formats.FLOATS["F32"]
FLOAT, MXFP4 = Storage(F32, F32), Storage(formats.MXFP4, F32)


def made(
    engine: TransformersEngine, blocks: Blocks, level: Level, storage: Storage, **settings: Any
) -> Compensation:
    given = CompensationSettings(**{"ridge": RIDGE, "passes": 1, **settings})
    return compensate(engine, PLAN, blocks, How(level, given, storage), lambda tokens: None)


def tensor(done: Compensation, layer: int, part: str, dtype: str) -> np.ndarray:
    start = 0
    for where, name, shape, nbytes in done.tensors:
        if (where, name) == (layer, part):
            return done.data[start : start + nbytes].view(dtype).reshape(shape)
        start += nbytes
    raise AssertionError(f"layer {layer} has no {part}")


@pytest.fixture(scope="module")
def blocks(make_blocks: Callable[..., Blocks]) -> Blocks:
    return make_blocks(40, 64, share=0.6)


def weights(target: np.ndarray, robust: bool) -> np.ndarray:
    """1, or less for tokens whose streams are further apart than is usual."""
    squares = (target**2).sum(1)
    return 1 / (1 + squares / squares.mean()) if robust else np.ones(len(target))


def held_out(blocks: Blocks) -> np.ndarray:
    """Of every scored token whether its row is of the tenth that nothing is fitted to."""
    row_T = blocks.row_BS[blocks.scored_BS]
    rows = np.random.default_rng(0).permutation(np.unique(row_T))
    return np.isin(row_T, rows[: max(1, round(len(rows) / 10))])


@torch.no_grad()
def by_numpy(path: Path, blocks: Blocks, robust: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """down_proj and bias of kept experts by transformers' eager model, one token at a time."""
    base, pruned = tiny.eager_model(path), tiny.eager_model(path)
    for layer, kept in enumerate(PLAN.kept):
        bias = pruned.model.layers[layer].mlp.router.bias
        bias[[e for e in range(8) if e not in kept]] = -torch.inf
    ids = torch.from_numpy(blocks.ids_BS).long()
    block, position = np.nonzero(blocks.scored_BS)
    at = block, position - 1  # predictors
    fitted = ~held_out(blocks)
    out = []
    for layer, kept in enumerate(PLAN.kept):
        after: dict[str, torch.Tensor] = {}
        handles = [
            model.model.layers[layer].register_forward_hook(
                lambda m, i, o, name=name, after=after: after.update({name: o})
            )
            for name, model in (("base", base), ("pruned", pruned))
        ]
        mlp = pruned.model.layers[layer].mlp
        handles.append(
            mlp.register_forward_pre_hook(lambda m, i, after=after: after.update({"x": i[0]}))
        )
        base.model(ids, use_cache=False)
        pruned.model(ids, use_cache=False)
        for handle in handles:
            handle.remove()
        target = (after["base"][at] - after["pruned"][at]).double().numpy()
        roots = np.sqrt(weights(target, robust)) * fitted
        target *= roots[:, None]
        experts, inner = mlp.experts, mlp.experts.intermediate_size
        features = np.zeros((len(block), len(kept), inner + 1))
        x = after["x"][at]
        _, gates, chosen = mlp.router(x)
        for t in range(len(block)):
            for gate, expert in zip(gates[t].tolist(), chosen[t].tolist(), strict=True):
                up = x[t] @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
                h = np.append(experts._apply_gate(up).numpy(), 1.0)
                features[t, kept.index(expert)] = gate * h
        f = features.reshape(len(block), -1) * roots[:, None]
        below = np.sqrt(RIDGE * (f**2).sum(0).mean()) * np.eye(f.shape[1])
        stacked = np.vstack([f, below]), np.vstack([target, np.zeros((f.shape[1], 64))])
        x_kih = np.linalg.lstsq(*stacked, rcond=None)[0].reshape(len(kept), inner + 1, -1)
        experts.down_proj[list(kept)] += torch.from_numpy(x_kih[:, :-1]).float()
        experts.down_proj_bias[list(kept)] += torch.from_numpy(x_kih[:, -1]).float()
        ids_kept = list(kept)
        out.append((experts.down_proj[ids_kept].numpy(), experts.down_proj_bias[ids_kept].numpy()))
    return out


@pytest.mark.parametrize("tokens", ["robust", "uniform"])
def test_layer_after_layer_is_numpys_least_squares_on_transformers_own_streams(
    checkpoint: Path, engine: TransformersEngine, blocks: Blocks, tokens: str
) -> None:
    done = made(engine, blocks, "down_proj", FLOAT, token_weights=tokens)
    for layer, (weight, bias) in enumerate(by_numpy(checkpoint, blocks, tokens == "robust")):
        np.testing.assert_allclose(tensor(done, layer, "down_proj", "<f4"), weight, atol=ATOL)
        np.testing.assert_allclose(tensor(done, layer, "down_proj_bias", "<f4"), bias, atol=ATOL)


@pytest.mark.parametrize("level", ["down_proj", "experts"])
@pytest.mark.parametrize("rounding", ["feedback", "nearest"])
def test_the_residual_never_grows_and_runs_agree_to_the_bit(
    engine: TransformersEngine, blocks: Blocks, rounding: str, level: Level
) -> None:
    first = made(engine, blocks, level, MXFP4, rounding=rounding, ridge="auto")
    again = made(engine, blocks, level, MXFP4, rounding=rounding, ridge="auto")
    assert first.data.tobytes() == again.data.tobytes()
    assert replace(first, data=again.data) == again
    assert all(0 < solved <= 1 for solved in first.solved)
    assert all(0 < stored <= 1 for stored in first.stored)


def test_feedback_keeps_more_of_the_gain_than_plain_rounding(
    engine: TransformersEngine, blocks: Blocks
) -> None:
    fed = made(engine, blocks, "down_proj", MXFP4, rounding="feedback")
    plain = made(engine, blocks, "down_proj", MXFP4, rounding="nearest")
    assert fed.stored[0] < plain.stored[0]
    assert fed.solved[0] == plain.solved[0]  # the same problem


def test_each_level_gains_more_and_leaves_the_model_as_it_was(
    engine: TransformersEngine, blocks: Blocks
) -> None:
    before = {name: value.clone() for name, value in engine.model.state_dict().items()}
    bias = made(engine, blocks, "bias", MXFP4)
    whole = made(engine, blocks, "down_proj", FLOAT)
    both = made(engine, blocks, "experts", FLOAT)
    assert {name for _, name, _, _ in bias.tensors} == {"down_proj_bias"}
    names = {f"{stem}_proj{end}" for stem in ("down", "gate_up") for end in ("", "_bias")}
    assert {name for _, name, _, _ in both.tensors} == names
    assert both.solved[0] < whole.solved[0] < bias.solved[0] < 1
    assert both.held_out[0] < whole.held_out[0]
    after = engine.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def tensors_of(path: Path) -> dict[str, tuple[str, bytes]]:
    out = {}
    for shard in sorted(path.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                value = file.get_tensor(name)
                data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                out[name] = f"{value.dtype} {tuple(value.shape)}", data
    return out


def test_a_compensated_checkpoint_is_what_its_manifest_says(world: World) -> None:
    settings = ("compensation.num_blocks=24", "compensation.ridge=1")
    plain = world.run("task=prune", *settings).result
    done = world.run("pruning.compensation=down_proj", *settings)
    result = done.result
    report = next(done.cwd.rglob("report.md")).read_text().replace("\\", "")
    assert "with compensation=down_proj" in report
    run = MlflowClient(tracking_uri=world.uri).get_run(result["mlflow_run_id"])
    assert run.data.tags["checkpoint.pruned.compensation"] == "down_proj"
    assert run.data.metrics["telemetry/seconds/compensate"] > 0
    assert plain["plan"] == result["plan"]
    path, other = Path(result["checkpoint"]["path"]), Path(plain["checkpoint"]["path"])
    assert path != other
    ours, theirs = tensors_of(path), tensors_of(other)
    changed = {name for name in ours if ours[name] != theirs[name]}
    assert all(ours[name][0] == theirs[name][0] for name in ours)
    manifest = json.loads((path / "manifest.json").read_text())
    assert changed == set(manifest["changed_tensors"])
    stems = {name.split(".mlp.experts.")[1] for name in changed}
    assert stems == {"down_proj_blocks", "down_proj_scales", "down_proj_bias"}
    assert manifest["compensation"]["level"] == "down_proj"
    card = (path / "README.md").read_text()
    assert "`changed_tensors`: kept experts were refitted on" in card
    assert f"{manifest['compensation']['scored_tokens']:,} tokens of UNION by least squares" in card
    assert "changed_tensors" not in json.loads((other / "manifest.json").read_text())
    facts = world.run("task=verify", f"verify.path={path}", "verify.load=false").result["facts"]
    assert (facts["findings"], facts["changed_tensors"]) == ([], len(changed))
    assert facts["compensation"] == "down_proj"
    # its recipe makes the same bytes, all from the store
    again = world.run("task=prune", f"recipe={path / 'reap-recipe.yaml'}").result
    assert again["checkpoint"] == result["checkpoint"]
    assert all(stage["cached"] for stage in again["stages"])


def test_layers_of_unequal_size_are_filled_up_with_experts_as_they_were(world: World) -> None:
    ragged = ("pruning.selection=effective_number", "pruning.min_keep_n=2", "pruning.keep_n=4")
    settings = (*ragged, "pruning.keep_multiple=1", "pruning.core_pos_top_m=0")
    settings += ("export.pad_ragged=true", "compensation.num_blocks=24")
    plain = world.run("task=prune", *settings).result
    done = world.run("task=prune", "pruning.compensation=experts", *settings).result
    path, other = (Path(run["checkpoint"]["path"]) for run in (done, plain))
    manifest = json.loads((path / "manifest.json").read_text())
    kept = manifest["plan"]["kept"]
    assert len({len(ids) for ids in kept}) > 1
    ours, theirs = tensors_of(path), tensors_of(other)
    changed = {name for name in ours if ours[name] != theirs[name]}
    assert changed == set(manifest["changed_tensors"])
    stems = {name.split(".mlp.experts.")[1] for name in changed}
    ends = ("blocks", "scales", "bias")
    assert stems == {f"{name}_proj_{end}" for name in ("gate_up", "down") for end in ends}
    models = tiny.eager_model(path), tiny.eager_model(other)
    for layer, (ids, padding) in enumerate(zip(kept, manifest["padding"], strict=True)):
        layout = sorted([*ids, *padding])
        ours_experts, theirs_experts = (m.model.layers[layer].mlp.experts for m in models)
        for name, value in ours_experts.named_parameters():
            same = (value == dict(theirs_experts.named_parameters())[name]).flatten(1).all(1)
            assert same[[layout.index(expert) for expert in padding]].all()
            assert not same[[layout.index(expert) for expert in ids]].all()
    facts = world.run("task=verify", f"verify.path={path}", "verify.load=false").result["facts"]
    assert (facts["findings"], facts["changed_tensors"]) == ([], len(changed))


def test_where_nothing_is_dropped_nothing_is_changed(
    world: World, engine: TransformersEngine, blocks: Blocks
) -> None:
    whole = KeepPlan((tuple(range(8)),) * 2, 8)
    how = How("down_proj", CompensationSettings(ridge=RIDGE), MXFP4)
    done = compensate(engine, whole, blocks, how, lambda tokens: None)
    assert (done.tensors, done.data.size) == ((), 0)
    result = world.run("task=prune", "pruning.compensation=down_proj", "pruning.keep_n=8").result
    path = Path(result["checkpoint"]["path"])
    assert tensors_of(path) == tensors_of(world.model)
    assert "compensation" not in json.loads((path / "manifest.json").read_text())


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("eval.candidates=[masked]", "eval.candidates=[pruned]"),
        ("task=search", "task=search scores plans masked"),
        ("task=noop", "has no effect with task=noop"),
        ("engine.experts=kernels", "engine.experts=auto"),
    ],
)
def test_what_cannot_be_compensated_is_refused(world: World, setting: str, named: str) -> None:
    refusal = world.run("pruning.compensation=bias", setting, "export.pad_ragged=true").refused()
    assert "pruning.compensation = 'bias'" in refusal
    assert named in refusal


def test_a_layer_that_held_out_rows_do_not_gain_from_is_left_as_it_is(
    engine: TransformersEngine, make_blocks: Callable[..., Blocks]
) -> None:
    """Two dozen tokens a layer for 132 unknowns an output: what is learnt is noise."""
    few = make_blocks(1, 48, share=0.6)
    done = made(engine, few, "down_proj", FLOAT, ridge=1e-4)
    helped = [residual < 1 for residual in done.held_out]
    assert not all(helped)
    assert sorted({layer for layer, *_ in done.tensors}) == list(np.flatnonzero(helped))
    assert all((stored < 1) == helps for stored, helps in zip(done.stored, helped, strict=True))


@pytest.mark.parametrize("level", ["down_proj", "experts"])
def test_packed_experts_are_compensated_as_others_are(
    checkpoint: Path, load: Callable[..., TransformersEngine], blocks: Blocks, level: Level
) -> None:
    dense, packed = load(checkpoint), load(checkpoint, memory_gb=1e-4)
    one, other = (made(engine, blocks, level, MXFP4) for engine in (dense, packed))
    assert one.data.tobytes() == other.data.tobytes()
    assert one == replace(other, data=one.data)


def exported(checkpoint: Path, target: Path, done: Compensation, layers: tuple[int, ...]) -> Path:
    """A checkpoint of the plan with the changes of some layers."""
    source = target.with_suffix(".bytes")
    source.write_bytes(done.data.tobytes())
    files, entries, start = open_model(checkpoint), {}, 0
    for layer, part, shape, nbytes in done.tensors:
        name = f"model.layers.{layer}.mlp.experts.{part}"
        if layer in layers:
            dtype = files.tensors[name].dtype
            entries[name] = TensorEntry(name, str(source), dtype, shape, start, nbytes)
        start += nbytes
    how = {"base": {"label": "tiny", "digest": "0"}}
    export(FAMILY, files, PLAN, Target(target, "k", 10**9, how, changed=entries), lambda n: None)
    return target


@torch.no_grad()
def layer_outputs(path: Path, blocks: Blocks, layer: int) -> torch.Tensor:
    """The stream after a layer at predictors, by transformers' own eager forward."""
    after: list[torch.Tensor] = []
    model = tiny.eager_model(path)
    model.model.layers[layer].register_forward_hook(lambda m, i, o: after.append(o))
    model.model(torch.from_numpy(blocks.ids_BS).long(), use_cache=False)
    block, position = np.nonzero(blocks.scored_BS)
    return after[0][block, position - 1].double()


@pytest.mark.parametrize("level", ["down_proj", "experts"])
def test_transformers_finds_the_written_checkpoint_nearer_to_the_base(
    level: Level,
    checkpoint: Path,
    tmp_path: Path,
    load: Callable[..., TransformersEngine],
    blocks: Blocks,
    make_blocks: Callable[..., Blocks],
) -> None:
    """On calibration tokens by what was reported; on tokens of other blocks as well."""
    done = made(load(checkpoint), blocks, level, MXFP4)
    paths = [
        checkpoint,
        exported(checkpoint, tmp_path / "first", done, (0,)),
        exported(checkpoint, tmp_path / "both", done, (0, 1)),
        exported(checkpoint, tmp_path / "none", done, ()),
    ]

    def distances(tokens: Blocks, chosen: np.ndarray) -> list[float]:
        base, *others = (layer_outputs(path, tokens, layer=1).numpy() for path in paths)
        apart = (weights(base - others[0], robust=True) * chosen)[:, None]
        return [float((apart * (base - other) ** 2).sum()) for other in others]

    held = held_out(blocks)
    for chosen, reported in ((~held, done.stored), (held, done.held_out)):
        first, both, _ = distances(blocks, chosen)
        assert both / first == pytest.approx(reported[1], rel=1e-3)
    others = make_blocks(6, 64, seed=1)
    _, both, none = distances(others, np.ones(others.scored_tokens))
    assert both < 0.9 * none


@torch.no_grad()
def divergence(path: Path, base: Path, blocks: Blocks, chosen: np.ndarray) -> float:
    """Mean KL(base || other) at the predictors of chosen tokens, by transformers' own forward."""
    block, position = np.nonzero(blocks.scored_BS)
    at = block[chosen], position[chosen] - 1
    ids = torch.from_numpy(blocks.ids_BS).long()
    own, other = (
        torch.log_softmax(tiny.eager_model(one)(ids, use_cache=False).logits[at].double(), -1)
        for one in (base, path)
    )
    return float((own.exp() * (own - other)).sum(1).mean())


def test_passes_go_on_until_held_out_rows_lose(
    checkpoint: Path, tmp_path: Path, engine: TransformersEngine, blocks: Blocks
) -> None:
    done = made(engine, blocks, "experts", MXFP4, passes=8)
    last = exported(checkpoint, tmp_path / "last", done, (0, 1))
    found = divergence(last, checkpoint, blocks, held_out(blocks))
    assert done.distances[done.passes - 1] == pytest.approx(found, rel=1e-3)
    assert done.distances[1] < done.distances[0]  # the second gained
    for number in range(1, len(done.distances)):
        near = done.distances[number] <= 1.01 * min(done.distances[:number])
        assert near == (number < done.passes)
    assert len(done.distances) == min(8, done.passes + 1)
    once = made(engine, blocks, "experts", MXFP4, passes=1)
    assert once.distances == done.distances[:1]


class Killed(Exception):
    """Stands for kill -9."""


def test_a_run_that_dies_in_a_layer_loses_that_layer(
    engine: TransformersEngine, blocks: Blocks
) -> None:
    kept: dict[str, LayerResult] = {}
    tried: list[str] = []

    def keep(name: str, compute: Callable[[], LayerResult]) -> LayerResult:
        if name not in kept:
            tried.append(name)
            if tried == ["0/0", "0/1", "1/0", "1/1"]:
                raise Killed
            kept[name] = compute()
        return kept[name]

    settings = CompensationSettings(ridge=RIDGE, passes=2)
    how = How("experts", settings, MXFP4)
    with pytest.raises(Killed):
        compensate(engine, PLAN, blocks, how, lambda tokens: None, keep)
    done = compensate(engine, PLAN, blocks, how, lambda tokens: None, keep)
    assert tried == ["0/0", "0/1", "1/0", "1/1", "1/1"]
    whole = compensate(engine, PLAN, blocks, how, lambda tokens: None)
    assert done.data.tobytes() == whole.data.tobytes()
    assert replace(done, data=whole.data) == whole


def test_streams_and_features_lie_where_there_is_room(
    engine: TransformersEngine, blocks: Blocks
) -> None:
    sizes = memory.sizes_of(engine, PLAN, blocks)
    need = memory.fixed(sizes, "experts")
    assert memory.place(torch.device("cuda"), sizes, "experts", need, 2**60) == CPU
    assert memory.place(torch.device("cuda"), sizes, "experts", 2**60, 0) == torch.device("cuda")
    with pytest.raises(UserError, match="lower compensation"):
        memory.place(torch.device("cuda"), sizes, "experts", need - 1, 2**60)
    with pytest.raises(UserError, match="GB are free"):
        memory.place(CPU, sizes, "experts", need, need)
