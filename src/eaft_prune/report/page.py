"""A page that opens from disk: its own files, which scripts it may run, data inside it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from string import Template
from typing import Any

from eaft_prune.report.elements import text


@dataclass(frozen=True)
class Words:
    """What pages say differently around their contents."""

    question: str
    skip_to: str  # id of the part that the keyboard may skip to
    skipped: str  # how that is called
    complete: str  # what is there without the scripts, and what needs them


def page(name: str, title: str, words: Words, data: Any, parts: Mapping[str, str]) -> str:
    """The template NAME.html filled with parts, in the frame of every page; NAME.js draws data."""
    theme, plotly, script = _own_file("theme.js"), _plotly_script(), _own_file(f"{name}.js")
    return Template(_own_file("page.html")).substitute(
        title=text(title),
        policy=_policy(theme, plotly, script),
        css=_own_file("report.css"),
        main=Template(_own_file(f"{name}.html")).substitute(parts),
        theme=theme,
        data=_embedded(data),
        plotly=plotly,
        script=script,
        **vars(words),
    )


def _own_file(name: str) -> str:
    """A file of this package: a template, a style sheet or a script."""
    return resources.files("eaft_prune.report").joinpath(name).read_text(encoding="utf-8")


def _plotly_script() -> str:
    """Plotly's JavaScript, whole."""
    # here, because importing plotly takes longer than we do
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _policy(*scripts: str) -> str:
    """Content security policy: these scripts and no other, and no network at all."""
    hashes = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    )


def _embedded(data: Any) -> str:
    """Compact JSON that cannot close the script element it stands in."""
    dense = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return dense.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
