"""Facts as short text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml

# libyaml's is six times as fast, where PyYAML was built with it
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def yaml_text(values: Any, **options: Any) -> str:
    """Plain values as YAML, in their own order."""
    options = {"sort_keys": False, "allow_unicode": True, **options}
    return str(yaml.dump(values, Dumper=_DUMPER, **options))


def id_ranges(ids: Iterable[int]) -> str:
    """0, 1, 2, 7 -> "0-2, 7"; ids ascend."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def shortened(text: str, limit: int = 60) -> str:
    """Its first line, and of that the first `limit` characters with how many there were."""
    line = text.strip().partition("\n")[0]
    return line if len(line) <= limit else f"{line[:limit]}... ({len(text):,} characters)"
