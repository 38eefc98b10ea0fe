"""The gate itself: an artifact runs over the baseline's images, and every metric gets a verdict.

What may be compared is checked first: the same weights, the same images and labels, the same preprocessing.
Anything else is refused, since its numbers would say nothing about the export. How each metric is judged, and
why a confidence interval that straddles its limit is no pass: benchmarks/metrics.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medge.benchmarks import stats
from medge.benchmarks.baseline import (
    Baseline,
    BaselineManifest,
    Encoded,
    Goldens,
    Progress,
    encode,
    quiet,
    require_same_model,
)
from medge.benchmarks.datasets import Dataset, load_dataset
from medge.benchmarks.host import Host, fingerprint
from medge.benchmarks.metrics import BY_NAME, LIMITS, METRICS, Evidence, Limit, judge, load_limits
from medge.benchmarks.records import Case, CheckResult, Curve, Dots, Reference, Subject, Verdict
from medge.errors import CorruptError, UsageError, require
from medge.manifest import Artifact

if TYPE_CHECKING:
    from medge.runtimes.base import RunOptions
    from medge.runtimes.embed import Embedder

Opener = Callable[[Path], "Embedder"]
MAX_DOTS = 1_500
MAX_CURVES = 12
_CURVE_POINTS = 120


def check(
    artifact: Path,
    against: Path,
    *,
    data: Path | None = None,
    limits: Path = LIMITS,
    options: RunOptions | None = None,
    opener: Opener | None = None,
    progress: Progress = quiet,
) -> CheckResult:
    """Hold an artifact against a baseline.

    `data` says where the baseline's images lie now; `opener` opens the artifact in another runtime (a phone).

    Raises:
        UsageError: another model, dataset or preprocessing than the baseline's, or a scheme without limits.
        MissingExtraError: scipy is not installed.
        CorruptError: the artifact or the baseline contradicts itself, or they differ in width.
        RegressedError: the artifact gives an embedding that is not finite.
    """
    require("scipy", "eval")  # before minutes of work, not after
    opened, baseline = Artifact.open(artifact), Baseline.open(against)
    require_same_model(opened.manifest, baseline.manifest, "Export and capture with the same --variant")
    bounds = load_limits(opened.manifest.scheme, limits)
    dataset = _dataset(baseline.manifest, data)
    embedder = opener(artifact) if opener else _open(artifact, options)
    encoded = encode(embedder, dataset, baseline.manifest.templates, progress)
    return _result(opened, baseline, dataset, encoded, bounds, embedder.name)


def _open(artifact: Path, options: RunOptions | None) -> Embedder:
    from medge import runtimes

    return runtimes.open_embedder(artifact, options)


def _dataset(baseline: BaselineManifest, data: Path | None) -> Dataset:
    root = data or Path(baseline.data)
    if not root.exists():
        raise UsageError(f"The baseline's images are not at {root}", "Say where they are: --data DIR")
    dataset = load_dataset(root)
    if dataset.digest != baseline.dataset_digest:
        raise UsageError(
            f"{root} holds other images or labels than the baseline saw",
            "Restore them, or capture a new baseline",
        )
    return dataset


def _result(
    artifact: Artifact,
    baseline: Baseline,
    dataset: Dataset,
    encoded: Encoded,
    limits: Mapping[str, Limit],
    runtime: str,
) -> CheckResult:
    host, manifest = fingerprint(), baseline.manifest
    _same_width(baseline.goldens, encoded.goldens)
    evidence = Evidence(baseline.goldens, encoded.goldens)
    verdicts, notes = _judge(evidence, limits)
    timed = _latency(manifest, host, runtime, encoded, limits.get("latency_ratio"))
    verdicts += [timed] if isinstance(timed, Verdict) else []
    notes += [timed] if isinstance(timed, str) else []
    return CheckResult(
        artifact=Subject.of(artifact),
        runtime=runtime,
        host=host,
        reference=_reference(manifest),
        verdicts=tuple(verdicts),
        notes=(*_notes(manifest, dataset), *notes),
        cases=tuple(_cases(dataset, evidence)),
        curves=tuple(_curves(dataset, evidence)),
        dots=_dots(evidence),
    )


def _same_width(baseline: Goldens, candidate: Goldens) -> None:
    for ours, theirs in (
        (candidate.image_embeddings, baseline.image_embeddings),
        (candidate.class_embeddings, baseline.class_embeddings),
    ):
        if ours.shape != theirs.shape:
            raise CorruptError(
                f"The artifact's embeddings are {ours.shape}, the baseline's {theirs.shape}",
                "Export it again",
            )


def _judge(evidence: Evidence, limits: Mapping[str, Limit]) -> tuple[list[Verdict], list[str]]:
    verdicts, notes = [], []
    for metric in METRICS:
        if metric.measure is None or metric.name not in limits:
            continue
        estimate = metric.measure(evidence)
        if isinstance(estimate, str):
            notes.append(f"{metric.title}: not judged, {estimate}.")
        else:
            verdicts.append(judge(metric, estimate, limits[metric.name]))
    return verdicts, notes


def _latency(
    baseline: BaselineManifest, host: Host, runtime: str, encoded: Encoded, limit: Limit | None
) -> Verdict | str:
    """A verdict on time, or the reason why there is none."""
    if limit is None:
        return "Time an image: this scheme has no limit."
    if not host.times_compare(baseline.host):
        return "Time an image: not compared, the baseline was captured on another host."
    if on_gpu(baseline.reference) != on_gpu(runtime):
        return f"Time an image: not compared, {baseline.reference} and {runtime} are different devices."
    if noisy := encoded.noisy or baseline.noisy:
        return f"Time an image: not compared, the host was not quiet: {noisy}."
    ratio = stats.median_ratio(np.asarray(encoded.seconds), np.asarray(baseline.latency_seconds))
    ours, theirs = (1e3 * float(np.median(samples)) for samples in (encoded.seconds, baseline.latency_seconds))
    return judge(BY_NAME["latency_ratio"], ratio, limit, f"{ours:.3g} ms, reference {theirs:.3g} ms")


def on_gpu(runtime: str) -> bool:
    """Whether a runtime's name tells of another device than the processor."""
    return "cpu" not in runtime.split()


