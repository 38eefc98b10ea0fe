"""Estimates with confidence intervals. Nothing here returns NaN: what is undefined says why.

Intervals are 95 %. AUC is the Mann–Whitney statistic (Hanley & McNeil 1982), ties counting one half; macro
AUC is the mean over classes, each against the rest. The paired bootstrap draws images, and both models are
scored on the same draw, so that what is common cancels (percentile interval, Efron & Tibshirani 1993).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medge.errors import require

Floats = NDArray[np.floating[Any]]
Bools = NDArray[np.bool_]
Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""(draws, images) weights -> (draws,) values; NaN where a draw leaves the value undefined."""

LEVEL = 0.95
RESAMPLES = 2_000
_CELLS = 2_000_000
"""Weights held at once: 16 MB, however many images and resamples."""


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; without a value, the reason."""

    value: float | None
    low: float | None = None
    high: float | None = None
    undefined: str = ""


def auc(scores: Floats, positive: Bools) -> float | None:
    """Area under the ROC curve of (N,) scores; None without both a positive and a negative."""
    return _defined(_auc_statistic(scores, positive)(np.ones((1, len(scores))))[0])


def roc(scores: Floats, positive: Bools) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """False and true positive rates of (N,) scores at every distinct threshold, from (0, 0) to (1, 1).

    Empty without both a positive and a negative.
    """
    positive = np.asarray(positive, bool)
    if positive.all() or not positive.any():
        return np.empty(0), np.empty(0)
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # ties move together
    true, false = (np.append(0, np.cumsum(hit[order])[last]) for hit in (positive, ~positive))
    return false / false[-1], true / true[-1]


def macro_auc(scores: Floats, targets: Bools) -> float | None:
    """Mean one-vs-rest AUC of (N, L) scores over the labels where it is defined; None where none is."""
    return _defined(_macro_statistic(scores, targets)(np.ones((1, len(scores))))[0])


def auc_difference(
    candidate: Floats, baseline: Floats, targets: Bools, *, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Macro AUC of the candidate minus the baseline's, both (N, L) scores of the same images.

    A label that a draw leaves without positives or without negatives is left out of that draw's mean.
    """
    ours, theirs = _macro_statistic(candidate, targets), _macro_statistic(baseline, targets)
    return _bootstrap(lambda w: ours(w) - theirs(w), len(targets), resamples, seed, "no label has both outcomes")


def mean_difference(candidate: Floats, baseline: Floats, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Mean of the (N,) differences candidate - baseline, paired by image."""
    difference = np.asarray(candidate, np.float64) - np.asarray(baseline, np.float64)
    return _bootstrap(lambda w: w @ difference / w.sum(axis=1), len(difference), resamples, seed, "no images")


def proportion(successes: int, trials: int) -> Estimate:
    """A share with its Wilson interval (Wilson 1927), which stays honest near 0 and 1.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    if trials == 0:
        return Estimate(None, undefined="no images")
    test = require("scipy.stats", "eval").binomtest(successes, trials)
    interval = test.proportion_ci(confidence_level=LEVEL, method="wilson")
    return Estimate(successes / trials, float(interval.low), float(interval.high))


def median_ratio(candidate: Floats, baseline: Floats, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Median of the candidate's positive samples over the baseline's, which are not paired."""
    if not len(candidate) or not len(baseline):
        return Estimate(None, undefined="no samples")
    rng = np.random.default_rng(seed)
    ratios = [_resampled_median(candidate, rng) / _resampled_median(baseline, rng) for _ in range(resamples)]
    low, high = _interval(np.asarray(ratios))
    return Estimate(float(np.median(candidate) / np.median(baseline)), low, high)


def median_interval(samples: Floats) -> tuple[float, float]:
    """Distribution-free interval of the median: order statistics at n/2 ± 0.98 √n (David & Nagaraja 2003)."""
    ordered = np.sort(np.asarray(samples, np.float64))
    half = 0.98 * math.sqrt(len(ordered))
    low = max(0, math.floor(len(ordered) / 2 - half))
    high = min(len(ordered) - 1, math.ceil(len(ordered) / 2 + half))
    return float(ordered[low]), float(ordered[high])


def _resampled_median(samples: Floats, rng: np.random.Generator) -> float:
    return float(np.median(rng.choice(samples, len(samples))))


def _defined(value: np.float64) -> float | None:
    return None if np.isnan(value) else float(value)


def _interval(values: Floats) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _bootstrap(statistic: Statistic, count: int, resamples: int, seed: int, undefined: str) -> Estimate:
    if count == 0:
        return Estimate(None, undefined="no images")
    value = _defined(statistic(np.ones((1, count)))[0])
    if value is None:
        return Estimate(None, undefined=undefined)
    draws = np.concatenate([statistic(weights) for weights in _draws(count, resamples, seed)])
    defined = draws[~np.isnan(draws)]
    if 2 * len(defined) < resamples:
        return Estimate(value, undefined="most draws lack a positive or a negative: too few images")
    low, high = _interval(defined)
    return Estimate(value, low, high)


def _draws(count: int, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Bootstrap draws as weights: how often each of `count` images was drawn, in blocks of bounded size."""
    rng = np.random.default_rng(seed)
    block = max(1, _CELLS // count)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = rng.integers(0, count, (rows, count)) + count * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count).astype(np.float64)


def _ratio(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """a / b, NaN where b is 0: undefined, until an Estimate says so in words."""
    out = np.full(len(a), np.nan)
    np.divide(a, b, out=out, where=b > 0)
    return out


def _auc_statistic(scores: Floats, positive: Bools) -> Statistic:
    """Weighted AUC with the sorting done once: each positive beats the weight of negatives below it."""
    order = np.argsort(scores, kind="stable")
    ordered, hit = np.asarray(scores)[order], np.asarray(positive)[order]
    first = np.searchsorted(ordered, ordered[hit], "left")
    last = np.searchsorted(ordered, ordered[hit], "right")

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        weights = weights[:, order]
        below = np.zeros((len(weights), len(ordered) + 1))
        np.cumsum(weights * ~hit, axis=1, out=below[:, 1:])
        won = (weights[:, hit] * (below[:, first] + below[:, last])).sum(axis=1) / 2
        pairs = weights[:, hit].sum(axis=1) * below[:, -1]
        return _ratio(won, pairs)

    return statistic


def _macro_statistic(scores: Floats, targets: Bools) -> Statistic:
    columns = [_auc_statistic(scores[:, k], targets[:, k]) for k in range(targets.shape[1])]

    def statistic(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total, defined = np.zeros(len(weights)), np.zeros(len(weights))
        for column in columns:
            value = column(weights)
            total += np.nan_to_num(value)
            defined += ~np.isnan(value)
        return _ratio(total, defined)

    return statistic
