"""The checkpoint's own tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eaft_prune.core.quiet import quiet
from eaft_prune.core.text import shortened
from eaft_prune.core.types import Spans, UserError
from eaft_prune.packs.harmony import REQUIRED, HarmonyTokens, harmony_tokens
from eaft_prune.packs.rows import Tools

_CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_DAY = date(2025, 8, 5)  # what templates that ask for the date are told: text must not change daily


@dataclass(frozen=True)
class TransformersTokenizer:
    """The checkpoint's tokenizer, adding nothing of its own."""

    eos: int
    inner: Any
    path: Path

    @cached_property
    def harmony(self) -> HarmonyTokens:
        """Its delimiters; raises UserError where it lacks them."""
        added = {str(token): ident for ident, token in self.inner.added_tokens_decoder.items()}
        return harmony_tokens(added, self.inner.decode, str(self.path))

    @cached_property
    def speaks_harmony(self) -> bool:
        """Whether it has the delimiters."""
        added = {str(token) for token in self.inner.added_tokens_decoder.values()}
        return added.issuperset(REQUIRED)

    @cached_property
    def template(self) -> str:
        """The chat template with every date it asks the clock for written out.

        Raises UserError where there is none, or it asks in a way that cannot be fixed to one day.
        """
        try:
            template = _CLOCK.sub(
                lambda call: repr(_DAY.strftime(call[2])), self.inner.get_chat_template()
            )
        except ValueError as error:  # there is none
            raise self._refused(error) from None
        if "strftime_now(" in template:
            raise self._refused("it asks for the date in a way that cannot be fixed to one day")
        return template

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Tools = None,
        *,
        answering: bool = False,
    ) -> str:
        """A conversation as text, by the checkpoint's chat template; the same text on every day.

        answering: and the beginning of the assistant's next turn. Raises UserError where there is
        no template, or it refuses the conversation.
        """
        return self.write(messages, tools, answering=answering)[0]

    @cached_property
    def turn_begins(self) -> tuple[str, str]:
        """What the template ends a question with to be answered, and an answer's text begins with.

        They differ where the model writes more than the answer: a channel of harmony, a thought.
        Raises UserError where the template writes the question otherwise once it is answered.
        """
        asked = [{"role": "user", "content": "Q"}]
        before, open_ = self.render(asked), self.render(asked, answering=True)
        whole = self.render([*asked, {"role": "assistant", "content": "ANSWER"}])
        head, found, _ = whole.removeprefix(before).partition("ANSWER")
        if not (whole.startswith(before) and open_.startswith(before) and found):
            raise self._refused("it writes a question otherwise once it is answered")
        return open_.removeprefix(before), head

    def write(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Tools,
        *,
        marked: bool = False,
        answering: bool = False,
    ) -> tuple[str, Spans]:
        """As `render`, with what of the text the template marks as generated, if asked for."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.template
        try:
            (text,), spans = render_jinja_template(
                [[dict(message) for message in messages]],
                tools=None if tools is None else list(tools),
                chat_template=template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=answering,
                **self.inner.special_tokens_map,
            )
        except Exception as error:  # a template raises whatever its expressions do
            raise self._refused(error) from None
        return text, tuple(spans[0]) if marked else ()

    def _refused(self, why: Exception | str) -> UserError:
        first = shortened(str(why) or type(why).__name__, 200)
        return UserError(
            f"the chat template of {self.path} cannot write these messages: {first}; mend them, or "
            "give packs of text"
        )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return list(self.inner(list(texts), add_special_tokens=False)["input_ids"])

    def scored(self, text: str, spans: Spans) -> NDArray[np.bool_]:
        """Which tokens of a text hold a character of the spans and are no special tokens.

        Raises UserError for a tokenizer that cannot tell which characters a token holds.
        """
        if not self.inner.is_fast:
            raise UserError(
                f"{self.path}: this tokenizer (no tokenizer.json) cannot tell where in a text a "
                "token is, which packs.format=messages needs: use packs.format=plain"
            )
        found = self.inner(text, add_special_tokens=False, return_offsets_mapping=True)
        begins, ends = np.array(found["offset_mapping"], np.int64).reshape(-1, 2).T
        inside = np.zeros(len(begins), bool)
        for begin, end in spans:
            inside |= (begins < end) & (ends > begin)
        added = self.inner.added_tokens_decoder.items()
        special = [ident for ident, token in added if token.special]
        return inside & ~np.isin(found["input_ids"], special)


def load_tokenizer(path: Path) -> TransformersTokenizer:
    """The checkpoint's tokenizer; raises UserError where there is none, or it lacks an EOS."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            inner = AutoTokenizer.from_pretrained(
                path,
                local_files_only=True,
                trust_remote_code=False,  # left out, transformers asks, and `yes |` answers
            )
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: no usable tokenizer: {first}") from None
    if inner.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token, so rows cannot be joined")
    return TransformersTokenizer(int(inner.eos_token_id), inner, path)
