"""The checkpoint's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eaft_prune.engines.quiet import quiet
from eaft_prune.harmony import HarmonyTokens, harmony_tokens
from eaft_prune.types import UserError


@dataclass(frozen=True)
class TransformersTokenizer:
    """The checkpoint's tokenizer, adding nothing of its own."""

    harmony: HarmonyTokens
    eos: int
    inner: Any

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return list(self.inner(list(texts), add_special_tokens=False)["input_ids"])


def load_tokenizer(path: Path) -> TransformersTokenizer:
    """The checkpoint's tokenizer; raises UserError where it lacks harmony tokens or an EOS."""
    from transformers import AutoTokenizer

    try:
        with quiet():
            inner = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: no usable tokenizer: {first}") from None
    if inner.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token, so rows cannot be joined")
    added = {str(token): ident for ident, token in inner.added_tokens_decoder.items()}
    return TransformersTokenizer(
        harmony=harmony_tokens(added, inner.decode, str(path)),
        eos=int(inner.eos_token_id),
        inner=inner,
    )
