"""reap-scores.yaml: what a keep plan was cut from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import model_validator

from eaft_prune.config import Settings
from eaft_prune.config.base import NonNegative, Positive
from eaft_prune.core.types import ExpertScores, UserError
from eaft_prune.records.yaml_file import read_yaml, to_yaml

_HEAD = "# Expert scores, higher = keep: task=plan scores=FILE cuts other plans from them.\n"


class LayerScores(Settings):
    """Score, positive mass (of each pack too) and selections of a layer's experts, by id."""

    layer: NonNegative
    score: tuple[float, ...]
    positive_mass: tuple[float, ...]
    pack_mass: tuple[tuple[float, ...], ...]  # one row a pack, in UNION order
    count: tuple[NonNegative, ...]


class ScoresFile(Settings):
    """reap-scores.yaml: all that a keep plan is cut from, and where it was measured."""

    format: Literal[1] = 1
    base: dict[str, str | None]  # label, digest
    criterion: str
    scoring: dict[str, Any]  # the pruning settings the scores depend on
    n_experts: Positive
    top_k: Positive
    region_tokens: dict[str, NonNegative]
    layers: tuple[LayerScores, ...]

    @model_validator(mode="after")
    def _complete(self) -> ScoresFile:
        if [item.layer for item in self.layers] != list(range(len(self.layers))):
            raise ValueError("layers must be numbered 0, 1, 2, ... in order")
        for item in self.layers:
            rows = (item.score, item.positive_mass, item.count, *item.pack_mass)
            if {len(row) for row in rows} != {self.n_experts}:
                raise ValueError(f"layer {item.layer} does not have {self.n_experts} experts")
        return self

    @property
    def scores(self) -> ExpertScores:
        """The same arrays, to the bit, as those the file was written from."""
        return ExpertScores(
            score_LE=np.array([item.score for item in self.layers], np.float64),
            positive_mass_LE=np.array([item.positive_mass for item in self.layers], np.float64),
            count_LE=np.array([item.count for item in self.layers], np.int64),
            region_tokens=self.region_tokens,
            pack_mass_PLE=np.array([item.pack_mass for item in self.layers], np.float64).transpose(
                1, 0, 2
            ),
        )


def scores_file(
    scores: ExpertScores,
    criterion: str,
    scoring: Mapping[str, Any],
    base: Mapping[str, str | None],
    top_k: int,
) -> ScoresFile:
    """The contents of reap-scores.yaml."""
    by_pack = scores.pack_mass_PLE.transpose(1, 0, 2)
    rows = zip(scores.score_LE, scores.positive_mass_LE, by_pack, scores.count_LE, strict=True)
    return ScoresFile(
        base=dict(base),
        criterion=criterion,
        scoring=dict(scoring),
        n_experts=scores.score_LE.shape[1],
        top_k=top_k,
        region_tokens=dict(scores.region_tokens),
        layers=tuple(
            LayerScores(
                layer=layer,
                score=tuple(score.tolist()),
                positive_mass=tuple(positive.tolist()),
                pack_mass=tuple(map(tuple, packs.tolist())),
                count=tuple(count.tolist()),
            )
            for layer, (score, positive, packs, count) in enumerate(rows)
        ),
    )


def scores_text(file: ScoresFile) -> str:
    """The file as it is written."""
    return to_yaml(_HEAD, file)


def read_scores(path: Path) -> ScoresFile:
    """Read a scores file; raises UserError naming file, key and value."""
    return read_yaml(path, ScoresFile, "scores")


def check_scores(file: ScoresFile, scoring: Mapping[str, Any], base_digest: str) -> None:
    """Raise UserError unless profiling this base with these settings would give these scores."""
    if file.base["digest"] != base_digest:
        raise UserError(
            f"scores were measured on a checkpoint with digest {file.base['digest']}, the base has "
            f"{base_digest}: profile it (scores=null), or cut the plan alone with task=plan"
        )
    other = {k: v for k, v in file.scoring.items() if scoring.get(k) != v}
    if other or set(file.scoring) != set(scoring):
        wanted = " ".join(f"pruning.{name}={value}" for name, value in other.items())
        raise UserError(
            f"the scores were made with other settings than these: give {wanted}, or scores=null"
        )
