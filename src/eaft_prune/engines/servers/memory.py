"""Before a server starts: is what is asked for there, and does this process hold its memory?"""

from __future__ import annotations

import sys

from eaft_prune.checkpoints.families import family_of
from eaft_prune.checkpoints.read import ModelFiles
from eaft_prune.core.types import UserError


def vocabulary(files: ModelFiles, entropy_top_k: int) -> int:
    """Size of a checkpoint's vocabulary; raises UserError where it is less than entropy_top_k."""
    vocab = int(family_of(files.config).language(files.config).get("vocab_size", 0))
    if entropy_top_k > vocab:
        raise UserError(f"eval.entropy_top_k = {entropy_top_k} exceeds the vocabulary of {vocab}")
    return vocab


def free_memory() -> None:
    """Give back what torch keeps of models that are no more: the server is another process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
