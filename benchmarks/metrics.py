"""The quality metrics as data: what each measures, in which direction, and how it is judged.

Two kinds, since they claim two things:

- *Exact*: cosines, agreement, accuracy, recall. Both models are deterministic, so the value is a fact about
  these images. It is held against the limit as it stands; an interval, where shown, is for the reader.
- *Inferred*: AUC (and latency). The claim is about images not seen, so the whole interval must lie within
  the limit; one that straddles it is inconclusive, and so is a sample below `MIN_IMAGES`, since a bootstrap
  cannot draw what the sample does not hold.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medge.benchmarks import stats
from medge.benchmarks.baseline import Goldens
from medge.benchmarks.records import Direction, Outcome, Verdict
from medge.benchmarks.stats import Estimate
from medge.errors import UsageError
from medge.spec import Frozen

LIMITS = Path(__file__).with_name("limits.toml")
MIN_IMAGES = 20
_TINY = 1e-6


class Evidence:
    """Both models' answers on one dataset: N images, L labels, D dimensions."""

    def __init__(self, baseline: Goldens, candidate: Goldens) -> None:
        self.baseline = baseline
        self.candidate = candidate
        self.targets: NDArray[np.bool_] = baseline.targets > 0.5

    @cached_property
    def baseline_scores(self) -> NDArray[np.float64]:
        """(N, L) cosines of the reference."""
        return _scores(self.baseline)

    @cached_property
    def candidate_scores(self) -> NDArray[np.float64]:
        """(N, L) cosines of the artifact."""
        return _scores(self.candidate)

    @cached_property
    def cosines(self) -> NDArray[np.float64]:
        """(N,) between the two embeddings of each image."""
        return _cosines(self.baseline.image_embeddings, self.candidate.image_embeddings)

    @cached_property
    def centred_cosines(self) -> NDArray[np.float64]:
        """Cosines after subtracting the reference's mean embedding: what tells images apart.

        Images that are the mean (all alike) have no direction left and are left out: (N or fewer,).
        """
        base = self.baseline.image_embeddings.astype(np.float64)
        mean = base.mean(axis=0)
        theirs, ours = base - mean, self.candidate.image_embeddings - mean
        apart = np.linalg.norm(theirs, axis=1) > _TINY
        return _cosines(theirs[apart], ours[apart])


def _scores(goldens: Goldens) -> NDArray[np.float64]:
    return goldens.image_embeddings.astype(np.float64) @ goldens.class_embeddings.astype(np.float64).T


def _cosines(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    out = np.zeros(len(a))
    np.divide((a * b).sum(axis=1), norms, out=out, where=norms > 0)
    return out


@dataclass(frozen=True)
class Metric:
    """One number that is judged."""

    name: str
    title: str
    unit: Literal["cosine", "share", "AUC", "ratio", "nats"]
    direction: Direction
    kind: Literal["exact", "inferred"]
    meaning: str
    measure: Callable[[Any], Estimate | str] | None
    """From the evidence of its kind of model: an estimate, or the reason why the metric does not apply.

    None: the gate measures it (latency).
    """


class Limit(Frozen):
    """A metric's bound for one family of schemes, with its reason."""

    limit: float
    reason: str


def judge(metric: Metric, estimate: Estimate, limit: Limit, detail: str = "") -> Verdict:
    """Hold an estimate against its limit. What is undefined is inconclusive, never a pass."""
    outcome = _outcome(metric, estimate, limit.limit)
    return Verdict(
        metric=metric.name,
        title=metric.title,
        unit=metric.unit,
        direction=metric.direction,
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        limit=limit.limit,
        reason=limit.reason,
        outcome=outcome,
        detail=estimate.undefined or detail,
    )


def _outcome(metric: Metric, estimate: Estimate, limit: float) -> Outcome:
    if estimate.value is None or estimate.undefined:
        return "inconclusive"
    ends = [estimate.value]
    if metric.kind == "inferred":
        if estimate.low is None or estimate.high is None:
            return "inconclusive"
        ends = [estimate.low, estimate.high]
    sign = 1 if metric.direction == "at_least" else -1
    within = [sign * end >= sign * limit for end in ends]
    if all(within):
        return "ok"
    return "inconclusive" if any(within) else "regressed"


def load_limits(scheme: str, path: Path = LIMITS, metrics: Mapping[str, Metric] | None = None) -> dict[str, Limit]:
    """The limits of the family whose name is the longest that begins the scheme's; of `metrics`, or an encoder's.

    Raises:
        UsageError: no family fits, a metric is unknown, or a limit lacks its reason.
    """
    try:
        families = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} holds no limits: {error}") from None
    fitting = [name for name in families if scheme.startswith(name)]
    if not fitting:
        raise UsageError(f"No limits for scheme '{scheme}'", f"Add [{scheme}] to a copy of {path} and pass that")
    family = max(fitting, key=len)
    return {
        name: _limit(f"{path} [{family}]", name, value, metrics or BY_NAME) for name, value in families[family].items()
    }


def _limit(where: str, name: str, value: Any, metrics: Mapping[str, Metric]) -> Limit:
    if name not in metrics:
        raise UsageError(f"{where}: no metric '{name}'", f"Metrics: {', '.join(metrics)}")
    try:
        return Limit.model_validate(value)
    except ValueError:
        raise UsageError(f"{where}: '{name}' needs a limit and its reason") from None


def _least(values: NDArray[np.float64]) -> Estimate:
    return Estimate(float(values.min())) if len(values) else Estimate(None, undefined="no images")


