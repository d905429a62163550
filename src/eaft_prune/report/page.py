"""A page that opens from disk: its own files, which scripts it may run, data inside it."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from typing import Any


def own_file(name: str) -> str:
    """A file of this package: a template, a style sheet or a script."""
    return resources.files("eaft_prune.report").joinpath(name).read_text(encoding="utf-8")


def plotly_script() -> str:
    """Plotly's JavaScript, whole."""
    # here, because importing plotly takes longer than we do
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def policy(*scripts: str) -> str:
    """Content security policy: these scripts and no other, and no network at all."""
    hashes = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{one}'" for one in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    )


def embedded(data: Any) -> str:
    """Compact JSON that cannot close the script element it stands in."""
    dense = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return dense.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
