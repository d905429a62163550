"""Saved evaluations of one model: what `task=evaluate` writes and `task=compare` reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eaft_prune.checkpoints.read import read_json
from eaft_prune.core.digests import file_digest
from eaft_prune.core.foreign import check_inside, is_plain_name
from eaft_prune.core.store import load, save
from eaft_prune.core.types import Evaluation, TokenScores, UserError

_FILE = "evaluation.json"


@dataclass(frozen=True)
class _Scored:
    """What a model said of every token, and the token's conversation."""

    scores: TokenScores
    row_T: NDArray[np.int32]


def save_evaluation(directory: Path, evaluation: Evaluation) -> None:
    """Write every token's log p and H, and what they were measured on, into a new directory."""
    directory.mkdir(parents=True)
    for (pack, seq_len), scores in evaluation.scores.items():
        home = directory / pack / str(seq_len)
        home.mkdir(parents=True)
        save(home, _Scored(scores, evaluation.rows[pack, seq_len]))
    facts = {
        "model": evaluation.model,
        "checkpoint_digest": evaluation.checkpoint_digest,
        "plan_digest": evaluation.plan_digest,
        "conditions": dict(evaluation.conditions),
        "compared_with": evaluation.compared_with,
        "files": {
            str(item.relative_to(directory)): file_digest(item)
            for item in sorted(directory.rglob("*"))
            if item.is_file()
        },
        "token_digests": [[*key, sha] for key, sha in evaluation.token_digests.items()],
    }
    (directory / _FILE).write_text(json.dumps(facts, indent=1))


def load_evaluation(directory: Path) -> Evaluation:
    """Read a saved evaluation; raises UserError where it is not one or is incomplete."""
    facts = read_json(directory / _FILE)
    try:
        for name, sha in facts["files"].items():
            check_inside(directory, name)
            if file_digest(directory / name) != sha:
                raise UserError(f"{name} is not what was saved")
        for pack, _, _ in facts["token_digests"]:
            if not is_plain_name(pack):
                raise UserError(f"{pack!r} is no name of a pack")
        token_digests = {(pack, seq_len): sha for pack, seq_len, sha in facts["token_digests"]}
        found = {
            (pack, seq_len): load(directory / pack / str(seq_len), _Scored)
            for pack, seq_len in token_digests
        }
        return Evaluation(
            facts["model"],
            facts["checkpoint_digest"],
            facts["plan_digest"],
            {key: scored.scores for key, scored in found.items()},
            {key: scored.row_T for key, scored in found.items()},
            token_digests,
            facts["conditions"],
            facts.get("compared_with"),
        )
    except Exception as error:  # json, safetensors and numpy each raise their own
        raise UserError(f"{directory} is not a whole evaluation: {error}") from error