def _mean(values: NDArray[np.float64]) -> Estimate:
    return stats.mean_difference(values, np.zeros_like(values))


def _centred(reduce: Callable[[NDArray[np.float64]], Estimate]) -> Callable[[Evidence], Estimate | str]:
    def measure(evidence: Evidence) -> Estimate | str:
        if len(evidence.centred_cosines) < 3:
            return Estimate(None, undefined="fewer than 3 images that differ")
        return reduce(evidence.centred_cosines)

    return measure


def _text_cosine_min(evidence: Evidence) -> Estimate:
    return _least(_cosines(evidence.baseline.class_embeddings, evidence.candidate.class_embeddings))


def _top1_agreement(evidence: Evidence) -> Estimate:
    same = evidence.baseline_scores.argmax(axis=1) == evidence.candidate_scores.argmax(axis=1)
    return stats.proportion(int(same.sum()), len(same))


def _auc_delta(evidence: Evidence) -> Estimate:
    estimate = stats.auc_difference(evidence.candidate_scores, evidence.baseline_scores, evidence.targets)
    if len(evidence.targets) < MIN_IMAGES and not estimate.undefined:
        few = f"{len(evidence.targets)} images are too few to infer from (least {MIN_IMAGES})"
        return Estimate(estimate.value, estimate.low, estimate.high, few)
    return estimate


def _image_text_delta(k: int) -> Callable[[Evidence], Estimate | str]:
    """Share of labelled images with one of their labels among the k best texts."""

    def measure(evidence: Evidence) -> Estimate | str:
        if k >= evidence.targets.shape[1]:
            return f"with {evidence.targets.shape[1]} labels every image finds its text among {k}"
        labelled = evidence.targets.any(axis=1)
        targets = evidence.targets[labelled]
        ours, theirs = (
            hits(scores[labelled], targets, k) for scores in (evidence.candidate_scores, evidence.baseline_scores)
        )
        return stats.mean_difference(ours, theirs)

    return measure


def _text_image_delta(k: int) -> Callable[[Evidence], Estimate | str]:
    """Share of texts with one of their images among the k best."""

    def measure(evidence: Evidence) -> Estimate | str:
        if k >= len(evidence.targets):
            return f"with {len(evidence.targets)} images every text finds one among {k}"
        ours, theirs = (
            hits(scores.T, evidence.targets.T, k) for scores in (evidence.candidate_scores, evidence.baseline_scores)
        )
        return Estimate(float(ours.mean() - theirs.mean()))

    return measure


def hits(scores: NDArray[np.float64], targets: NDArray[np.bool_], k: int) -> NDArray[np.float64]:
    """(rows,) 1 where a target is among the k highest of the row's scores."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.asarray(np.take_along_axis(targets, best, axis=1).any(axis=1), np.float64)


METRICS: tuple[Metric, ...] = (
    Metric(
        "auc_delta",
        "Zero-shot AUC, change",
        "AUC",
        "at_least",
        "inferred",
        "Mean one-vs-rest AUC of the artifact minus the reference's, 95 % paired bootstrap over images",
        _auc_delta,
    ),
    Metric(
        "top1_agreement",
        "Top-1 agreement",
        "share",
        "at_least",
        "exact",
        "Share of images for which both name the same label first (Wilson interval)",
        _top1_agreement,
    ),
    Metric(
        "accuracy_delta",
        "Top-1 accuracy (image→text recall@1), change",
        "share",
        "at_least",
        "exact",
        "Share of images whose first label is right, artifact minus reference",
        _image_text_delta(1),
    ),
    Metric(
        "recall5_image_text_delta",
        "Image→text recall@5, change",
        "share",
        "at_least",
        "exact",
        "Share of images with a right label among the first five, artifact minus reference",
        _image_text_delta(5),
    ),
    Metric(
        "recall1_text_image_delta",
        "Text→image recall@1, change",
        "share",
        "at_least",
        "exact",
        "Share of labels whose nearest image has them, artifact minus reference",
        _text_image_delta(1),
    ),
    Metric(
        "recall5_text_image_delta",
        "Text→image recall@5, change",
        "share",
        "at_least",
        "exact",
        "Share of labels with one of their images among the nearest five, artifact minus reference",
        _text_image_delta(5),
    ),
    Metric(
        "image_cosine_mean",
        "Image cosine, mean",
        "cosine",
        "at_least",
        "exact",
        "Between the embeddings of the same image",
        lambda evidence: _mean(evidence.cosines),
    ),
    Metric(
        "image_cosine_min",
        "Image cosine, least",
        "cosine",
        "at_least",
        "exact",
        "The image that moved most",
        lambda evidence: _least(evidence.cosines),
    ),
    Metric(
        "centred_cosine_mean",
        "Centred image cosine, mean",
        "cosine",
        "at_least",
        "exact",
        "After subtracting the reference's mean embedding: only what tells images apart",
        _centred(_mean),
    ),
    Metric(
        "centred_cosine_min",
        "Centred image cosine, least",
        "cosine",
        "at_least",
        "exact",
        "The image that moved most, the common part gone",
        _centred(_least),
    ),
    Metric(
        "text_cosine_min",
        "Class text cosine, least",
        "cosine",
        "at_least",
        "exact",
        "Between the embeddings of the same class; the class that moved most",
        _text_cosine_min,
    ),
    Metric(
        "latency_ratio",
        "Time an image, against the reference",
        "ratio",
        "at_most",
        "inferred",
        "Median of the image encoder alone, one image at a time, over the reference's on the same quiet host",
        None,
    ),
)
BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}
