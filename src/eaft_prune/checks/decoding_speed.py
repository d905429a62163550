"""Timed streams -> tokens/s and time to first token: medians of repeats, and their ratios."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from eaft_prune.engines.decoding import DecodeError, Decoder, Prompts, Stream


@dataclass(frozen=True)
class Point:
    """One batch decoded once by one side."""

    side: str  # base | candidate
    new_tokens: int
    batch: int
    repeat: int
    total_tokens_s: float  # new tokens of all streams a second, prefill included; higher is better
    stream_tokens_s: float  # of the median stream after its first token; higher is better
    ttft_s: float  # of the median stream; lower is better


@dataclass(frozen=True)
class Row:
    """Medians over the repeats of one side, length and batch."""

    side: str
    new_tokens: int
    batch: int
    repeats: int
    total_tokens_s: float
    stream_tokens_s: float
    ttft_s: float
    ratio: float | None  # total_tokens_s against the base's at the same length and batch


def point(side: str, batch: int, repeat: int, streams: Sequence[Stream]) -> Point:
    """Rates of one decoded batch."""
    tokens = [stream.tokens for stream in streams]
    after_first = [(s.tokens - 1) / max(s.end_s - s.first_s, 1e-9) for s in streams]
    return Point(
        side=side,
        new_tokens=tokens[0],
        batch=batch,
        repeat=repeat,
        total_tokens_s=sum(tokens) / max(stream.end_s for stream in streams),
        stream_tokens_s=median(after_first),
        ttft_s=median(stream.first_s for stream in streams),
    )


def ladder(
    decoder: Decoder,
    side: str,
    batches: Sequence[int],
    new_tokens: int,
    repeat: int,
    prompts: Callable[[int], Prompts],
) -> Iterator[Point | str]:
    """A point a batch size, ascending; after the largest that was decoded, why there is no next.

    A batch that the decoder could not hold at once is not tried: it would be queued, not decoded.
    """
    for batch in sorted(batches):
        texts = prompts(batch)
        need = sum(len(text) for text in texts) + batch * new_tokens
        if decoder.capacity is not None and need > decoder.capacity:
            yield f"batch {batch} needs {need:,} of {decoder.capacity:,} tokens of memory"
            return
        try:
            streams = decoder.decode(texts, new_tokens)
        except DecodeError as error:
            yield f"batch {batch} failed: {error}"
            return
        yield point(side, batch, repeat, streams)


def summary(points: Sequence[Point]) -> list[Row]:
    """Medians by side, length and batch, in the order of first appearance."""
    groups: dict[tuple[str, int, int], list[Point]] = {}
    for item in points:
        groups.setdefault((item.side, item.new_tokens, item.batch), []).append(item)
    rates = {key: median(p.total_tokens_s for p in group) for key, group in groups.items()}
    return [
        Row(
            side,
            new_tokens,
            batch,
            len(group),
            rates[side, new_tokens, batch],
            median(p.stream_tokens_s for p in group),
            median(p.ttft_s for p in group),
            _ratio(rates.get(("base", new_tokens, batch)), rates[side, new_tokens, batch]),
        )
        for (side, new_tokens, batch), group in groups.items()
    ]


def max_stable_batch(rows: Sequence[Row], repeats: int) -> dict[str, dict[str, int]]:
    """side -> length -> the largest batch that was decoded in every repeat."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        if row.repeats == repeats:
            lengths = found.setdefault(row.side, {})
            lengths[str(row.new_tokens)] = max(row.batch, lengths.get(str(row.new_tokens), 0))
    return found


def _ratio(base: float | None, value: float) -> float | None:
    return None if base is None else value / base
