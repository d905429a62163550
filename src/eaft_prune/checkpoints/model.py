"""A checkpoint that was read, checked and hashed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from eaft_prune.checkpoints.families.base import Family
from eaft_prune.checkpoints.read import ModelFiles
from eaft_prune.core.digests import digest
from eaft_prune.core.types import Checkpoint, UserError


@dataclass(frozen=True)
class Hashes:
    """sha256 of every file of a checkpoint."""

    files: Mapping[str, str]


@dataclass(frozen=True)
class Model:
    """A checkpoint that has been read, checked against its family's tensor table and hashed."""

    label: str
    files: ModelFiles
    family: Family
    digest: str
    tokenizer_digest: str

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.files.path, self.digest, self.label, self.files.weight_bytes)

    @property
    def n_layers(self) -> int:
        return self.family.n_layers(self.files.config)

    @property
    def n_experts(self) -> int:
        """Experts a layer."""
        return self.family.n_experts(self.files.config)

    @property
    def language(self) -> Mapping[str, Any]:
        """What config.json says of the language model alone."""
        return self.family.language(self.files.config)

    @property
    def groups(self) -> int:
        """Groups of experts, of which a router chooses some first; 1: none."""
        return self.family.groups(self.files.config)

    @property
    def least(self) -> int:
        """The fewest experts a layer that its routers work with."""
        return self.family.least(self.files.config)

    @property
    def top_k(self) -> int:
        """Experts a token."""
        return self.family.top_k(self.files.config)


def with_top_k(model: Model, top_k: int) -> Model:
    """The model routing each token to `top_k` experts: another config.json, so another digest."""
    if top_k > model.top_k:
        raise UserError(
            f"eval.top_k = {top_k}: this model routes each token to {model.top_k} experts; give "
            f"1..{model.top_k}"
        )
    if top_k == model.top_k:
        return model
    config = model.family.with_top_k(model.files.config, top_k)
    return replace(
        model,
        files=replace(model.files, config=config),
        digest=digest({"model": model.digest, "top_k": top_k}),
    )
