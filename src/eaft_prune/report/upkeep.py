"""Tables of task=doctor and task=gc for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from eaft_prune.core.diagnosis import Diagnosis
from eaft_prune.report.terminal import listing


def diagnoses_table(found: Sequence[Diagnosis]) -> str:
    """One line a diagnosis; below, the commands that mend, whole so that they can be copied."""
    states = ["ok" if one.ok else "mended" if one.mended else "WRONG" for one in found]
    rows = [(one.check, state, one.what) for one, state in zip(found, states, strict=True)]
    commands = dict.fromkeys(one.mend for one in found if not (one.ok or one.mended))
    lines = ["", "to mend:", *(f"  {command}" for command in commands if command)]
    shown = listing(("check", "state", "found"), rows) + "\n"
    return shown + ("\n".join(lines) + "\n" if any(commands) else "")


def garbage_table(
    going: Sequence[tuple[str, str, int, float, str]], kept: Sequence[tuple[str, int]]
) -> str:
    """What goes (what, name, bytes, age in days, why), and what stays by reason (reason, bytes)."""
    goes = [
        (what, name, f"{size / 1e6:,.2f}", f"{age:,.1f}", why)
        for what, name, size, age, why in going
    ]
    reasons, counts = Counter[str](), Counter[str]()
    for reason, size in kept:
        reasons[reason] += size
        counts[reason] += 1
    stays = [(str(counts[why]), f"{size / 1e6:,.2f}", why) for why, size in reasons.most_common()]
    shown = []
    if goes:
        heads = ("goes", "name", "MB", "days", "because")
        shown.append(listing(heads, goes, right=("MB", "days")))
    if stays:
        shown.append(listing(("stays", "MB", "because"), stays, right=("MB",)))
    return "\n".join(f"{table}\n" for table in shown)
