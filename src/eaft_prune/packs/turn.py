"""Whether what a model wrote is a well-formed harmony turn."""

from __future__ import annotations

import re
from collections.abc import Mapping

from eaft_prune.packs.tools import Kind, Tools, fits

CHANNELS = ("analysis", "commentary", "final")
_CLOSING = re.compile(r"<\|(end|call|return)\|>")
_HEADER = re.compile(
    r"(?P<to>\s+to=\S+?)?<\|channel\|>(?P<channel>[a-z]+)(?P<to_too>\s+to=\S+?)?"
    r"\s*(?:<\|constrain\|>\s*\w+|json|code)?\s*"
)
_NEXT = "<|start|>assistant"


def is_well_formed(written: str, ended: bool, tools: Mapping[str, Kind] = {}) -> bool:
    """Whether what stands behind `<|start|>assistant` is a sequence of messages as in harmony.

    Each names a channel of the three, its content holds no header token, and it is closed; behind
    `<|call|>` stands a recipient and JSON, of a declared tool and as it is declared if any are;
    after `<|call|>` and `<|return|>` there is nothing. What is cut off by the limit (ended false)
    must be well-formed up to there.
    """
    rest = written
    while True:
        head, separator, body = rest.partition("<|message|>")
        if not separator:
            return not ended and _may_become_header(head)
        header = _HEADER.fullmatch(head)
        if header is None or header["channel"] not in CHANNELS:
            return False
        closing = _CLOSING.search(body)
        content = body if closing is None else body[: closing.start()]
        if any(token in content for token in ("<|start|>", "<|message|>", "<|channel|>")):
            return False
        if closing is None:
            return not ended
        rest = body[closing.end() :]
        if closing[1] == "call" and not _is_call(header, content, tools):
            return False
        if closing[1] != "end":
            return not rest
        if not rest:
            return True
        if not rest.startswith(_NEXT):
            return not ended and _NEXT.startswith(rest)
        rest = rest[len(_NEXT) :]


def _may_become_header(head: str) -> bool:
    """Whether a header that was cut off is one so far."""
    before, token, after = head.partition("<|channel|>")
    if not token:
        recipient = before.lstrip()
        return "to=".startswith(recipient[:3])
    name = after.split(" ")[0].split("<")[0]
    return any(channel.startswith(name) for channel in CHANNELS)


def _is_call(header: re.Match[str], content: str, tools: Tools) -> bool:
    recipient = header["to"] or header["to_too"]
    return recipient is not None and fits(tools, recipient.strip().removeprefix("to="), content)
