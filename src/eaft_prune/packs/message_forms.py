"""Messages in the forms that chat templates take: whose roles, which fields, which arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from eaft_prune.packs.conversations import arguments_of
from eaft_prune.packs.rows import Message

_REASONING = ("reasoning_content", "thinking", "reasoning")  # the usual name first
Messages = list[dict[str, Any]]


def forms(template: str, messages: Sequence[Message]) -> Iterator[Messages]:
    """Forms to try on a template, one after the other.

    Arguments of calls are objects, as transformers has them, or else texts; what the system says is
    a message of its own, or else begins the first user's.
    """
    objects = _named(template, _with_arguments(messages, arguments_of))
    texts = _with_arguments(objects, _as_text)
    yield from (objects, texts, _without_system(objects), _without_system(texts))


def replaced(message: dict[str, Any], other: str) -> dict[str, Any]:
    """The message with another text for its words, thoughts and arguments, where it has any."""

    def words(value: Any) -> Any:
        if isinstance(value, str):
            return other if value else value
        if isinstance(value, dict):  # a part of the content
            return {**value, "text": words(value["text"])} if "text" in value else value
        return [words(item) for item in value] if isinstance(value, list) else value

    own = {
        key: words(value) if key in ("content", *_REASONING) else value
        for key, value in message.items()
    }
    (changed,) = _with_arguments(
        [own], lambda value: other if isinstance(value, str) else {other: other}
    )
    return changed


def _named(template: str, messages: Sequence[Message]) -> Messages:
    """With the roles and fields that the template reads.

    Developers are the system where it has none, and go on with what that said. Where it has no
    calls they are content, a line of JSON each, and tools are users.
    """
    read = (name for name in _REASONING if re.search(rf"\b{name}\b", template))
    reasoning = next(read, _REASONING[0])
    found: Messages = []
    for message in messages:
        own = dict(message)
        if own["role"] == "developer" and "developer" not in template:
            own["role"] = "system"
            if found and found[-1]["role"] == "system":
                own["content"] = f"{found.pop()['content']}\n\n{own['content']}"
        if "tool_calls" not in template:
            own = _without_calls(own)
        if thoughts := [own.pop(name) for name in _REASONING if name in own]:
            own[reasoning] = thoughts[0]
        found.append(own)
    return found


def _without_calls(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls") or []
    lines = [json.dumps(call.get("function", call), ensure_ascii=False) for call in calls]
    content = [message.get("content"), *lines]
    own = {key: value for key, value in message.items() if key != "tool_calls"}
    if lines:
        own["content"] = "\n".join(part for part in content if part)
    return {**own, "role": "user" if own["role"] == "tool" else own["role"]}


def _without_system(messages: Messages) -> Messages:
    first, *others = messages
    if first["role"] != "system" or not others or others[0]["role"] != "user":
        return messages
    content = f"{first['content']}\n\n{others[0]['content']}"
    return [{**others[0], "content": content}, *others[1:]]


def _with_arguments(messages: Sequence[Message], form: Callable[[Any], Any]) -> Messages:
    """With the arguments of every call in another form."""

    def changed(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return {**call, "function": changed(call["function"])}
        return {**call, "arguments": form(call["arguments"])} if "arguments" in call else call

    return [
        {**message, "tool_calls": [changed(call) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list)
        else dict(message)
        for message in messages
    ]


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
