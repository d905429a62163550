"""KL over likeliest tokens against whole distributions, and quantiles over conversations."""

from __future__ import annotations

import numpy as np
import pytest

from eaft_prune.core.types import Likeliest, TokenScores
from eaft_prune.maths.intervals import changes, of_influence
from eaft_prune.maths.kl import kl_of_classes, kl_of_told, quantile, rest_of, rms_dp, top1_flips
from eaft_prune.maths.metrics import DIVERGENCE, METRICS, distances, pack_report

TOKENS, VOCAB = 60, 50


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def two(peak: float, change: float) -> tuple[np.ndarray, np.ndarray]:
    """ln p of a base and of another model, [T, V]; peak: how sure they are."""
    rng = np.random.default_rng(int(10 * peak))
    logits = rng.normal(0, peak, (TOKENS, VOCAB))
    return log_softmax(logits), log_softmax(logits + rng.normal(0, change, (TOKENS, VOCAB)))


def kept(logp: np.ndarray, k: int) -> Likeliest:
    ids = np.argsort(-logp, axis=1)[:, :k]
    top = np.take_along_axis(logp, ids, axis=1).astype(np.float32)
    return Likeliest(ids.astype(np.int32), top.astype(np.float16), rest_of(top))


def asked(logp: np.ndarray, base: Likeliest) -> np.ndarray:
    return np.take_along_axis(logp, base.ids_TK.astype(np.int64), axis=1).astype(np.float32)


@pytest.mark.parametrize("peak", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("change", [0.03, 0.3, 2.0])
@pytest.mark.parametrize("k", [1, 5, 64])
def test_kl_is_that_of_the_merged_classes(peak: float, change: float, k: int) -> None:
    logp, logq = two(peak, change)
    base = kept(logp, min(k, VOCAB))
    found = kl_of_classes(base, asked(logq, base))
    for t in range(TOKENS):
        listed = base.ids_TK[t].tolist()
        p, q = ([np.exp(x[t, i]) for i in listed] for x in (logp, logq))
        p, q = ([*x, max(1 - sum(x), 1e-6)] for x in (p, q))
        merged = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))
        whole = float(np.sum(np.exp(logp[t]) * (logp[t] - logq[t])))
        rounding = 0.001 * np.sqrt(2 * whole) + 2e-6
        assert abs(found[t] - merged) <= rounding
        assert found[t] <= whole + rounding


def test_equal_models_are_0_apart_to_the_last_bit() -> None:
    logp, _ = two(3.0, 0.0)
    for k in (1, 20, VOCAB):
        base = kept(logp, k)
        assert not kl_of_classes(base, asked(logp, base)).any()
        assert not kl_of_told(base, *told(logp, base)).any()


def told(logq: np.ndarray, base: Likeliest) -> tuple[np.ndarray, np.ndarray]:
    """What a candidate says of the base's tokens that tells as many likeliest ones of its own."""
    least = np.sort(logq, axis=1)[:, -base.ids_TK.shape[1]]
    logp = asked(logq, base)
    return np.where(logp >= least.astype(np.float32)[:, None], logp, np.nan), least


@pytest.mark.parametrize("peak", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("change", [0.03, 0.3, 2.0, 9.0])
@pytest.mark.parametrize("k", [1, 5, 20, 64])
def test_kl_to_what_is_told_lies_between_what_is_sure_and_what_is(
    peak: float, change: float, k: int
) -> None:
    """At least as if all that is not told were one class, at most as if everything were told."""
    logp, logq = two(peak, change)
    base = kept(logp, min(k, VOCAB))
    (of_told, least), exact = told(logq, base), kl_of_classes(base, asked(logq, base))
    found, all_told = kl_of_told(base, of_told, least), ~np.isnan(of_told).any(axis=1)
    np.testing.assert_allclose(found[all_told], exact[all_told], rtol=1e-6)
    for t in np.flatnonzero(~all_told):
        listed = base.ids_TK[t][~np.isnan(of_told[t])].tolist()
        p, q = (np.exp(x[t, listed]).tolist() for x in (logp, logq))
        p, q = ([*x, max(1 - sum(x), 1e-6)] for x in (p, q))
        merged = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))
        rounding = 0.001 * np.sqrt(2 * max(exact[t], merged)) + 1e-5
        assert merged - rounding <= found[t] <= exact[t] + rounding