def _reference(manifest: BaselineManifest) -> Reference:
    return Reference(
        runtime=manifest.reference,
        host=manifest.host,
        dataset_digest=manifest.dataset_digest,
        images=len(manifest.images),
        labels=manifest.labels,
        templates=manifest.templates,
        variant=manifest.image.variant,
        captured=manifest.created,
    )


def _notes(manifest: BaselineManifest, dataset: Dataset) -> list[str]:
    notes = []
    if not on_gpu(manifest.reference):
        notes.append(f"No GPU: the reference is {manifest.reference}, not the fp16 GPU model.")
    once = [label for label, n in zip(dataset.labels, dataset.targets.sum(axis=0), strict=True) if n < 2]
    if once:
        notes.append(f"{len(once)} of {len(dataset.labels)} labels have one image only; their AUC is coarse.")
    return notes


def _cases(dataset: Dataset, evidence: Evidence) -> list[Case]:
    """Every image, the one that moved most first."""
    theirs, ours = (s.argmax(axis=1) for s in (evidence.baseline_scores, evidence.candidate_scores))
    return [
        Case(
            name=dataset.items[i].name,
            labels=dataset.items[i].labels,
            cosine=float(evidence.cosines[i]),
            baseline_label=dataset.labels[theirs[i]],
            candidate_label=dataset.labels[ours[i]],
        )
        for i in np.argsort(evidence.cosines, kind="stable")
    ]


def _curves(dataset: Dataset, evidence: Evidence) -> list[Curve]:
    """Per label; the ROC only for the first few by AUC lost, since a page of 79 shows none."""
    curves = [_curve(dataset, evidence, k) for k in range(len(dataset.labels))]
    curves.sort(key=_lost, reverse=True)
    thin = {"baseline_roc": (), "candidate_roc": ()}
    return curves[:MAX_CURVES] + [curve.model_copy(update=thin) for curve in curves[MAX_CURVES:]]


def _lost(curve: Curve) -> float:
    if curve.baseline_auc is None or curve.candidate_auc is None:
        return float("-inf")
    return curve.baseline_auc - curve.candidate_auc


def _curve(dataset: Dataset, evidence: Evidence, k: int) -> Curve:
    positive = evidence.targets[:, k]
    theirs, ours = evidence.baseline_scores[:, k], evidence.candidate_scores[:, k]
    return Curve(
        label=dataset.labels[k],
        positives=int(positive.sum()),
        baseline_auc=stats.auc(theirs, positive),
        candidate_auc=stats.auc(ours, positive),
        baseline_roc=_roc(theirs, positive),
        candidate_roc=_roc(ours, positive),
    )


def _roc(scores: NDArray[np.float64], positive: NDArray[np.bool_]) -> tuple[tuple[float, float], ...]:
    false, true = stats.roc(scores, positive)
    picked = np.unique(np.linspace(0, len(false) - 1, min(len(false), _CURVE_POINTS)).astype(int))
    return tuple((round(float(false[i]), 4), round(float(true[i]), 4)) for i in picked)


def _dots(evidence: Evidence) -> Dots:
    theirs, ours = evidence.baseline_scores.ravel(), evidence.candidate_scores.ravel()
    picked = np.random.default_rng(0).permutation(len(theirs))[:MAX_DOTS]
    points = tuple((round(float(theirs[i]), 5), round(float(ours[i]), 5)) for i in picked)
    return Dots(of=len(theirs), points=points)
