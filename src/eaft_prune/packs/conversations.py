"""Harmony text as messages with the fields that chat templates of other models read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eaft_prune.core.types import UserError
from eaft_prune.packs.rows import Message

_MESSAGE = re.compile(
    r"<\|start\|>(?P<header>(?:(?!<\|(?:start|message|end|call|return)\|>).)*)<\|message\|>"
    r"(?P<content>(?:(?!<\|(?:start|message)\|>).)*?)(?P<end><\|(?:end|call|return)\|>|\Z)\s*",
    re.DOTALL,
)
_HEADER = re.compile(
    r"(?P<role>[^\s<]+)(?:\s+to=(?P<to>[^\s<]+))?"
    r"(?:<\|channel\|>(?P<channel>[^\s<]+)(?:\s+to=(?P<to_too>[^\s<]+))?)?"
    r"\s*(?:<\|constrain\|>)?\s*\w*\s*"
)
_FUNCTIONS = "functions."
_ORDER = ("reasoning_content", "content", "tool_calls")  # as templates write them


@dataclass(frozen=True)
class _Part:
    """One harmony message."""

    role: str
    to: str | None
    channel: str | None
    content: str


def messages_of(text: str) -> list[Message]:
    """A row of harmony text as messages; raises UserError where it is none.

    What an assistant wrote between two others is one message: analysis is its `reasoning_content`,
    a message to somebody one of its `tool_calls`, all else its `content`. Tools that answer have
    the role `tool`.
    """
    found: list[dict[str, Any]] = []
    waiting: list[dict[str, Any]] = []  # calls that no tool has answered
    calls = 0
    for part in _parts(text):
        if part.role == "assistant":
            if part.to is not None:
                call = _call(part, calls)
                waiting.append(call)
                calls += 1
                _turn(found, "tool_calls").setdefault("tool_calls", []).append(call)
            else:
                key = "reasoning_content" if part.channel == "analysis" else "content"
                message = _turn(found, key)
                before = f"{message[key]}\n\n" if key in message else ""
                message[key] = before + part.content
        elif part.role in ("user", "system", "developer"):
            found.append({"role": part.role, "content": part.content})
        else:
            answered = {"tool_call_id": waiting.pop(0)["id"]} if waiting else {}
            name = part.role.removeprefix(_FUNCTIONS)
            found.append({"role": "tool", "name": name, "content": part.content, **answered})
    for message in found:
        if message["role"] == "assistant":
            message.setdefault("content", "")
    return list(found)


def _parts(text: str) -> Sequence[_Part]:
    parts, at = [], len(text) - len(text.lstrip())
    while at < len(text):
        message = _MESSAGE.match(text, at)
        header = message and _HEADER.fullmatch(message["header"])
        if not message and text.startswith("<|start|>", at) and "<|" not in text[at + 9 :]:
            break  # the row is cut in its last header
        if not message or not header:
            raise UserError(
                f"no harmony message at character {at}: {text[at : at + 60]!r}; packs.format="
                "messages reads texts as harmony, packs.format=plain as they are"
            )
        to = header["to"] or header["to_too"]
        parts.append(_Part(header["role"], to, header["channel"], message["content"]))
        at = message.end()
    return parts


def _turn(found: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """The assistant's message that this goes into: the last, unless that has gone beyond it."""
    last = found[-1] if found else None
    beyond = _ORDER[_ORDER.index(key) + 1 :]
    if last is None or last["role"] != "assistant" or any(later in last for later in beyond):
        found.append({"role": "assistant"})
    return found[-1]


def _call(part: _Part, number: int) -> dict[str, Any]:
    """With an id of nine characters: Mistral's templates refuse others."""
    assert part.to is not None
    name = part.to.removeprefix(_FUNCTIONS)
    function = {"name": name, "arguments": arguments_of(part.content)}
    return {"id": f"call{number:05d}", "type": "function", "function": function}


def arguments_of(text: Any) -> Any:
    """Arguments of a call as templates read them: an object, where a text is one."""
    if not isinstance(text, str):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
