"""Runs a notebook's cells in this process and keeps what they show: python tools/notebook.py FILE

No kernel and no IPython: cells are plain Python. What a cell ends with is its output, figures of
plotly as such; what it prints is kept as well. The cell tagged `parameters` may be followed by
other values of its names, as papermill has it.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def executed(notebook: Mapping[str, Any], parameters: Mapping[str, Any] = {}) -> dict[str, Any]:
    """The notebook with outputs; raises what a cell raises."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells, count = [], 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            cells.append(cell)
            continue
        count += 1
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            value = _run("".join(cell["source"]), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            names |= parameters
        outputs = [] if value is None else [_shown(value, count)]
        if printed.getvalue():
            text = printed.getvalue()
            outputs.insert(0, {"output_type": "stream", "name": "stdout", "text": text})
        cells.append({**cell, "execution_count": count, "outputs": outputs})
    return {**notebook, "cells": cells}


def _run(source: str, names: dict[str, Any]) -> Any:
    """Run a cell; returns the value of its last line, if that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    if last is None:
        return None
    assert isinstance(last, ast.Expr)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def _shown(value: Any, count: int) -> dict[str, Any]:
    data: dict[str, Any] = {"text/plain": repr(value)}
    if hasattr(value, "to_plotly_json"):
        data = {
            "application/vnd.plotly.v1+json": json.loads(value.to_json()),
            "text/plain": "Figure",
        }
    elif hasattr(value, "_repr_html_"):
        data["text/html"] = value._repr_html_()
    return {"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data}


if __name__ == "__main__":
    path = Path(sys.argv[1])
    done = executed(json.loads(path.read_text()))
    path.write_text(json.dumps(done, indent=1) + "\n")
