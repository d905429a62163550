"""qwen3_moe and mixtral in depth: layouts, sliced routers, exports, verification."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.engines import evaluate_masked
from support.runs import QUICK, World, write_pack

from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.read import file_hashes, model_digest, open_model
from eaft_prune.checks.io_probe import io_probe
from eaft_prune.checks.verify import check_base, check_files, smoke_load
from eaft_prune.core.types import Blocks, KeepPlan, UserError
from eaft_prune.records.manifest import read_manifest
from eaft_prune.stages.export import Target, export

if TYPE_CHECKING:
    from eaft_prune.engines.transformers import TransformersEngine

Load = Callable[..., "TransformersEngine"]
Make = Callable[..., Blocks]

CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", False, {"norm_topk_prob": True}),
    "qwen3_moe-not-normalised": ("qwen3_moe", False, {"norm_topk_prob": False}),
    "qwen3_moe-fused": ("qwen3_moe", True, {"norm_topk_prob": False, "num_experts_per_tok": 3}),
    "mixtral": ("mixtral", False, {"sliding_window": 16}),
    "mixtral-fused": ("mixtral", True, {"head_dim": None}),
}
PLAN = KeepPlan(((0, 2, 3, 7), (1, 2, 4, 5)), 8)
HOW = {"base": {"label": "tiny", "digest": "0"}}


def nothing(done: int) -> None:
    pass


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("moe")
    return {
        case: tiny.write_moe(home / case, model_type, fused, seed, **changes)
        for seed, (case, (model_type, fused, changes)) in enumerate(CASES.items())
    }


@pytest.fixture(scope="module", params=CASES)
def base(request: pytest.FixtureRequest, paths: dict[str, Path]) -> Path:
    return paths[request.param]


@pytest.fixture(scope="module")
def engine(base: Path, load: Load) -> TransformersEngine:
    return load(base)


def run(source: Path, plan: KeepPlan, target: Path, **how: Any) -> Path:
    files = open_model(source)
    origin = {"label": "tiny", "digest": model_digest(file_hashes(files, nothing))}
    family = family_of(files.config)
    return export(
        family, files, plan, Target(target, "k", 10**9, {"base": origin}, **how), nothing
    ).path


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}


def opened(path: Path) -> None:
    files = open_model(path)
    family_of(files.config).table(files)


def test_the_table_is_what_transformers_writes(base: Path) -> None:
    files = open_model(base)
    family = family_of(files.config)
    table = family.table(files)
    assert {name: spec.shape for name, spec in table.items()} == {
        name: entry.shape for name, entry in files.tensors.items()
    }
    assert (family.n_layers(files.config), family.n_experts(files.config)) == (2, 8)


@pytest.mark.parametrize("case", ["qwen3_moe", "mixtral-fused"])
def test_tensors_that_do_not_fit_are_named(
    paths: dict[str, Path], tmp_path: Path, case: str
) -> None:
    weights = weights_of(paths[case])
    single = "model.layers.1.mlp.experts.7.up_proj.weight"
    name = single if case == "qwen3_moe" else "model.layers.1.mlp.experts.down_proj"
    ghost = "model.layers.0.mlp.experts.8.up_proj.weight"
    for number, (changed, said) in enumerate((
        ({**weights, ghost: torch.zeros(32, 64)}, rf"no rule.*{ghost}"),
        ({key: value for key, value in weights.items() if key != name}, rf"missing.*{name}"),
        ({**weights, name: weights[name][:-1].clone()}, rf"{name} has shape"),
    )):  # fmt: skip
        path = tmp_path / str(number)
        path.mkdir()
        shutil.copy(paths[case] / "config.json", path)
        save_file(changed, path / "model.safetensors")
        with pytest.raises(UserError, match=said):
            opened(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mlp_only_layers": [1]}, r"missing: model\.layers\.1\.mlp\.down_proj"),
        ({"num_local_experts": 4}, "num_experts = 8, num_local_experts = 4"),
        ({"num_experts": None}, "num_experts"),
        ({"moe_intermediate_size": 0}, r"experts.*config.json asks for \[8, 64, 0\]"),
    ],
)
def test_configs_that_no_table_fits_are_refused(
    paths: dict[str, Path], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    path = shutil.copytree(paths["qwen3_moe"], tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=said):
        opened(path)


def test_scores_and_trace_are_those_of_the_eager_model(
    base: Path, engine: TransformersEngine, make_blocks: Make
) -> None:
    """Ids and gates as the eager experts get them; norms of a float64 loop over the definition."""
    model = tiny.eager_model(base).requires_grad_(False)
    blocks = make_blocks(2, 33)
    trace = engine.trace(blocks, nothing)
    calls: list[tuple[Any, ...]] = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((module, *args, *kwargs.values())),
            with_kwargs=True,
        )
    logits = [model(torch.from_numpy(row[None]).long()).logits[0] for row in blocks.ids_BS]
    scored = np.argwhere(blocks.scored_BS)
    assert len(trace) == len(scored) > 10
    for index, (b, t) in enumerate(scored):
        logp = torch.log_softmax(logits[b][t - 1].double(), 0)[int(blocks.ids_BS[b, t])]
        assert trace.scores.logp_T[index] == pytest.approx(float(logp), abs=2e-5, rel=5e-6)
        for layer in range(2):
            module, hidden, ids, gates = calls[2 * b + layer]
            assert trace.experts_TLK[index, layer].tolist() == ids[t - 1].tolist()
            np.testing.assert_allclose(trace.weights_TLK[index, layer], gates[t - 1], atol=2e-5)
            for k, expert in enumerate(ids[t - 1].tolist()):
                gate, up = (module.gate_up_proj[expert].double() @ hidden[t - 1].double()).chunk(2)
                inner = gate / (1 + torch.exp(-gate)) * up
                norm = float((module.down_proj[expert].double() @ inner).norm())
                assert trace.norms_TLK[index, layer, k] == pytest.approx(norm, rel=2e-4)


@pytest.mark.parametrize("keep", [3, 5])
def test_masked_is_exported(
    base: Path, engine: TransformersEngine, load: Load, make_blocks: Make, tmp_path: Path, keep: int
) -> None:
    """Whatever the gates are normalised over, and transformers finds every tensor it wants."""
    from transformers import AutoModelForCausalLM

    rng = np.random.default_rng(keep)
    kept = [tuple(sorted(rng.permutation(8)[:keep].tolist())) for _ in range(2)]
    plan, blocks = KeepPlan(tuple(kept), 8), make_blocks(3, 40, seed=keep)
    before = engine.score(blocks, nothing)
    masked = evaluate_masked(engine, blocks, plan, nothing)
    out = run(base, plan, tmp_path / "out")
    written = load(out).score(blocks, nothing)
    assert np.abs(before.logp_T - masked.logp_T).max() > 1e-2
    np.testing.assert_allclose(masked.logp_T, written.logp_T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(masked.entropy_T, written.entropy_T, rtol=1e-5, atol=1e-6)
    assert np.array_equal(before.logp_T, engine.score(blocks, nothing).logp_T)
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        logits = tiny.eager_model(out)(torch.from_numpy(blocks.ids_BS).long()).logits.double()
    logp = torch.log_softmax(logits, -1).numpy()
    eager = [logp[b, t - 1, blocks.ids_BS[b, t]] for b, t in np.argwhere(blocks.scored_BS)]
    np.testing.assert_allclose(masked.logp_T, eager, atol=2e-5, rtol=2e-5)


def test_masks_nest_and_are_undone_when_the_body_raises(
    engine: TransformersEngine, make_blocks: Make
) -> None:
    blocks = make_blocks(2, 20)
    outer, inner = (
        KeepPlan(((0, 1, 2, 3), (3, 4, 5, 6)), 8),
        KeepPlan(((1, 2, 3), (4, 5, 6)), 8),
    )
    plain, alone = engine.score(blocks, nothing), evaluate_masked(engine, blocks, inner, nothing)

    def body() -> None:
        with engine.masked(outer):
            between = engine.score(blocks, nothing).logp_T
            nested = evaluate_masked(engine, blocks, inner, nothing)
            assert np.array_equal(nested.logp_T, alone.logp_T)
            assert np.array_equal(engine.score(blocks, nothing).logp_T, between)
            raise RuntimeError("body")

    with pytest.raises(RuntimeError, match="body"):
        body()
    assert np.array_equal(engine.score(blocks, nothing).logp_T, plain.logp_T)
    with pytest.raises(UserError, match="layers"), engine.masked(KeepPlan(((0, 1),) * 3, 8)):
        pass
    everything = KeepPlan((tuple(range(8)),) * 2, 8)
    kept_all = evaluate_masked(engine, blocks, everything, nothing)
    assert np.array_equal(kept_all.logp_T, plain.logp_T)


def test_an_export_has_the_bytes_names_and_layout_of_the_base(base: Path, tmp_path: Path) -> None:
    source, written = weights_of(base), weights_of(run(base, PLAN, tmp_path / "out"))
    expected = {}
    for name, tensor in source.items():
        if ".mlp." not in name and ".block_sparse_moe." not in name:
            expected[name] = tensor
            continue
        parts = name.split(".")
        kept = PLAN.kept[int(parts[2])]
        if parts[5].isdigit():  # model.layers.L.block.experts.E.projection.weight
            if int(parts[5]) in kept:
                parts[5] = str(kept.index(int(parts[5])))
                expected[".".join(parts)] = tensor
        else:
            expected[name] = tensor[list(kept)]
    assert set(written) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor), name
    before, after = (
        json.loads((path / "config.json").read_text()) for path in (base, tmp_path / "out")
    )
    counts = {"num_experts": 4, "num_local_experts": 4}
    assert after == {**before, **{key: n for key, n in counts.items() if key in before}}
    opened(tmp_path / "out")


def test_a_flipped_byte_is_named_with_its_expert(base: Path, tmp_path: Path) -> None:
    out = run(base, PLAN, tmp_path / "out")
    files = open_model(base)
    family, hashes = family_of(files.config), file_hashes(files, nothing)

    def found() -> list[Any]:
        manifest = read_manifest(out)
        listed = check_files(manifest, nothing)
        return [*listed, *check_base(family, manifest, files, hashes, nothing)]

    assert found() == []
    assert smoke_load(family, out) == []
    entries = open_model(out).tensors
    singles = [name for name in entries if ".experts.3." in name and ".layers.1." in name]
    name = singles[0] if singles else "model.layers.1.mlp.experts.down_proj"
    entry = entries[name]
    with (out / entry.file).open("r+b") as file:
        file.seek(entry.start + entry.nbytes - 1)
        byte = file.read(1)[0]
        file.seek(entry.start + entry.nbytes - 1)
        file.write(bytes([byte ^ 1]))
    by_file, by_tensor = found()
    assert (by_file.file, by_tensor.tensor) == (entry.file, name)
    assert (by_tensor.expert, by_tensor.base_expert) == (3, 5)


def test_a_ragged_plan_cannot_be_exported(base: Path, tmp_path: Path) -> None:
    ragged = KeepPlan(((1, 4, 6), (0, 2, 3, 5, 7)), 8)
    with pytest.raises(UserError, match=r"candidates=\[masked\]$"):
        run(base, ragged, tmp_path / "out")
    with pytest.raises(UserError, match="have no bias"):
        run(base, ragged, tmp_path / "out", pad_ragged=True)
    assert not [item for item in tmp_path.iterdir() if item.name != ".out.lock"]


def test_the_io_probe_writes_what_an_export_would(base: Path, tmp_path: Path) -> None:
    files = open_model(base)
    facts = io_probe(family_of(files.config), files, 4, 1, tmp_path, 10**9, nothing)
    first = KeepPlan(((0, 1, 2, 3),) * 2, 8)
    written = weights_of(run(base, first, tmp_path / "out"))
    here = {name: tensor for name, tensor in written.items() if ".layers.1." in name}
    assert facts["bytes_written"] == sum(tensor.nbytes for tensor in here.values())
    assert facts["model_bytes_written"] == sum(tensor.nbytes for tensor in written.values())
    whole = {name: tensor for name, tensor in weights_of(base).items() if ".layers.1." in name}
    assert facts["layer_bytes"] == sum(tensor.nbytes for tensor in whole.values())


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Packs without a word of harmony; the model is each test's own."""
    home = tmp_path_factory.mktemp("plain")
    rng = np.random.default_rng(0)
    packs = {
        name: write_pack(
            home / f"{name}.parquet",
            [" ".join([name, str(row), *rng.choice(tiny.WORDS, 12)]) for row in range(60)],
        )
        for name in ("alpha", "beta")
    }
    settings = (*QUICK, "packs.format=plain", "eval.candidates=[masked,pruned]")
    return World(home, home, packs, f"sqlite:///{home}/mlruns/mlflow.db", settings)


@pytest.mark.process
@pytest.mark.parametrize("case", ["qwen3_moe-not-normalised", "mixtral"])
def test_the_pipeline_runs_on_plain_text(paths: dict[str, Path], plain: World, case: str) -> None:
    world = replace(plain, model=paths[case])
    done = world.run()
    assert done.code == 0, done.out + done.err
    masked, pruned = (done.result["reports"][m]["UNION"]["64"] for m in ("masked", "pruned"))
    assert masked["ppl"] == pytest.approx(pruned["ppl"], rel=1e-5)
    assert masked["scored_tokens"] > 0.9 * 6 * 64  # all but EOS and first positions
    done = world.run("task=verify", f"verify.path={done.result['checkpoint']['path']}")
    assert done.code == 0, done.out + done.err
    assert done.result["facts"]["findings"] == []


@pytest.mark.process
def test_padding_a_router_without_a_bias_is_refused_before_profiling(
    paths: dict[str, Path], plain: World
) -> None:
    done = replace(plain, model=paths["mixtral"]).run(
        "task=prune", "pruning.selection=effective_number", "export.pad_ragged=true"
    )
    assert "routers of mixtral have no bias" in done.failed()
    assert not [s for s in done.result["stages"] if s["stage"] == "profile"]
