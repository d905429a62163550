"""The checkpoint's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from eaft_prune.core.quiet import quiet
from eaft_prune.core.types import UserError
from eaft_prune.packs.harmony import HarmonyTokens, harmony_tokens


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

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return list(self.inner(list(texts), add_special_tokens=False)["input_ids"])


def load_tokenizer(path: Path) -> TransformersTokenizer:
    """The checkpoint's tokenizer; raises UserError where there is none, or it lacks an EOS."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            inner = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: no usable tokenizer: {first}") from None
    if inner.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token, so rows cannot be joined")
    return TransformersTokenizer(int(inner.eos_token_id), inner, path)
