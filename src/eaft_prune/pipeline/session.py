"""What every task works with: settings, store, watcher, and one resident model at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.families.base import Family, check_tensors
from eaft_prune.checkpoints.read import ModelFiles, file_hashes, model_digest, open_model
from eaft_prune.config import Experiment, RuntimeSettings
from eaft_prune.config.runtime import ExpertsMode
from eaft_prune.core.digests import digest, file_digest
from eaft_prune.core.progress import Bars
from eaft_prune.core.store import Store, Stored
from eaft_prune.core.types import Blocks, Checkpoint, StageRecord, UserError
from eaft_prune.engines.base import Engine
from eaft_prune.packs import sources
from eaft_prune.pipeline.observer import Observer
from eaft_prune.stages import pack as pack_stage

if TYPE_CHECKING:
    from eaft_prune.engines.transformers import TransformersEngine
    from eaft_prune.packs.tokenizer import TransformersTokenizer

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hashes:
    """sha256 of every file of a checkpoint."""

    files: Mapping[str, str]


@dataclass(frozen=True)
class Model:
    """A checkpoint that has been read, checked against its family's tensor table and hashed."""

    label: str
    files: ModelFiles
    family: Family
    digest: str
    tokenizer_digest: str

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.files.path, self.digest, self.label)


def with_top_k(model: Model, top_k: int) -> Model:
    """The model routing each token to `top_k` experts: another config.json, so another digest."""
    own = model.family.top_k(model.files.config)
    if top_k > own:
        raise UserError(
            f"eval.top_k = {top_k}: this model routes each token to {own} experts; give 1..{own}"
        )
    if top_k == own:
        return model
    config = {**model.files.config, "num_experts_per_tok": top_k}  # its name in every family
    return replace(
        model,
        files=replace(model.files, config=config),
        digest=digest({"model": model.digest, "top_k": top_k}),
    )


@dataclass
class Resident:
    """The one model in memory; asking for another lets go of it first, which frees it."""

    key: tuple[Any, ...] | None = None
    engine: Engine | None = None

    def get(self, key: tuple[Any, ...], load: Callable[[], Engine]) -> Engine:
        if self.engine is None or self.key != key:
            self.engine = None
            self.engine, self.key = load(), key
        return self.engine


