"""What every task works with: settings, store, watcher, and one resident model at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from eaft_prune.checkpoints.families import check_file, family_of
from eaft_prune.checkpoints.families.base import with_table
from eaft_prune.checkpoints.model import Hashes, Model
from eaft_prune.checkpoints.read import file_hashes, model_digest, open_model
from eaft_prune.config import Experiment
from eaft_prune.core.digests import digest, file_digest
from eaft_prune.core.generation import Prompts
from eaft_prune.core.outcome import StageRecord
from eaft_prune.core.progress import Bars
from eaft_prune.core.step import Step
from eaft_prune.core.store import Store, Stored
from eaft_prune.core.types import Blocks, Spans, UserError
from eaft_prune.engines.base import EngineKind, EngineOptions, Profiler, Scorer, Writer
from eaft_prune.engines.registry import TRANSFORMERS, dtype_of, engine_kind
from eaft_prune.engines.world import world_size
from eaft_prune.packs import sources
from eaft_prune.packs.chat import written
from eaft_prune.packs.pack_file import PackFile
from eaft_prune.packs.rows import count_rows, read_answers
from eaft_prune.pipeline.fitting import check_ids, check_length, check_rows
from eaft_prune.pipeline.observer import Observer
from eaft_prune.stages import pack as pack_stage

if TYPE_CHECKING:
    from eaft_prune.engines.transformers import TransformersEngine
    from eaft_prune.packs.tokenizer import TransformersTokenizer

T = TypeVar("T")
S = TypeVar("S", bound=Scorer)
log = logging.getLogger(__name__)


@dataclass
class Resident:
    """The one model in memory; asking for another lets go of it first, which frees it."""

    key: tuple[Any, ...] | None = None
    scorer: Any = None

    def get(self, key: tuple[Any, ...], load: Callable[[], S]) -> S:
        if self.scorer is None or self.key != key:
            self.scorer = None
            self.scorer, self.key = load(), key
        found: S = self.scorer
        return found


@dataclass
class Session:
    """One run's working place; knows paths, store and watcher so that stages do not."""

    experiment: Experiment
    store: Store
    observer: Observer
    bars: Bars
    resident: Resident
    records: list[StageRecord] = field(default_factory=list)
    out: Path = Path()  # where servers leave their logs
    packs: dict[str, tuple[Path, str]] = field(default_factory=dict)  # of those read: path, sha256
    _texts: dict[str, Sequence[str]] = field(default_factory=dict)
    _said: dict[str, Spans] = field(default_factory=dict)  # by text, of those that are no harmony
    _tokenizer: TransformersTokenizer | None = None
    _blocks: dict[pack_stage.BlockRequest, Stored[Blocks]] = field(default_factory=dict)
    prompts: Stored[Prompts] | None = None  # that models are to write on, once they are known

    def run(self, step: Step[T]) -> Stored[T]:
        """A step through the store; the watcher hears of it."""
        stored = self.store.run(step)
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
        files = with_table(family, files)
        names = ["config.json", *files.companions, *files.shards]
        stats = {name: (files.path / name).stat() for name in names}
        identity = {
            name: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for name, stat in stats.items()
        }
        total = sum(stat.st_size for stat in stats.values())

        def compute() -> Hashes:
            with self.bars.bar(f"hash {label}", total, "B") as on_bytes:
                return Hashes(file_hashes(files, on_bytes))

        step = Step(
            f"inspect/{label}",
            1,
            {"path": str(files.path), "files": identity},
            {},
            Hashes,
            compute,
            lambda value, seconds: {"bytes": total, "gb_per_s": total / 1e9 / max(seconds, 1e-9)},
        )
        hashes = self.run(step).value.files
        texts = [name for name in files.companions if "token" in name or "chat_template" in name]
        tokenizer = {name: hashes[name] for name in texts}
        return Model(label, files, family, model_digest(hashes), digest(tokenizer))

    def base(self) -> Model:
        """The checkpoint the settings name."""
        model = self.open(sources.model_path(self.experiment.model, check=check_file), "base")
        if self.experiment.eval.generation and not self.tokenizer(model).speaks_harmony:
            raise UserError(
                f"eval.generation = true reads turns as harmony, which the tokenizer of "
                f"{model.files.path} does not know: set it to false"
            )
        self.observer.checkpoint("base", model.checkpoint)
        return model

    def blocks(self, base: Model, request: pack_stage.BlockRequest) -> Stored[Blocks]:
        """The blocks of one request, cut with the base model's tokenizer, and fit for it."""
        if request not in self._blocks:
            check_length(base, request)
            blocks = self.run(self._packing(base, request))
            check_rows(self.experiment.packs, request, blocks)
            check_ids(base, request, blocks)
            self._blocks[request] = blocks
        return self._blocks[request]

    def _packing(self, base: Model, request: pack_stage.BlockRequest) -> Step[Blocks]:
        packs = self.experiment.packs
        files = self.pack_files()
        settings = {
            "packs": {name: sha for name, (_, sha) in files.items()},
            "order": list(files),
            "text_column": packs.text_column,
            "format": packs.format,
            "split": packs.split,
            "profile_fraction": packs.profile_fraction,
            "request": request.identity,
        }

        packed: list[pack_stage.Packed] = []

        def compute() -> Blocks:
            rows = {name: self.rows(base, name) for name in files}
            count = request.num_blocks
            total = None if count == "all" else count * request.seq_len
            with self.bars.bar(f"pack {request.pack}", total, "tok") as on_tokens:
                done = pack_stage.pack(
                    packs, request, rows, self.tokenizer(base), on_tokens, self._said
                )
            packed.append(done)
            return done.blocks

        return Step(
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
                "malformed_rows": packed[0].malformed,
                "first_malformed": packed[0].first_fault,
                "rows_digest": blocks.rows_digest,
                "token_digest": blocks.token_digest,
            },
        )

    @property
    def kind(self) -> EngineKind:
        """The engine that evaluates."""
        return engine_kind(self.experiment.engine.name)

    @property
    def options(self) -> EngineOptions:
        """The settings that engines are opened with."""
        return EngineOptions.of(self.experiment)

    @property
    def profiling_kind(self) -> EngineKind:
        """The engine that traces and masks: the one that evaluates if it can, else transformers."""
        return self.kind if self.kind.profiles else TRANSFORMERS

    @property
    def dtype(self) -> str:
        """The precision that transformers runs models in here."""
        return dtype_of(self.experiment.runtime)

    def scorer(self, model: Model) -> Scorer:
        """Who evaluates the model: resident, under torchrun in every process, or a server."""
        return self._opened(self.kind, model, self.options)

    def writer(self, model: Model, options: EngineOptions) -> Writer:
        """The model in whatever engine these options name."""
        return cast(Writer, self._opened(engine_kind(options.engine.name), model, options))

    def profiler(self, model: Model) -> Profiler:
        """Who tells the model's router weights and norms, and masks experts."""
        return cast(Profiler, self._opened(self.profiling_kind, model, self.options))

    def local_engine(self, model: Model) -> TransformersEngine:
        """The model in transformers in this process alone."""
        from eaft_prune.engines.loading import load_files

        options = self.options
        where = TRANSFORMERS.name if world_size() == 1 else "local"
        return self.resident.get(
            (model.digest, options, where), lambda: load_files(model.files, options)
        )

    def _opened(self, kind: EngineKind, model: Model, options: EngineOptions) -> Scorer:
        name = "server" if options == self.options else kind.name
        log_file = self.out / f"{name}-{model.label}.log"
        return self.resident.get(
            (model.digest, options, kind.name),
            lambda: kind.open(options, model.files, model.top_k, log_file),
        )

    def pack_files(self) -> dict[str, tuple[Path, str]]:
        """File and sha256 of every pack: fetched, checked and hashed when first asked for."""
        if not self.packs:
            for name, path in sources.pack_files(self.experiment.packs).items():
                self.packs[name] = (path, file_digest(path))
                rows = count_rows(self._file(name))
                self.observer.dataset(name, str(path), self.packs[name][1], rows)
        return self.packs

    @property
    def pack_digests(self) -> dict[str, str]:
        """sha256 of every pack that was read."""
        return {name: sha for name, (_, sha) in self.packs.items()}

    def _file(self, name: str) -> PackFile:
        return PackFile(name, self.packs[name][0], self.experiment.packs.text_column)

    def answers(self, name: str) -> list[str | None]:
        """What each row of a pack should be answered; none where it has no such column."""
        return read_answers(self._file(name))

    def rows(self, base: Model, name: str) -> Sequence[str]:
        """The texts of a pack."""
        if name not in self._texts:
            file, texts = self._file(name), []
            form = self.experiment.packs.format
            with self.bars.bar(f"read {name}", count_rows(file), "row") as on_rows:
                for text, spans in written(file, form, lambda: self.tokenizer(base)):
                    texts.append(text)
                    if spans is not None:
                        self._said[text] = spans
                    on_rows(1)
            if file_digest(file.path) != self.packs[name][1]:
                raise file.error("changed while it was read: run again")
            self._texts[name] = texts
        return self._texts[name]

    def tokenizer(self, base: Model) -> TransformersTokenizer:
        """The base model's."""
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
