"""Conversations written by a model's own chat template, and what of the text an assistant said."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

from eaft_prune.core.types import Spans, UserError
from eaft_prune.packs.conversations import messages_of
from eaft_prune.packs.message_forms import Messages, forms, replaced
from eaft_prune.packs.pack_file import PackFile
from eaft_prune.packs.rows import Message, Tools, read_rows, read_texts, read_tools
from eaft_prune.packs.tokenizer import TransformersTokenizer

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PRIVATE = range(0xE000, 0xF900)  # characters that nobody writes


def written(
    file: PackFile, form: str, tokenizer: Callable[[], TransformersTokenizer]
) -> Iterator[tuple[str, Spans | None]]:
    """The rows as text, with what of it the assistant said where that text is no harmony.

    form: packs.format. With messages the model's chat template writes lists of messages and harmony
    text; a model that speaks harmony gets that as it is, and what it says is read from its text.
    """
    if form != "messages":
        texts = read_texts(file, lambda row: tokenizer().render(row))
        yield from ((text, None) for text in texts)
        return
    harmony = tokenizer().speaks_harmony
    for index, (row, tools) in enumerate(zip(read_rows(file), read_tools(file), strict=True)):
        try:
            if isinstance(row, str) and harmony:
                yield row, None
                continue
            messages = messages_of(row) if isinstance(row, str) else row
            if harmony:
                yield _rendered(tokenizer(), messages, tools)[1], None
            else:
                yield said(tokenizer(), messages, tools)
        except UserError as error:
            raise file.error(f"row {index}: {error}") from None


def said(
    tokenizer: TransformersTokenizer, messages: Sequence[Message], tools: Tools = None
) -> tuple[str, Spans]:
    """A conversation as text, and what of it the assistant said.

    That is what the template marks as generated; without marks, per message what changes in the
    text when the words of the message do: the row is written once more for each, with another
    character in their place. Raises UserError where the template refuses the conversation.
    """
    fitted, text = _rendered(tokenizer, messages, tools)
    if _MARKS.search(tokenizer.template):
        return tokenizer.write(fitted, tools, marked=True)
    other = next(chr(code) for code in _PRIVATE if chr(code) not in text)
    spans = []
    for index, message in enumerate(fitted):
        if message["role"] == "assistant":
            changed = [*fitted[:index], replaced(message, other), *fitted[index + 1 :]]
            spans.append(_difference(text, tokenizer.render(changed, tools)))
    return text, tuple(span for span in spans if span[0] < span[1])


def _rendered(
    tokenizer: TransformersTokenizer, messages: Sequence[Message], tools: Tools
) -> tuple[Messages, str]:
    """Messages in the first form that the template takes, and their text."""
    refused = None
    for form in forms(tokenizer.template, messages):
        try:
            return form, tokenizer.render(form, tools)
        except UserError as error:
            refused = refused or error
    assert refused is not None, "there is at least one form"
    raise refused


def _difference(text: str, changed: str) -> tuple[int, int]:
    """Begin and end of what two texts do not share at their ends, in the first of them."""
    begin = _shared(text, changed)
    return begin, len(text) - _shared(text[begin:][::-1], changed[begin:][::-1])


def _shared(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