@dataclass
class Bench:
    """One run's working place; knows paths, cache and watcher so that stages do not."""

    experiment: Experiment
    store: Store
    observer: Observer
    bars: Bars
    resident: Resident
    records: list[StageRecord] = field(default_factory=list)
    out: Path = Path()  # where servers leave their logs
    packs: dict[str, tuple[Path, str]] = field(default_factory=dict)  # of those read: path, sha256
    _texts: dict[str, Sequence[str]] = field(default_factory=dict)
    _tokenizer: TransformersTokenizer | None = None
    _blocks: dict[pack_stage.BlockRequest, Stored[Blocks]] = field(default_factory=dict)

    def stage(
        self,
        stage: str,
        version: int,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        kind: type[T],
        compute: Callable[[], T],
        facts: Callable[[T, float], Mapping[str, Any]] = lambda value, seconds: {},
    ) -> Stored[T]:
        """Run a stage through the store and tell the watcher."""
        stored = self.store.run(stage, version, settings, inputs, kind, compute, facts)
        self.record(stored.record)
        return stored

    def record(self, record: StageRecord) -> None:
        """Keep and announce that a stage ended."""
        self.records.append(record)
        how = "from the store" if record.cached else f"{record.seconds:.1f} s"
        level = logging.DEBUG if record.cached else logging.INFO
        log.log(level, "%-28s %-14s %s", record.stage, how, _in_words(record.facts))
        self.observer.stage(record)

    def open(self, path: Path, label: str) -> Model:
        """Read, check and hash a checkpoint; the hashes of unchanged files are not made twice."""
        files = open_model(path)
        family = family_of(files.config)
        check_tensors(family, files)
        names = ["config.json", *files.companions, *files.shards]
        stats = {name: (files.path / name).stat() for name in names}
        identity = {
            name: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in stats.items()
        }
        total = sum(stat.st_size for stat in stats.values())

        def compute() -> Hashes:
            with self.bars.bar(f"hash {label}", total, "B") as on_bytes:
                return Hashes(file_hashes(files, on_bytes))

        stored = self.stage(
            f"inspect/{label}",
            1,
            {"path": str(files.path), "files": identity},
            {},
            Hashes,
            compute,
            lambda value, seconds: {"bytes": total, "gb_per_s": total / 1e9 / max(seconds, 1e-9)},
        )
        hashes = stored.value.files
        tokenizer = {name: hashes[name] for name in files.companions if "token" in name}
        return Model(label, files, family, model_digest(hashes), digest(tokenizer))

    def base(self) -> Model:
        """The checkpoint the settings name."""
        model = self.open(sources.model_path(self.experiment.model), "base")
        self.observer.checkpoint("base", model.checkpoint)
        return model

    def blocks(self, base: Model, request: pack_stage.BlockRequest) -> Stored[Blocks]:
        """The blocks of one request, cut with the base model's tokenizer."""
        if request not in self._blocks:
            self._blocks[request] = self._packed(base, request)
        return self._blocks[request]

    def _packed(self, base: Model, request: pack_stage.BlockRequest) -> Stored[Blocks]:
        packs = self.experiment.packs
        files = self.pack_files()
        settings = {
            "packs": {name: sha for name, (_, sha) in files.items()},
            "order": list(files),
            "text_column": packs.text_column,
            "format": packs.format,
            "split": packs.split,
            "profile_fraction": packs.profile_fraction,
            "request": vars(request),
        }

        def compute() -> Blocks:
            rows = {name: self._rows(name) for name in files}
            total = request.num_blocks * request.seq_len
            with self.bars.bar(f"pack {request.pack}", total, "tok") as on_tokens:
                return pack_stage.pack(packs, request, rows, self._tokens(base), on_tokens)

        return self.stage(
            f"pack/{request.part}/{request.pack}/{request.seq_len}",
            pack_stage.VERSION,
            settings,
            {"tokenizer": base.tokenizer_digest},
            Blocks,
            compute,
            lambda blocks, seconds: {
                "blocks": len(blocks),
                "tokens": blocks.ids_BS.size,
                "scored_tokens": blocks.scored_tokens,
                "rows": len(blocks.row_packs),
                "rows_digest": blocks.rows_digest,
                "token_digest": blocks.token_digest,
            },
        )

    def engine(self, model: Model) -> Engine:
        """Who evaluates the model: resident, under torchrun in every process, or a server."""
        if self.experiment.engine.name == "transformers":
            return self.profiler(model)
        from eaft_prune.engines.sglang.serving import serve

        settings, top = self.experiment.engine, self.experiment.eval.entropy_top_k
        top_k = model.family.top_k(model.files.config)
        log_file = self.out / f"server-{model.label}.log"
        return self.resident.get(
            (model.digest, settings, top),
            lambda: serve(settings, model.files, top_k, top, log_file),
        )

    def profiler(self, model: Model) -> Engine:
        """The model in transformers, which tells gates and norms, whoever evaluates."""
        from eaft_prune.engines.loading import load

        key = self._how(model)
        return self.resident.get(key, lambda: load(model.files, *key[1:]))

    def local_engine(self, model: Model) -> TransformersEngine:
        """The model in this process alone."""
        from eaft_prune.engines.loading import load_files

        key = self._how(model)
        engine = self.resident.get((*key, "local"), lambda: load_files(model.files, *key[1:]))
        return cast("TransformersEngine", engine)

    def _how(self, model: Model) -> tuple[str, RuntimeSettings, int, ExpertsMode, bool]:
        settings, asked = self.experiment, self.experiment.eval
        experts = settings.engine.experts
        return model.digest, settings.runtime, asked.entropy_top_k, experts, asked.top_logprobs

    def dtype(self) -> str:
        """The precision the model runs in: part of what is measured, so part of stage keys."""
        dtype = self.experiment.runtime.dtype
        if dtype != "auto":
            return dtype
        from eaft_prune.engines.loading import resolve_dtype

        return resolve_dtype(self.experiment.runtime)

    def pack_files(self) -> dict[str, tuple[Path, str]]:
        """File and sha256 of every pack: fetched, checked and hashed when first asked for."""
        if not self.packs:
            for name, path in sources.pack_files(self.experiment.packs).items():
                self.packs[name] = (path, file_digest(path))
                rows = sources.count_rows(name, path)
                self.observer.dataset(name, str(path), self.packs[name][1], rows)
        return self.packs

    def _rows(self, name: str) -> Sequence[str]:
        if name not in self._texts:
            path = self.pack_files()[name][0]
            column = self.experiment.packs.text_column
            texts = []
            with self.bars.bar(f"read {name}", sources.count_rows(name, path), "row") as on_rows:
                for text in sources.read_texts(name, path, column):
                    texts.append(text)
                    on_rows(1)
            self._texts[name] = texts
        return self._texts[name]

    def _tokens(self, base: Model) -> TransformersTokenizer:
        if self._tokenizer is None:
            from eaft_prune.packs.tokenizer import load_tokenizer

            self._tokenizer = load_tokenizer(base.files.path)
        return self._tokenizer


def _in_words(facts: Mapping[str, Any]) -> str:
    shown = []
    for name, value in facts.items():
        if isinstance(value, int):
            shown.append(f"{name} {value:,}")
        elif isinstance(value, float):
            shown.append(f"{name} {value:,.2f}")
    return "  ".join(shown)