def test_a_likely_token_that_is_not_told_is_no_likelier_than_the_least_told() -> None:
    """Though much of the candidate's mass is not told either."""
    logq = np.log(np.array([[1e-4, 0.3, *[0.6999 / 48] * 48]]))
    logp = np.log(np.array([[0.9, *[0.1 / 49] * 49]]))
    base = kept(logp, 2)
    of_told, least = told(logq, base)
    assert np.isnan(of_told[0, 0])
    found = float(kl_of_told(base, of_told, least)[0])
    assert found >= 0.9 * np.log(0.9 / np.exp(least[0])) + 0.1 * np.log(0.1) - 0.01
    assert found > 2 * 0.9 * np.log(0.9 / (1 - np.exp(logq[0, 1])))  # as one class with the rest


def some_scores(
    seed: int, rows: int = 40, each: int = 5
) -> tuple[TokenScores, TokenScores, np.ndarray]:
    rng = np.random.default_rng(seed)
    row = np.repeat(np.arange(rows), each)
    logp = [np.log(rng.random(rows * each)).astype(np.float32) for _ in range(2)]
    base, other = (
        TokenScores(x, np.full(len(row), 0.5, np.float32), row.astype(np.int32)) for x in logp
    )
    heavy = np.exp(rng.normal(0, 1, rows))[row] * rng.exponential(size=len(row))
    same = rng.random(len(row)) < 0.9
    return (
        base,
        TokenScores(other.logp_T, other.entropy_T, other.block_T, heavy.astype(np.float32), same),
        row,
    )


def test_every_number_of_the_table_by_hand() -> None:
    base, other, row = some_scores(1)
    report = pack_report(other, base, 0.15, row_T=row)
    kl = sorted(other.kl_T.tolist())
    by_hand = {
        "kl_mean": sum(kl) / 200,
        "kl_max": kl[-1],
        "top1_flips": 1 - sum(other.same_top_T) / 200,
    }
    by_hand |= {
        f"kl_p{n}": kl[at]
        for n, at in {"50": 99, "90": 179, "95": 189, "99": 197, "999": 199}.items()
    }
    by_hand["rms_dp"] = float(np.sqrt(np.mean((other.p_T - base.p_T) ** 2)))
    for name, value in by_hand.items():
        assert report[name] == pytest.approx(value), name
    assert {metric.name for metric in DIVERGENCE} == set(by_hand)
    found = changes(base, other, row, 0.15, confidence=0.95)
    assert found is not None
    for name in set(by_hand) - {"kl_max"}:
        assert found[name].low <= report[name] <= found[name].high
    assert found.get("kl_max") is None


def test_what_was_not_measured_is_nowhere() -> None:
    base, other, row = some_scores(2)
    alone = TokenScores(other.logp_T, other.entropy_T, other.block_T)
    assert set(distances(base, alone, row)) == {"js2d", "rms_dp"}
    found = changes(base, alone, row, 0.15, confidence=0.95)
    assert found is not None
    assert found.get("kl_mean") is None
    with pytest.raises(KeyError):
        _ = pack_report(alone, base, 0.15, row_T=row)["kl_mean"]
    itself = pack_report(base, base, 0.15, row_T=row)
    assert not {metric.name for metric in DIVERGENCE} & set(itself.further)


@pytest.mark.parametrize("of", [rms_dp, top1_flips])
def test_influence_is_that_of_leaving_a_row_out(of: object) -> None:
    base, other, row = some_scores(3, rows=200)

    def without(i: int) -> float:
        keep = row != i
        some = (
            TokenScores(*(None if a is None else a[keep] for a in vars(s).values()))  # type: ignore[arg-type]
            for s in (base, other)
        )
        return of(*some, row[keep]).value  # type: ignore[operator, no-any-return]

    apart = of(base, other, row)  # type: ignore[operator]
    jackknife = [199 * (apart.value - without(i)) for i in range(200)]
    np.testing.assert_allclose(apart.influence_n, jackknife, atol=0.02 * np.abs(jackknife).max())


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_bounds_of_a_quantile_hold_the_truth(share: float) -> None:
    """Tokens of a conversation share their scale: 400 conversations of 20 tokens, 200 draws."""
    rng = np.random.default_rng(7)
    row = np.repeat(np.arange(400), 20)

    def draw(rows: int) -> np.ndarray:
        return np.repeat(np.exp(rng.normal(0, 1, rows)), 20) * rng.exponential(size=rows * 20)

    truth = np.quantile(draw(100_000), share)
    missed = np.zeros(2)
    for _ in range(200):
        apart = quantile(draw(400), share, row)
        found = of_influence(apart.value, apart.influence_n, 0.95)
        missed += [found.high < truth, found.low > truth]
    assert (missed <= 200 * 0.09).all()  # 5% is promised, and 3 errors of 200 draws


def test_every_metric_has_a_name_of_its_own() -> None:
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
