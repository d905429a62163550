"""task=decode_bench: decoding speed of base and candidate, round by round in turn."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from eaft_prune.checkpoints.model import Model
from eaft_prune.checks.decoding_speed import Point, Row, ladder, max_stable_batch, summary
from eaft_prune.config import SERVERS, DecodeSettings, resolve_path
from eaft_prune.core.files import write_atomically
from eaft_prune.core.outcome import Outcome
from eaft_prune.core.types import UserError
from eaft_prune.engines.decoding import Api, Decoder, Prompts
from eaft_prune.engines.serving_decoders import given, launched
from eaft_prune.pipeline.session import Session
from eaft_prune.report.decode import decode_page, decode_table

log = logging.getLogger(__name__)

FILE = "decode_bench.json"
_FORMAT = 1


@dataclass(frozen=True)
class _Side:
    """What is timed: a checkpoint to serve, or the URL of a server."""

    name: str
    model: Model | None
    url: str | None
    args: tuple[str, ...] = ()  # of a launched server, after engine.args


def run_decode_bench(session: Session, out: Path) -> Outcome:
    """Every round opens each side once and climbs the batch sizes; the order turns every round.

    One side holds the machine at a time, unless both are URLs: drift hits both alike.
    """
    settings = session.experiment.decode_bench
    assert settings is not None, "config requires decode_bench.* for this task"
    log.info("%s", _plan_of(settings))
    base = session.base()
    vocab = int(base.language["vocab_size"])
    sides = _sides(session, settings, base)
    points: list[Point] = []
    ended: dict[str, str] = {}
    facts: dict[str, dict[str, Any]] = {}
    batches = len(settings.batch_sizes)
    total = settings.repeats * len(sides) * (1 + len(settings.new_tokens)) * batches
    with session.bars.bar("decode", total, "batch") as on_batches:
        for repeat in range(settings.repeats):
            for side in sides if repeat % 2 == 0 else sides[::-1]:
                with _opened(session, side, settings.api, out) as decoder:
                    log.info("round %d of %d: %s", repeat + 1, settings.repeats, side.name)
                    _warm_up(decoder, settings, vocab)
                    on_batches(batches)
                    for new_tokens in settings.new_tokens:
                        texts = partial(_prompts, settings, vocab, [repeat, new_tokens])
                        climb = ladder(
                            decoder, side.name, settings.batch_sizes, new_tokens, repeat, texts
                        )
                        found, why = _climb(climb, side, on_batches)
                        points += found
                        on_batches(batches - len(found))
                        if why:
                            ended[f"{side.name}/{new_tokens}"] = why
                    facts[side.name] = dict(decoder.facts)
    return _outcome(session, settings, out, sides, points, ended, facts)


def _plan_of(settings: DecodeSettings) -> str:
    """What will be timed, said before anything takes long."""
    alone = settings.candidate is None and not settings.candidate_args
    who = "the base alone (decode_bench.candidate=DIR compares)" if alone else "base and candidate"
    new, batches = (", ".join(map(str, n)) for n in (settings.new_tokens, settings.batch_sizes))
    return f"decoding {new} new tokens in batches of {batches}, {settings.repeats} rounds: {who}"


def _climb(
    climb: Iterator[Point | str], side: _Side, on_batches: Callable[[int], None]
) -> tuple[list[Point], str | None]:
    """The points of one ladder, and why it ended where that was before its last."""
    found: list[Point] = []
    for item in climb:
        if isinstance(item, str):
            if not found:
                raise UserError(f"decode_bench: {side.name} decoded nothing: {item}")
            return found, item
        found.append(item)
        speed = f"{item.total_tokens_s:,.1f} tok/s"
        log.info("%-10s %5d new  batch %-4d %s", side.name, item.new_tokens, item.batch, speed)
        on_batches(1)
    return found, None


def _prompts(settings: DecodeSettings, vocab: int, key: Sequence[int], batch: int) -> Prompts:
    """Random ids, others every time: no cache of prefixes helps."""
    rng = np.random.default_rng([settings.seed, *key, batch])
    ids: list[list[int]] = rng.integers(0, vocab, (batch, settings.prompt_tokens)).tolist()
    return ids


def _warm_up(decoder: Decoder, settings: DecodeSettings, vocab: int) -> None:
    """Every batch size once, briefly: kernels are chosen and compiled by shape."""
    steps = ladder(
        decoder,
        "warm-up",
        settings.batch_sizes,
        settings.warmup_tokens,
        0,
        partial(_prompts, settings, vocab, [2**31]),
    )
    for _ in steps:
        pass  # what fails here fails again where it is recorded


def _sides(session: Session, settings: DecodeSettings, base: Model) -> list[_Side]:
    engine = session.experiment.engine
    sides = [_side(session, "base", settings.base or engine.base_url, base, ())]
    if settings.candidate is not None or settings.candidate_args:
        args = settings.candidate_args
        sides.append(_side(session, "candidate", settings.candidate, base, args))
    launches = engine.name in SERVERS and engine.python is not None
    for side in sides:
        if side.url is None and engine.base_url is not None:
            raise UserError(
                f"decode_bench.{side.name} is a checkpoint, engine.base_url cannot serve it: give "
                "the URL of its server, or engine.python"
            )
        if side.args and (side.url is not None or not launches):
            raise UserError(
                "decode_bench.candidate_args are of a launched server: give engine.python"
            )
    return sides


def _side(
    session: Session, name: str, where: str | None, base: Model, args: tuple[str, ...]
) -> _Side:
    if where is None:
        return _Side(name, base, None, args)
    if where.startswith(("http://", "https://")):
        return _Side(name, None, where, args)
    return _Side(name, session.open(resolve_path(where), name), None, args)


@contextmanager
def _opened(session: Session, side: _Side, api: Api, out: Path) -> Iterator[Decoder]:
    engine = session.experiment.engine
    if side.url is not None:
        yield given(engine, side.url, api)
        return
    assert side.model is not None, "a side is a URL or a model"
    if engine.name in SERVERS:
        how = engine.model_copy(update={"args": (*engine.args, *side.args)})
        log_file = out / f"server-{side.name}.log"
        with launched(how, side.model.files.path, log_file) as decoder:
            yield decoder
    else:
        from eaft_prune.engines.decoding_local import LocalDecoder  # torch

        yield LocalDecoder(side.model.files, side.model.family, session.experiment.runtime)


def _outcome(
    session: Session,
    settings: DecodeSettings,
    out: Path,
    sides: list[_Side],
    points: list[Point],
    ended: dict[str, str],
    facts: dict[str, dict[str, Any]],
) -> Outcome:
    rows = summary(points)
    stable = max_stable_batch(rows, settings.repeats)
    identity = {
        side.name: {
            "url": side.url,
            "digest": side.model.digest if side.model else None,
            **facts[side.name],
        }
        for side in sides
    }
    table = [asdict(row) for row in rows]
    value = {
        "format": _FORMAT,
        "settings": settings.model_dump(mode="json"),
        "sides": identity,
        "rows": table,
        "max_stable_batch": stable,
        "ended": ended,
        "points": [asdict(item) for item in points],
    }
    write_atomically(out / FILE, json.dumps(value, indent=1) + "\n")
    write_atomically(out / "decode_bench.html", decode_page(table))
    for name in (FILE, "decode_bench.html"):
        session.observer.artifact(out / name)
    lines = [decode_table(table)]
    lines += [f"{where}: stopped, {why}" for where, why in ended.items()]
    lines += [f"{'results':<11} {out / FILE}", f"{'plot':<11} {out / 'decode_bench.html'}"]
    named = {"decode": _by_name(rows), "max_stable_batch": stable, "ended": ended}
    return Outcome(facts=named, text="\n".join(lines))


def _by_name(rows: list[Row]) -> dict[str, Any]:
    """side -> length -> batch -> medians: the names of metrics."""
    named: dict[str, Any] = {}
    for row in rows:
        values = asdict(row)
        for key in ("side", "new_tokens", "batch", "repeats"):
            del values[key]
        values = {key: value for key, value in values.items() if value is not None}
        where = named.setdefault(row.side, {}).setdefault(str(row.new_tokens), {})
        where[f"batch{row.batch}"] = values
    return named
