"""The validated settings: one frozen `Experiment`, checked once before anything loads."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from eaft_prune.types import UNION, UserError

TaskName = Literal[
    "pipeline", "profile", "evaluate", "compare", "noise_floor", "noop", "expert_math", "search"
]
Saliency = Literal["one", "gate", "norm", "gate_norm", "random"]
Regions = Literal["strict", "policy"]
Candidate = Literal["pruned", "masked"]
Objective = Literal["dnll", "dppl", "dcc_rate", "dmean_prob", "js2d", "keep_n"]

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Limit = Annotated[float, Field(ge=0)]
SeqLen = Annotated[int, Field(ge=2)]
BlockCount = Positive | tuple[Positive, ...]


class Settings(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=()
    )


class ModelSettings(Settings):
    """Where the base checkpoint is: a directory, `demo:`, or a hub id with a revision."""

    name: str
    path: str | None = None
    hub_id: str | None = None
    revision: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ModelSettings:
        if (self.path is None) == (self.hub_id is None):
            raise ValueError("give exactly one of path (a directory) and hub_id")
        return self


class PacksSettings(Settings):
    """Named parquet files of harmony rows, in UNION order, and how rows are split."""

    name: str
    files: dict[str, str]
    revision: str | None = None  # of hub files
    text_column: str = "text"
    split: Literal["hash", "none"] = "hash"
    profile_fraction: Fraction = 0.5  # of rows, when split=hash

    @model_validator(mode="after")
    def _names(self) -> PacksSettings:
        if not self.files:
            raise ValueError("packs.files is missing: give 'packs.files={name: file.parquet}'")
        if UNION in self.files:
            raise ValueError(f"{UNION} is the interleave of all packs; name the file otherwise")
        return self


class ProfileSettings(Settings):
    """Which UNION blocks the base model is profiled on."""

    num_blocks: Positive
    seq_len: SeqLen
    seed: NonNegative | None


class PruningSettings(Settings):
    """How experts are scored and how many stay (DESIGN section 2: Score, Regions, Keep plan)."""

    name: str
    keep_n: Positive
    saliency: Saliency
    weight: Literal["uniform", "eaft"]
    reduce: Literal["sum", "mean"]
    regions: Regions = "strict"
    quantile: Fraction = 0.15
    high_quantile: Fraction = 0.85
    w_good: float = 1.0
    w_uncertain: float = 0.25
    w_conflict: float = -2.0
    keep_multiple: Positive = 4
    core_pos_top_m: NonNegative = 4
    core_count_top_m: NonNegative = 0
    seed: NonNegative = 0  # of saliency=random


class ExportSettings(Settings):
    """Where the pruned checkpoint is written and how large its shards may be."""

    path: str | None = None  # null: <runtime.checkpoint_dir>/<model>-keep<N>-<plan digest>
    max_shard_bytes: Positive = 5_000_000_000


class EvalSettings(Settings):
    """Which blocks base and candidate are evaluated on, and what CC and H mean."""

    name: str
    seq_lens: Annotated[tuple[SeqLen, ...], Field(min_length=1)]
    num_blocks: BlockCount | dict[str, BlockCount]  # per pack; key `default` for the rest
    packs: Annotated[tuple[str, ...], Field(min_length=1)] | None = None  # null: all and UNION
    seed: NonNegative | None
    candidates: Annotated[tuple[Candidate, ...], Field(min_length=1)] = ("pruned",)
    cc_quantile: Fraction = 0.15
    entropy_top_k: Annotated[int, Field(ge=2)] = 20

    @model_validator(mode="after")
    def _aligned(self) -> EvalSettings:
        counts = self.num_blocks
        named = counts if isinstance(counts, dict) else {"default": counts}
        for pack, count in named.items():
            if isinstance(count, tuple) and len(count) != len(self.seq_lens):
                raise ValueError(
                    f"num_blocks of {pack} lists {len(count)} counts for "
                    f"{len(self.seq_lens)} seq_lens {list(self.seq_lens)}"
                )
        for field in ("seq_lens", "packs", "candidates"):
            values = getattr(self, field)
            if values is not None and len(set(values)) != len(values):
                raise ValueError(f"{field} lists a value twice: {list(values)}")
        return self

    def blocks_of(self, pack: str, seq_len: int) -> int:
        """Number of blocks to evaluate of one pack at one sequence length."""
        counts = self.num_blocks
        if isinstance(counts, dict):
            if pack not in counts and "default" not in counts:
                raise UserError(f"eval.num_blocks = {counts} names neither {pack!r} nor `default`")
            counts = counts.get(pack, counts.get("default", 0))
        return counts if isinstance(counts, int) else counts[self.seq_lens.index(seq_len)]


class GateSettings(Settings):
    """The inequalities that decide near-lossless."""

    name: str
    pack: str = UNION
    seq_lens: Annotated[tuple[SeqLen, ...], Field(min_length=1)]
    max_dppl: Limit
    max_dppl_relative: Limit
    max_dcc_rate: Limit
    max_dmean_prob: Limit
    max_js2d: Limit
    on_fail: Literal["report", "error"] = "report"


class EngineSettings(Settings):
    name: Literal["transformers"]


class TrackingSettings(Settings):
    """Where MLflow keeps the runs."""

    uri: str
    experiment: str
    run_name: str | None = None
    parent_run_id: str | None = None
    tags: dict[str, str] = {}


class RuntimeSettings(Settings):
    """Where and how fast, never what: only dtype is part of a stage key."""

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    batch_tokens: Positive | None = None
    threads: Positive | None = None
    store_dir: str
    checkpoint_dir: str
    progress: bool = True


class CompareSettings(Settings):
    """Two saved evaluations for task=compare."""

    base: str
    candidate: str


class SweepSettings(Settings):
    """How a multirun goes about its points."""

    plan_only: bool = False  # print what each point would have to evaluate, and stop


class RangeSettings(Settings):
    """One searched setting: a range (`step` for a grid, `log` for a log scale) or a choice."""

    low: float | None = None
    high: float | None = None
    step: float | None = None
    log: bool = False
    choices: tuple[str | float | bool, ...] | None = None

    @model_validator(mode="after")
    def _either(self) -> RangeSettings:
        if (self.choices is None) == (self.low is None or self.high is None):
            raise ValueError("give either low and high, or choices")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low = {self.low} must be below high = {self.high}")
        return self


class SamplerSettings(Settings):
    """An Optuna sampler (or pruner) by class name, and its arguments."""

    name: str = "TPESampler"
    arguments: dict[str, Any] = {}


class SearchSettings(Settings):
    """Optuna over pruning settings, scored by masked evaluation on rows of the profiling part."""

    study: str | None = None  # null: a digest of everything the objective depends on
    storage: str
    n_trials: Positive  # finished trials wanted in total: a search that was stopped goes on
    workers: Positive = 1
    space: Annotated[dict[str, RangeSettings], Field(min_length=1)]
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = ("dnll",)
    seq_len: SeqLen
    num_blocks: Positive
    chunk_blocks: Positive  # a trial reports, and may be stopped, after each chunk
    seeds: Annotated[tuple[NonNegative, ...], Field(min_length=1)] = (0,)  # replicates in a trial
    stop_confidence: Annotated[float, Field(gt=0.5, lt=1)] | None = 0.95  # null: never stop early
    sampler: SamplerSettings = SamplerSettings()
    pruner: SamplerSettings | None = None  # one of Optuna's, beside stop_confidence

    @model_validator(mode="after")
    def _known_settings(self) -> SearchSettings:
        known = [f"pruning.{name}" for name in PruningSettings.model_fields if name != "name"]
        for name in self.space:
            if name not in known:
                raise ValueError(f"search.space names {name!r}; {_allowed(name, known)}")
        if "keep_n" in self.objectives and "pruning.keep_n" not in self.space:
            raise ValueError("objective keep_n needs pruning.keep_n in search.space")
        return self


class TaskSettings(Settings):
    name: TaskName


class Experiment(Settings):
    """Everything one run depends on."""

    task: TaskSettings
    model: ModelSettings
    packs: PacksSettings
    profile: ProfileSettings
    pruning: PruningSettings
    export: ExportSettings
    eval: EvalSettings
    gate: GateSettings
    engine: EngineSettings
    tracking: TrackingSettings
    runtime: RuntimeSettings
    compare: CompareSettings | None = None
    search: SearchSettings | None = None
    sweep: SweepSettings = SweepSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        if self.pruning.keep_n % self.pruning.keep_multiple:
            raise ValueError(
                f"pruning.keep_n = {self.pruning.keep_n} is not a multiple of "
                f"pruning.keep_multiple = {self.pruning.keep_multiple}"
            )
        known = [*self.packs.files, UNION]
        for pack in self.eval_packs:
            if pack not in known:
                raise ValueError(f"eval.packs names {pack!r}; {_allowed(pack, known)}")
        if isinstance(self.eval.num_blocks, dict):
            for pack in self.eval.num_blocks:
                if pack not in (*known, "default"):
                    raise ValueError(
                        f"eval.num_blocks names {pack!r}; {_allowed(pack, [*known, 'default'])}"
                    )
        if self.gate.pack not in self.eval_packs:
            raise ValueError(
                f"gate.pack = {self.gate.pack!r} is not evaluated; "
                f"{_allowed(self.gate.pack, self.eval_packs)}"
            )
        missing = [s for s in self.gate.seq_lens if s not in self.eval.seq_lens]
        if missing:
            raise ValueError(
                f"gate.seq_lens = {list(self.gate.seq_lens)} needs {missing}, but eval.seq_lens = "
                f"{list(self.eval.seq_lens)}"
            )
        if self.task.name == "compare" and self.compare is None:
            raise ValueError("task=compare needs compare.base=DIR and compare.candidate=DIR")
        if self.task.name == "search":
            if self.search is None:
                raise ValueError("task=search needs the search settings: select it as task=search")
            if self.packs.split == "none":
                raise ValueError(
                    "task=search with packs.split = 'none' leaves no rows that the search has not "
                    "seen to confirm its winner on: use packs.split=hash"
                )
        return self

    @property
    def eval_packs(self) -> tuple[str, ...]:
        """The packs to evaluate, UNION last unless eval.packs says otherwise."""
        return self.eval.packs or (*self.packs.files, UNION)


def parse_experiment(values: Mapping[str, Any]) -> Experiment:
    """Validate composed settings; raises UserError: a line per key, value and range."""
    try:
        return Experiment.model_validate(values)
    except ValidationError as error:
        found = error.errors()
        # what holds a bad item is not a second mistake
        inner = [e for e in found if not any(_within(other, e) for other in found)]
        lines = [_one_line(dict(item), values) for item in inner]
        raise UserError("\n".join(dict.fromkeys(lines))) from None


def setting_names(section: type[BaseModel] = Experiment, prefix: str = "") -> list[str]:
    """Dotted names of all settings, sections included."""
    names = []
    for name, field in section.model_fields.items():
        names.append(prefix + name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Settings):
                names += setting_names(kind, f"{prefix}{name}.")
    return names


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str | None:
    """The known name most like a mistyped one, or None."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return matches[0] if matches else None


