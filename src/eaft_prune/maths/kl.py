"""KL of the base to a candidate, token by token and over all of them, and what is told beside it.

Of the base's K likeliest tokens each is a class, and all others together are one. Merging tokens
into classes can only lower a KL divergence (data processing inequality; Cover and Thomas, Elements
of Information Theory, 2006, section 2.8), so each number is a lower bound of that over the whole
vocabulary, and equal to it where no token was merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from eaft_prune.core.types import Likeliest, TokenScores
from eaft_prune.maths.divergence import Apart
from eaft_prune.maths.influence import Ints, Values, of_mean

# what single precision leaves of 1 - sum p: less is counted as this much, of either model
LEAST_REST = 1e-6


def rest_of(logp_TK: NDArray[np.float32]) -> NDArray[np.float16]:
    """ln of the probability that the given tokens leave, [T]; at least ln 1e-6."""
    left = 1 - np.exp(logp_TK.astype(np.float64)).sum(axis=1)
    return np.asarray(np.log(np.maximum(left, LEAST_REST)), np.float16)


def kl_of_classes(base: Likeliest, logp_TK: NDArray[np.float32]) -> NDArray[np.float32]:
    """sum over classes P ln(P / Q), in nats, >= 0, 0 if equal; [T].

    logp_TK: the candidate's ln p of the base's likeliest tokens. Both models' ln p are rounded to
    half precision (relative error 2^-11) and both sets of classes made to sum to 1, so rounding
    moves a token's KL by less than 0.001 sqrt(2 KL) + 2e-6, either way, which averages out.
    """
    ln_p, ln_q = _classes(base.logp_TK, base.rest_T), _classes(logp_TK, rest_of(logp_TK))
    kl = np.sum(np.exp(ln_p) * (ln_p - ln_q), axis=1)
    return np.asarray(np.maximum(kl, 0.0), np.float32)


def kl_of_told(
    base: Likeliest, logp_TK: NDArray[np.floating], least_T: NDArray[np.floating]
) -> NDArray[np.float32]:
    """The same of a candidate that tells its own likeliest tokens alone, [T].

    logp_TK is NaN where it does not tell; such a token is no likelier than ln p = least_T. Of all
    that it may make of those and of the rest, what is nearest to the base is taken: in proportion
    to the base, but for tokens that would be likelier than least_T, which are as likely as that. So
    this is a lower bound of `kl_of_classes`, and equal to it where all are told.
    """
    ln_p = _classes(base.logp_TK, base.rest_T)
    known_TK = np.where(np.isnan(logp_TK), -np.inf, logp_TK).astype(np.float32)
    ln_q = _classes(known_TK, rest_of(known_TK))
    untold = np.column_stack([np.isnan(logp_TK), np.ones(len(logp_TK), bool)])
    p, left_T1, most_T1 = np.exp(ln_p), np.exp(ln_q[:, -1:]), least_T.astype(np.float64)[:, None]
    share_T1 = np.log(left_T1) - np.log((p * untold).sum(axis=1, keepdims=True))
    capped = untold & (ln_p + share_T1 > most_T1)
    capped[:, -1] = False  # the rest is many tokens
    free = untold & ~capped
    left_T1 -= np.exp(most_T1) * capped.sum(axis=1, keepdims=True)
    share_T1 = np.log(left_T1) - np.log((p * free).sum(axis=1, keepdims=True))
    ln_q = np.where(free, ln_p + share_T1, np.where(capped, most_T1, ln_q))
    kl = np.sum(p * (ln_p - ln_q), axis=1)
    return np.asarray(np.maximum(kl, 0.0), np.float32)


def _classes(logp_TK: NDArray[np.floating], rest_T: NDArray[np.float16]) -> Values:
    """ln p of each class, of which the last is the rest, made to sum to 1."""
    half = np.column_stack([logp_TK.astype(np.float16), rest_T]).astype(np.float64)
    return np.asarray(half - np.log(np.exp(half).sum(axis=1, keepdims=True)))


def kl_mean(base: TokenScores, other: TokenScores, row_T: Ints) -> Apart:
    """Mean over tokens."""
    assert other.kl_T is not None
    return Apart(float(np.mean(other.kl_T, dtype=np.float64)), of_mean(other.kl_T, row_T))


def kl_quantile(share: float) -> Callable[[TokenScores, TokenScores, Ints], Apart]:
    """The KL that this share of tokens does not exceed."""

    def of(base: TokenScores, other: TokenScores, row_T: Ints) -> Apart:
        assert other.kl_T is not None
        return quantile(other.kl_T.astype(np.float64), share, row_T)

    return of


def kl_max(base: TokenScores, other: TokenScores, row_T: Ints) -> Apart:
    """The worst token; of the rest of the text it says nothing, so it has no interval."""
    assert other.kl_T is not None
    return Apart(float(other.kl_T.max()), None)


def top1_flips(base: TokenScores, other: TokenScores, row_T: Ints) -> Apart:
    """Share of tokens whose likeliest successor is another than the base's."""
    assert other.same_top_T is not None
    flipped = ~other.same_top_T
    return Apart(float(np.mean(flipped)), of_mean(flipped, row_T))


def rms_dp(base: TokenScores, other: TokenScores, row_T: Ints) -> Apart:
    """Root of the mean square of p_candidate - p_base; its influence is that of the square."""
    square = (other.p_T - base.p_T) ** 2
    rms = math.sqrt(float(np.mean(square)))
    return Apart(rms, of_mean(square, row_T) / (2 * rms) if rms > 0 else of_mean(square, row_T))


def quantile(values_T: Values, share: float, row_T: Ints) -> Apart:
    """The smallest value that a share of all does not exceed, and its influence over rows.

    Influence (share - [value <= quantile]) s with s the slope of the quantile in the share, read
    between one standard error (over rows) above and below it (Siddiqui, J. Res. NBS 64B, 1960;
    Woodruff, JASA 47, 1952, for clusters). Where the slope above runs out of tokens it ends at the
    largest.
    """
    ordered = np.sort(values_T)
    found = float(ordered[_place(share, len(ordered))])
    exceeds = of_mean(values_T > found, row_T)
    n = len(exceeds)
    error = math.sqrt(float(np.sum(exceeds**2)) / (n * max(n - 1, 1)))
    reach = max(error, 1 / len(ordered))
    low, high = max(share - reach, 0.0), min(share + reach, 1.0)
    rise = ordered[_place(high, len(ordered))] - ordered[_place(low, len(ordered))]
    return Apart(found, exceeds * float(rise) / (high - low))


def _place(share: float, n: int) -> int:
    return min(max(math.ceil(share * n) - 1, 0), n - 1)
