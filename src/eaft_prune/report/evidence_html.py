"""Sections of the HTML report beyond the gate: divergence, coverage, passages, what was written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from eaft_prune.core.generation import GenerationReport, Pair, Text
from eaft_prune.core.outcome import Selection
from eaft_prune.core.passages import Passage
from eaft_prune.core.types import UNION, Coverage
from eaft_prune.core.verdict import GENERATED, Comparison
from eaft_prune.report import divergence
from eaft_prune.report.elements import numeral, scroll, small, text
from eaft_prune.report.summary import CandidateSummary
from eaft_prune.report.text import number, percent, printable

PAIRS = 24  # of generations that are shown
_RATES = {"loop_rate": "loops", "ended_rate": "ends by itself", "well_formed_rate": "well-formed"}


def divergence_table(summary: CandidateSummary, base: str) -> str:
    """How far the candidate is from the base, in the columns that others publish."""
    head = '<th scope="col">pack</th><th scope="col" class="n">length</th>'
    head += "".join(f'<th scope="col" class="n">{text(name)}</th>' for name in divergence.heads())
    body = ""
    for row, cells in divergence.lines(summary):
        emphasis = ' class="union"' if row.pack == UNION else ""
        found = "".join(
            f'<td class="n">{numeral(value)}{small(numeral(ends))}</td>' for value, ends in cells
        )
        body += (
            f'<tr{emphasis}><th scope="row">{text(row.pack)}</th><td class="n">{row.seq_len}</td>'
            f"{found}</tr>"
        )
    note = divergence.NOTE if any(map(divergence.measured, summary.rows)) else divergence.MISSING
    made = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return scroll(f"Divergence of {summary.label}", made) + f'<p class="note">{text(note)}.</p>'


def coverage_table(selections: Mapping[str, Selection]) -> str:
    """What dropped experts were to each pack; empty where nothing was traced."""
    parts = []
    for label, selection in selections.items():
        if selection.coverage is not None:
            parts.append(f"<h3>{text(label)}</h3>{_coverage(selection.coverage)}")
        if len({id(one) for one in selections.values()}) == 1:
            break
    return "".join(parts)


def _coverage(found: Coverage) -> str:
    body = ""
    for pack, tokens, lost_L in zip(found.packs, found.tokens_P, found.lost_PL, strict=True):
        if tokens == 0:
            cells = '<td colspan="3">no sibling among the profiled text: nothing is known</td>'
        else:
            worst = int(lost_L.argmax())
            cells = (
                f'<td class="n">{lost_L.mean():.1%}</td><td class="n">{lost_L[worst]:.1%}</td>'
                f'<td class="n">{worst}</td>'
            )
        name = f'<th scope="row">{text(printable(pack))}</th>'
        body += f'<tr>{name}<td class="n">{tokens:,}</td>{cells}</tr>'
    head = "".join(
        f'<th scope="col"{css}>{name}</th>'
        for name, css in (
            ("pack", ""), ("profiled tokens", ' class="n"'), ("lost, mean of layers", ' class="n"'),
            ("lost, worst layer", ' class="n"'), ("that layer", ' class="n"'),
        )
    )  # fmt: skip
    return scroll("Coverage", f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>")


def passages_block(comparison: Comparison, label: str) -> str:
    """The passages a candidate lost most on, base above candidate, each token in its colour."""
    found = comparison.passages.get(label, ())
    return "".join(_passage(one) for one in found)


def _passage(one: Passage) -> str:
    lines = ""
    for name, p in (("base", one.base), ("candidate", one.candidate)):
        spans = "".join(
            _token(token, own, before, after)
            for token, own, before, after in zip(
                one.tokens, p, one.base, one.candidate, strict=True
            )
        )
        lines += f'<p class="tokens"><span class="side">{name}</span>{spans}</p>'
    caption = f"<b>{text(printable(one.pack))}</b> at {one.seq_len}: {one.change:.1f} nats lost"
    return f'<figure class="passage"><figcaption>{caption}</figcaption>{lines}</figure>'


def _token(token: str, own: float | None, before: float | None, after: float | None) -> str:
    shown = text(_visible(token))
    if own is None or before is None or after is None:
        return f"<span>{shown}</span>"
    moved = " moved" if abs(before - after) >= 0.25 else ""
    return (
        f'<span class="p{moved}" style="--p:{own:.3f}" title="p {before:.3f} → {after:.3f}">'
        f"{shown}</span>"
    )


def _visible(token: str) -> str:
    return printable(token.replace("\n", "⏎"))


def written_block(summary: CandidateSummary, comparison: Comparison) -> str:
    """Rates of what both wrote, and the answers that went wrong side by side."""
    found = comparison.generated.get(summary.label)
    if found is None:
        return "<p>Nothing was generated: give eval.generation=true.</p>"
    wrong = sorted(found.pairs, key=_badness)[:PAIRS]
    shown = "".join(_pair(pair) for pair in wrong if _badness(pair)[0] < 3)
    return _rates(found, summary) + shown


def _rates(found: GenerationReport, summary: CandidateSummary) -> str:
    body = ""
    for name, label in _RATES.items():
        change, flips = found.changes[f"d{name}"], found.flips[name]
        shift, low, high = (
            f"{number(100 * value, 2, signed=True)}%"
            for value in (change.value, change.low, change.high)
        )
        ends = f"{low} to {high}"
        body += (
            f'<tr><th scope="row">{label}</th><td class="n">{percent(found.base[name])}</td>'
            f'<td class="n">{percent(found.candidate[name])}</td>'
            f'<td class="n">{numeral(shift)}{small(numeral(ends))}</td>'
            f'<td class="n">{flips.base_only}</td><td class="n">{flips.candidate_only}</td>'
            f'<td class="n">{flips.p_value:.3g}</td>'
            f'<td class="n">{summary.settled_by(f"d{name}", GENERATED)}</td></tr>'
        )
    names = (
        "of the answers",
        "base",
        "candidate",
        "Δ",
        "base alone",
        "candidate alone",
        "McNemar p",
        "settled by",
    )
    head = "".join(
        f'<th scope="col"{css}>{name}</th>'
        for name, css in zip(names, ["", *[' class="n"'] * 7], strict=True)
    )
    length, same = found.changes["length_ratio"], found.changes["agreement"]
    apart = found.median_first_difference
    where = "" if apart is None else f", the others differ after {apart:.0f} tokens (median)"
    said = (
        f"{found.changes.rows} prompts; {percent(same.value)} of the answers are equal token by "
        f"token{where}; length {length.value:.3f} times the base's "
        f"({length.low:.3f} to {length.high:.3f}). Exact tests are of greedy answers; "
        "settled by: prompts that would decide a check that is undecided."
    )
    if found.answered is not None:
        right = found.answered["dtask_accuracy"]
        said += (
            f" Right answers to {found.answered.rows} prompts: {found.base['task_accuracy']:.1%} → "
            f"{found.candidate['task_accuracy']:.1%} ({right.low:+.1%} to {right.high:+.1%})."
        )
    table = scroll("What was written", f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>")
    return f'{table}<p class="note">{text(said)}</p>'


def _badness(pair: Pair) -> tuple[int, float]:
    """What went wrong first: loops that are new, then form, then not ending, then differences."""
    b, c = pair.base, pair.candidate
    new = (
        c.loops and not b.loops, b.well_formed and not c.well_formed, b.ended and not c.ended
    )  # fmt: skip
    rank = new.index(True) if True in new else 3
    return rank, math.inf if pair.first_difference is None else pair.first_difference


def _pair(pair: Pair) -> str:
    sides = "".join(
        f'<div><p class="side">{name}: {_state(one)}</p><pre>{text(_lines(one.text))}</pre></div>'
        for name, one in (("base", pair.base), ("candidate", pair.candidate))
    )
    caption = f"<b>{text(printable(pair.pack))}</b>, {text(pair.decoding)}"
    return (
        f'<figure class="passage"><figcaption>{caption}</figcaption>'
        f'<pre>{text(_lines(pair.prompt[-400:]))}</pre><div class="two">{sides}</div></figure>'
    )


def _state(one: Text) -> str:
    said = ["ends by itself" if one.ended else "cut off"]
    said += ["loops"] if one.loops else []
    said += [] if one.well_formed else ["malformed"]
    said += ["wrong"] if one.right is False else []
    return ", ".join(said)


def _lines(value: str) -> str:
    return "\n".join(printable(line) for line in value.splitlines())


def searchable(blocks: Sequence[str]) -> str:
    """A field that hides what does not hold its text; empty where there is nothing to find."""
    if not any("passage" in block for block in blocks):
        return ""
    return (
        '<p class="find"><label>Find <input type="search" id="find" '
        'placeholder="a pack, a word, loops"></label> <output id="found"></output></p>'
    )
