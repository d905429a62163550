"""The tools that a harmony conversation declares, and whether a call's arguments fit one.

Harmony declares them as TypeScript, not as JSON schemas: `type find = (_: {where: string}) => any;`
within `namespace functions {`. What is read of it is what its template writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_MESSAGE = re.compile(r"<\|start\|>(?:developer|system)[^<]*<\|message\|>(.*?)<\|end\|>", re.S)
_PLACE = re.compile(r"namespace\s+(\w+)\s*\{|^\s*type\s+([\w-]+)\s*=\s*\(", re.M)
_TOKEN = re.compile(r"""\s+|//[^\n]*|("(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?|[\w$-]+|=>|[^\s])""")
_PLAIN: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
    "object": (dict,),
    "any": (object,),
}


@dataclass(frozen=True)
class Kind:
    """A type: one of literals, a name, an object's fields, items of a list, or any of several."""

    name: str  # of _PLAIN, or "literal", "fields", "list", "several"
    literal: Any = None
    fields: Mapping[str, tuple[bool, Kind]] = field(default_factory=dict)  # required, its type
    parts: tuple[Kind, ...] = ()

    def takes(self, value: Any) -> bool:
        """Whether a JSON value is of this type."""
        if self.name == "several":
            return any(part.takes(value) for part in self.parts)
        if self.name == "literal":
            return bool(value == self.literal)
        if self.name == "list":
            return isinstance(value, list) and all(map(self.parts[0].takes, value))
        if self.name == "fields":
            return (
                isinstance(value, dict)
                and value.keys() <= self.fields.keys()
                and all(not must or name in value for name, (must, _) in self.fields.items())
                and all(self.fields[name][1].takes(part) for name, part in value.items())
            )
        if isinstance(value, bool) and self.name in ("number", "integer"):
            return False
        return isinstance(value, _PLAIN[self.name])


Tools = Mapping[str, Kind]  # functions.find -> what its arguments are


def declared(conversation: str) -> Tools:
    """Every tool that developer or system declare, by its recipient.

    Of one whose declaration is not understood, any arguments are fine.
    """
    found: dict[str, Kind] = {}
    for message in _MESSAGE.findall(conversation):
        space = ""
        for place in _PLACE.finditer(message):
            if place[1]:
                space = place[1]
            elif space:
                found[f"{space}.{place[2]}"] = _arguments(message[place.end() :])
    return found


def fits(tools: Tools, recipient: str, content: str) -> bool:
    """Whether a call is of a declared tool, with JSON that its type takes; of none, any JSON."""
    try:
        value = json.loads(content)
    except ValueError:
        return False
    if not tools:
        return True
    return recipient in tools and tools[recipient].takes(value)


def _arguments(text: str) -> Kind:
    tokens = [token for token in _TOKEN.findall(text.split("=>")[0]) if token]
    if tokens[:1] == [")"]:
        return Kind("several", parts=(Kind("fields"), Kind("null")))
    try:
        if tokens[:2] != ["_", ":"]:
            return Kind("any")
        kind, rest = _type(tokens[2:])
    except (IndexError, ValueError):
        return Kind("any")
    return kind if rest[:1] == [")"] else Kind("any")


def _type(tokens: list[str]) -> tuple[Kind, list[str]]:
    """The type that begins here, and what stands behind; ValueError where there is none."""
    parts = []
    while True:
        part, tokens = _one(tokens)
        while tokens[:2] == ["[", "]"]:
            part, tokens = Kind("list", parts=(part,)), tokens[2:]
        parts.append(part)
        if tokens[:1] != ["|"]:
            return _several(parts), tokens
        tokens = tokens[1:]


def _several(parts: list[Kind]) -> Kind:
    if len(parts) == 1:
        return parts[0]
    *before, last = parts
    if last.name == "list" and all(part.name == "literal" for part in before):
        # templates write a list of choices without parentheses: "a" | "b"[]
        parts.append(Kind("list", parts=(Kind("several", parts=(*before, *last.parts)),)))
    return Kind("several", parts=tuple(parts))


def _one(tokens: list[str]) -> tuple[Kind, list[str]]:
    first, rest = tokens[0], tokens[1:]
    if first == "{":
        return _fields(rest)
    if first == "(":
        kind, rest = _type(rest)
        if rest[0] != ")":
            raise ValueError(rest[0])
        return kind, rest[1:]
    if first in _PLAIN:
        return Kind(first), rest
    return Kind("literal", json.loads(first)), rest  # ValueError: a name that nobody knows


def _fields(tokens: list[str]) -> tuple[Kind, list[str]]:
    fields = {}
    while tokens[0] != "}":
        name, tokens = tokens[0].strip('"'), tokens[1:]
        optional = tokens[0] == "?"
        tokens = tokens[optional:]
        if tokens[0] != ":":
            raise ValueError(tokens[0])
        kind, tokens = _type(tokens[1:])
        fields[name] = (not optional, kind)
        if tokens[0] in (",", ";"):
            tokens = tokens[1:]
    return Kind("fields", fields=fields), tokens[1:]
