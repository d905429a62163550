"""Numbers of a comparison come out of the store as they went in, and only for equal scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eaft_prune.config import GateSettings
from eaft_prune.core.step import Step
from eaft_prune.core.store import Store, Stored
from eaft_prune.core.types import EvalKey, Evaluation, TokenScores
from eaft_prune.maths.metrics import METRICS, Metric
from eaft_prune.pipeline.compare import Terms, measured
from eaft_prune.pipeline.figures import from_store

KEYS: tuple[EvalKey, ...] = (("a/b", 64), ("UNION", 128))
TERMS = Terms(METRICS, 0.15, 0.95)


class Stores:
    """What `from_store` asks of a session, and the steps that were computed."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root)
        self.made: list[bool] = []

    def run(self, step: Step[Any]) -> Stored[Any]:
        stored = self.store.run(step)
        self.made.append(not stored.record.cached)
        return stored


def evaluation(model: str, seed: int, rows: int = 12, kl: bool = False) -> Evaluation:
    rng = np.random.default_rng(seed)
    tokens = 240
    scores = {
        key: TokenScores(
            np.log(rng.uniform(0.01, 1, tokens)).astype(np.float32),
            rng.random(tokens).astype(np.float32),
            (np.arange(tokens) // 60).astype(np.int32),
            rng.exponential(0.1, tokens).astype(np.float32) if kl else None,
            rng.random(tokens) < 0.9 if kl else None,
        )
        for key in KEYS
    }
    of_token = np.arange(tokens, dtype=np.int32) * rows // tokens
    return Evaluation(
        model, "c" * 64, None, scores, dict.fromkeys(KEYS, of_token), dict.fromkeys(KEYS, "d"), {}
    )


def told(session: Stores, sides: list[Evaluation], terms: Terms = TERMS) -> tuple[Any, bool]:
    """What was found, and whether it was computed."""
    found = from_store(session, sides, terms)  # type: ignore[arg-type]
    return found, session.made[-1]


@pytest.mark.parametrize("rows", [12, 5])  # of 5 there are no intervals
@pytest.mark.parametrize("kl", [False, True])
def test_every_number_comes_back_to_the_bit(tmp_path: Path, rows: int, kl: bool) -> None:
    sides = [evaluation("base", 0, rows), evaluation("x", 1, rows, kl), evaluation("y", 0, rows)]
    session = Stores(tmp_path)
    fresh, made = told(session, sides)
    again, made_again = told(session, sides)
    assert (made, made_again) == (True, False)
    assert fresh == again == measured(sides, TERMS)
    report = again.reports["x"][KEYS[0]]
    assert [type(n) for n in (report.rows, report.blocks, report.scored_tokens)] == [int] * 3
    assert bool(again.changes["x"]) == (rows == 12)
    assert again.changes["y"][KEYS[0]]["dnll"].error == 0


def test_the_base_alone_comes_back(tmp_path: Path) -> None:
    assert told(Stores(tmp_path), [evaluation("base", 0)])[0] == measured(
        [evaluation("base", 0)], TERMS
    )


def moved(side: Evaluation, **arrays: Any) -> Evaluation:
    return replace(side, scores={**side.scores, KEYS[1]: replace(side.scores[KEYS[1]], **arrays)})


def test_another_token_row_or_question_is_another_comparison(tmp_path: Path) -> None:
    base, other = evaluation("base", 0), evaluation("x", 1)
    session = Stores(tmp_path)
    assert told(session, [base, other])[1]
    one = other.scores[KEYS[1]].logp_T.copy()
    one[3] = np.nextafter(one[3], np.float32(-np.inf))
    changed = [
        ([base, moved(other, logp_T=one)], TERMS),
        ([moved(base, logp_T=one), other], TERMS),
        ([base, moved(other, entropy_T=other.scores[KEYS[1]].entropy_T[::-1].copy())], TERMS),
        ([base, replace(other, rows={**other.rows, KEYS[0]: other.rows[KEYS[0]] // 2})], TERMS),
        ([base, replace(other, model="z")], TERMS),
        ([base, other], replace(TERMS, cc_quantile=0.2)),
        ([base, other], replace(TERMS, confidence=0.9)),
        ([base, other], replace(TERMS, confidence=None)),
        ([base, other], replace(TERMS, metrics=METRICS[:6])),
    ]
    for sides, terms in changed:
        assert told(session, sides, terms) == (measured(sides, terms), True)
    assert not told(session, [base, other])[1]


def test_a_metric_of_the_users_is_measured_every_time(tmp_path: Path) -> None:
    """No key knows its code."""
    own = Metric("mine", "mine", "Mine.", lambda scores: scores.entropy_T)
    gate = GateSettings(name="g", seq_lens=(64,), max_dppl=1, max_dppl_relative=1, max_dcc_rate=1,
                        max_dmean_prob=1, max_js2d=1)  # fmt: skip
    session = Stores(tmp_path)
    terms = Terms((*gate.measured, own), 0.15, 0.95)
    sides = [evaluation("base", 0), evaluation("x", 1)]
    found = from_store(session, sides, terms)  # type: ignore[arg-type]
    assert found == measured(sides, terms)
    assert session.made == []
    assert found.reports["x"][KEYS[0]].further["mine"] == pytest.approx(
        sides[1].scores[KEYS[0]].entropy_T.mean(dtype=np.float64)
    )
