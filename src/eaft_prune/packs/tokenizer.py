"""The checkpoint's own tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from eaft_prune.core.quiet import quiet
from eaft_prune.core.text import shortened
from eaft_prune.core.types import UserError
from eaft_prune.packs.harmony import HarmonyTokens, harmony_tokens

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
    def _template(self) -> str:
        """The chat template with every date it asks the clock for written out."""
        template = _CLOCK.sub(
            lambda call: repr(_DAY.strftime(call[2])), self.inner.get_chat_template()
        )
        if "strftime_now(" in template:
            raise ValueError("it asks for the date in a way that cannot be fixed to one day")
        return template

    def render(self, messages: Sequence[Mapping[str, Any]], *, answering: bool = False) -> str:
        """A conversation as text, by the checkpoint's chat template; the same text on every day.

        answering: and the beginning of the assistant's next turn. Raises UserError where there is
        no template, or it refuses the conversation.
        """
        try:
            return str(
                self.inner.apply_chat_template(
                    [dict(message) for message in messages],
                    chat_template=self._template,
                    tokenize=False,
                    add_generation_prompt=answering,
                )
            )
        except Exception as error:  # a template raises whatever its expressions do
            first = shortened(str(error) or type(error).__name__, 200)
            raise UserError(
                f"the chat template of {self.path} cannot write these messages: {first}; mend "
                "them, or give packs of text"
            ) from None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return list(self.inner(list(texts), add_special_tokens=False)["input_ids"])


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