def _allowed(name: str, known: list[str] | tuple[str, ...]) -> str:
    close = nearest(name, known)
    hint = f"did you mean {close!r}? " if close else ""
    return f"{hint}allowed: {', '.join(known)}"


def _within(inner: Mapping[str, Any], outer: Mapping[str, Any]) -> bool:
    """Whether `inner` lies deeper in what `outer` complains of."""
    depth = len(outer["loc"])
    return len(inner["loc"]) > depth and inner["loc"][:depth] == outer["loc"]


def _one_line(error: dict[str, Any], values: Mapping[str, Any]) -> str:
    # a union's branch name (`int`, `tuple[...]`) and `dict` keys end pydantic's location: keep only
    # what is a key or index of the settings themselves
    path: list[str] = []
    node: Any = values
    for part in error["loc"]:
        inside = part in node if isinstance(node, Mapping) else isinstance(node, list)
        if inside:
            node = node[part]
        elif error["type"] not in ("missing", "extra_forbidden"):
            continue
        path.append(str(part))
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        close = nearest(key, setting_names())
        return f"unknown setting {key}" + (f": did you mean {close}?" if close else "")
    if error["type"] == "missing":
        return f"{key} is missing: give {key}=VALUE"
    message = error["msg"].removeprefix("Value error, ")
    # a section's own validator names its keys itself
    own = isinstance(node, Mapping) and error["type"] == "value_error"
    return message if own or not key else f"{key} = {node!r}: {message}"


def resolve_path(path: str, base: Path | None = None) -> Path:
    """Absolute path of a user's path, `~` expanded, relative to `base` or the working directory."""
    return (base or Path.cwd()).joinpath(Path(path).expanduser()).resolve()
