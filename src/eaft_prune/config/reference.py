"""The tables of conf/README.md: groups with their options, sections with their settings.

`python -m eaft_prune.config.reference` in the repository writes them anew between their markers.
"""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from eaft_prune.config.base import Settings
from eaft_prune.config.defaults import MISSING, defaults, section_of
from eaft_prune.config.experiment import Experiment

PAGE = Path("conf", "README.md")
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def page(text: str, root: Path) -> str:
    """The page with its tables as conf/ and sweeps/ under `root` and the settings have them.

    Raises ValueError where a table's markers are missing.
    """
    for name, table in (("options", options(root)), ("settings", settings())):
        begin, end = f"<!-- {name}: generated -->\n", f"<!-- {name}: end -->"
        before, _, rest = text.partition(begin)
        old, _, after = rest.partition(end)
        if text != before + begin + old + end + after:
            raise ValueError(f"{PAGE} needs {begin.strip()} ... {end}")
        text = before + begin + table + end + after
    return text


def options(root: Path) -> str:
    """One table a group: option, and what the comment at the head of its file says."""
    groups = sorted(path for path in (root / "conf").iterdir() if path.is_dir())
    parts = []
    for folder in (*groups, root / "sweeps"):
        rows = [(f"`{file.stem}`", head(file)) for file in sorted(folder.glob("*.yaml"))]
        title = "+sweeps" if folder.name == "sweeps" else folder.name
        parts.append(_table((f"`{title}=`", "what it is"), rows))
    return "\n".join(parts)


def head(file: Path) -> str:
    """The comment that a file of conf/ begins with, as one line."""
    lines = file.read_text().removeprefix("# @package _global_\n").splitlines()
    body = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.removeprefix("#").strip() for line in lines[:body])


def settings() -> str:
    """One table a section: setting, type, default, meaning."""
    alone, parts = [], []
    for name, field in Experiment.model_fields.items():
        section = section_of(field.annotation)
        if section is None:
            alone += list(rows(Experiment, only=name))
        elif name != "task":  # the table of options says more
            about = (section.__doc__ or "").strip().splitlines()[0]
            table = _table(("setting", "type", "default", "meaning"), rows(section, f"{name}."))
            parts.append(f"### {name}\n{about}\n\n{table}")
    return "\n".join([_table(("setting", "type", "default", "meaning"), alone), *parts])


def meanings(section: type[Settings]) -> dict[str, str]:
    """Setting -> the string below it in the section's source."""
    # pydantic's use_attribute_docstrings does the same, at every start
    (source,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(source, ast.ClassDef)
    found = {}
    for line, below in pairwise(source.body):
        match line, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(ast.Constant(str(text))):
                found[name] = text
    return found


def rows(
    section: type[Settings], prefix: str = "", only: str | None = None
) -> Iterator[tuple[str, str, str, str]]:
    """Setting, type, default and meaning of each setting of a section, as Markdown."""
    schema = section.model_json_schema()
    found, meaning = defaults(section), meanings(section)
    for name in section.model_fields:
        if only not in (None, name):
            continue
        kind = _kind(schema["properties"][name], schema.get("$defs", {}))
        value = found[name]
        shown = value if isinstance(value, str) and value else json.dumps(value)
        default = "" if value == MISSING else f"`{shown}`"
        yield f"`{prefix}{name}`", kind, default, meaning.get(name, "")


def _kind(schema: Mapping[str, Any], sections: Mapping[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(_kind(one, sections) for one in schema["anyOf"])
    if "$ref" in schema:
        names = sections[schema["$ref"].rsplit("/", 1)[1]]["properties"]
        return "{" + ", ".join(names) + "}"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " ".join(f"`{value}`" for value in schema["enum"])
    match schema.get("type"):
        case "array":
            return f"list of {_kind(schema['items'], sections)}"
        case "object":
            values = schema["additionalProperties"]
            return "mapping" if values is True else f"mapping to {_kind(values, sections)}"
        case "integer" | "number" as kind:
            bounds = [f"{sign} {schema[key]:g}" for key, sign in _BOUNDS.items() if key in schema]
            return " ".join([kind, *bounds])
        case kind:
            return str(kind)


def _table(columns: tuple[str, ...], rows: Any) -> str:
    cells = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), Path()))
