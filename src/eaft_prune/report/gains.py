"""What pruning buys: the first table of a report, computed, and measured where that was done."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eaft_prune.checkpoints.cache import bytes_a_token
from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.read import ModelFiles, open_model
from eaft_prune.checkpoints.size import parameters
from eaft_prune.config import resolve_path
from eaft_prune.core.foreign import parsed_json
from eaft_prune.core.outcome import Outcome
from eaft_prune.core.types import UserError
from eaft_prune.report.elements import numeral, scroll, text
from eaft_prune.report.text import number

_HEADS = ("What pruning buys", "base", "pruned", "pruned / base")
_UNKNOWN = "not measured"
_SIDES = ("base", "candidate")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gain:
    """One quantity of both checkpoints; ratio: of the pruned one's to the base's, if it has one."""

    what: str
    base: str
    pruned: str
    ratio: float | None = None

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """As a table shows it."""
        ratio = "" if self.ratio is None else number(self.ratio, 3)
        return self.what, self.base, self.pruned, ratio


def gains(outcome: Outcome, speeds: str | None) -> tuple[Gain, ...]:
    """Sizes of the files, room for the KV cache, and speeds as `speeds` has them.

    speeds: a decode_bench.json; one of other checkpoints is named and not shown. Nothing is known
    of a candidate that is no checkpoint.
    """
    if outcome.base is None or outcome.checkpoint is None:
        return ()
    made = dict(zip(_SIDES, (outcome.base.digest, outcome.checkpoint.digest), strict=True))
    sizes = _sizes(open_model(outcome.base.path), open_model(outcome.checkpoint.path))
    measured = {} if speeds is None else bench(speeds)
    timed = {side: one.get("digest") for side, one in measured.get("sides", {}).items()}
    if any(timed[side] not in (None, made[side]) for side in timed):
        why = f"speeds = {speeds} timed other checkpoints"
        log.warning("%s than %s: its rates are not shown", why, made)
        return (*sizes, Gain(f"tokens/s: {why}", _UNKNOWN, _UNKNOWN))
    return (*sizes, *_capacity(measured), *_rates(measured))


def bench(path: str) -> Mapping[str, Any]:
    """A decode_bench.json; raises UserError where it is none."""
    found = parsed_json(resolve_path(path))
    if not isinstance(found, dict) or not {"sides", "rows", "max_stable_batch"} <= set(found):
        raise UserError(
            f"speeds = {path!r} is no decode_bench.json: give that of task=decode_bench"
        )
    return found


def gains_table(rows: Sequence[Gain]) -> str:
    """The table in HTML; nothing where there are no rows."""
    if not rows:
        return ""
    head = f'<th scope="col">{text(_HEADS[0])}</th>'
    head += "".join(f'<th scope="col" class="n">{text(name)}</th>' for name in _HEADS[1:])
    body = ""
    for what, *numbers in (row.cells for row in rows):
        cells = "".join(f'<td class="n">{text(numeral(cell))}</td>' for cell in numbers)
        body += f'<tr><th scope="row">{text(what)}</th>{cells}</tr>'
    return scroll(_HEADS[0], f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>")


def gains_lines(rows: Sequence[Gain]) -> list[str]:
    """The table in Markdown; nothing where there are no rows."""
    if not rows:
        return []
    lines = [_HEADS, ("---", "--:", "--:", "--:"), *(row.cells for row in rows)]
    return [*(f"| {' | '.join(cells)} |" for cells in lines), ""]


def _sizes(base: ModelFiles, pruned: ModelFiles) -> Iterable[Gain]:
    weights = base.weight_bytes, pruned.weight_bytes
    counts = parameters(base), parameters(pruned)
    yield _compared("weights, GB", weights, lambda size: f"{size / 1e9:.4g}")
    yield _compared("parameters", counts, lambda count: f"{count:,}")
    family = family_of(base.config)
    each = bytes_a_token(family.language(base.config), family.n_layers(base.config))
    if each:
        freed = (weights[0] - weights[1]) // each
        what = f"KV cache tokens in the memory set free ({each:,} bytes each, computed)"
        yield Gain(what, "", f"{freed:+,}")


def _capacity(measured: Mapping[str, Any]) -> Iterable[Gain]:
    """Tokens that the servers held at once, where both told."""
    held = [measured.get("sides", {}).get(s, {}).get("capacity_tokens") for s in _SIDES]
    if all(held):
        what = "KV cache tokens of the server (measured)"
        yield _compared(what, held, lambda tokens: f"{tokens:,}")


def _rates(measured: Mapping[str, Any]) -> Iterable[Gain]:
    """tokens/s of one stream, and at the largest batch that a side decoded in every round."""
    rows = {(r["side"], r["new_tokens"], r["batch"]): r for r in measured.get("rows", ())}
    if not rows:
        yield Gain("tokens/s (task=decode_bench, then speeds=FILE)", _UNKNOWN, _UNKNOWN)
    stable = measured.get("max_stable_batch", {})
    for new in sorted({new for _, new, _ in rows}):
        most = [stable.get(side, {}).get(str(new)) for side in _SIDES]
        for name, batches in (("batch 1", [1, 1]), ("largest batch", most)):
            found = [rows.get((s, new, b)) for s, b in zip(_SIDES, batches, strict=True)]
            speeds = [row["total_tokens_s"] for row in found if row is not None]
            if len(speeds) < len(_SIDES):
                continue
            at = [f" at {b}" if batches is most else "" for b in batches]
            base, pruned = (number(s, 1) + b for s, b in zip(speeds, at, strict=True))
            what = f"tokens/s, {name}, {new:,} new each"
            yield Gain(what, base, pruned, speeds[1] / speeds[0])


def _compared(what: str, values: Sequence[int], show: Callable[[int], str]) -> Gain:
    base, pruned = values
    return Gain(what, show(base), show(pruned), pruned / base)
