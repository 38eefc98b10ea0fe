"""`medge parity`: every artifact of one checkpoint beside its fp32 reference, on the same real images and texts.

It measures and shows; it judges nothing (`medge check` does). The other preprocessings may stand in the same table,
as the reference under each of them: what a wrong resize costs, next to what a format or a scheme costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

from medge.benchmarks.baseline import TEMPLATES, Encoded, Goldens, encode
from medge.benchmarks.datasets import Dataset, load_dataset
from medge.benchmarks.metrics import BY_NAME, Evidence
from medge.benchmarks.records import ParityMatrix, ParityRow
from medge.benchmarks.stats import macro_auc
from medge.checkpoint import Checkpoint
from medge.errors import UsageError, require
from medge.manifest import Artifact
from medge.progress import Progress
from medge.runtimes import open_embedder as open_artifact
from medge.runtimes.base import RunOptions
from medge.runtimes.embed import IMAGE, TEXT, Embedder
from medge.runtimes.torch_reference import open_reference
from medge.spec import Variant

SHOWN = ("image_cosine_mean", "image_cosine_min", "centred_cosine_min", "text_cosine_min", "top1_agreement")
"""Metrics of the gate that the matrix shows, by their names there."""


def parity_matrix(
    checkpoint: Path,
    artifacts: Sequence[Path],
    data: Path,
    *,
    count: int | None = None,
    variants: bool = False,
    options: RunOptions | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> ParityMatrix:
    """Measure each artifact against the CPU fp32 reference of its own preprocessing.

    `count` takes that many images, the classes in turn. `variants` adds the reference under every preprocessing.

    Raises:
        UsageError: an artifact of other weights, nothing to compare, or an unusable dataset.
        CorruptError, MissingExtraError, RegressedError: as from `medge.open` and its runtime.
    """
    require("scipy", "eval")
    if not artifacts and not variants:
        raise UsageError("Nothing to compare", "Name artifacts, or pass --variants")
    source, dataset = Checkpoint.open(checkpoint), load_dataset(data)
    opened = [Artifact.open(path) for path in artifacts]
    for artifact in opened:
        _same_weights(artifact, source)
    dataset = dataset.first(count) if count else dataset
    references = _References(source, dataset, progress)
    rows = [_reference_row(references, source.spec.image.variant)]
    rows += [_artifact_row(one, references, options or RunOptions(), progress) for one in opened]
    rows += _variant_rows(references) if variants else ()
    return ParityMatrix(
        model=source.spec.id,
        reference=references.name,
        variant=source.spec.image.variant,
        images=len(dataset.items),
        labels=dataset.labels,
        dataset_digest=dataset.digest,
        rows=tuple(rows),
    )


def _same_weights(artifact: Artifact, source: Checkpoint) -> None:
    if artifact.manifest.source.weights_sha256 != source.sha256:
        raise UsageError(
            f"{artifact.root} was made from other weights ('{artifact.manifest.source.model}') than {source.root}",
            "Compare artifacts of one checkpoint",
        )


class _References:
    """The reference's answers under each preprocessing that is asked for, each computed once."""

    def __init__(self, source: Checkpoint, dataset: Dataset, progress: Progress) -> None:
        self._embedder = open_reference(source, device="cpu")
        self._found: dict[Variant, Goldens] = {}
        self.dataset = dataset
        self._progress = progress
        self.name = self._embedder.name
        self.own = source.spec.image.variant

    def goldens(self, variant: Variant) -> Goldens:
        """What the reference answers when images are prepared that way."""
        if variant not in self._found:
            self._embedder.image = self._embedder.image.model_copy(update={"variant": variant})
            show = partial(self._progress, f"reference, {variant}")
            self._found[variant] = encode(self._embedder, self.dataset, TEMPLATES, show).goldens
        return self._found[variant]


def _reference_row(references: _References, variant: Variant) -> ParityRow:
    goldens = references.goldens(variant)
    return _row(f"reference, {variant}", references.name, Evidence(goldens, goldens))


def _variant_rows(references: _References) -> Iterator[ParityRow]:
    own = references.goldens(references.own)
    for variant in get_args(Variant):
        if variant != references.own:
            evidence = Evidence(own, references.goldens(variant))
            yield _row(f"reference, {variant}", references.name, evidence)


def _artifact_row(artifact: Artifact, references: _References, options: RunOptions, progress: Progress) -> ParityRow:
    embedder = open_artifact(artifact.root, options)
    name = artifact.root.resolve().name
    encoded = _encode(embedder, references.dataset, partial(progress, name))
    evidence = Evidence(references.goldens(embedder.image.variant), encoded.goldens)
    row = _row(name, embedder.name, evidence)
    manifest = artifact.manifest
    return row.model_copy(update={"format": manifest.format, "scheme": manifest.scheme, "bytes": artifact.bytes})


def _encode(embedder: Embedder, dataset: Dataset, show: Callable[[int, int], None]) -> Encoded:
    encoded = encode(embedder, dataset, TEMPLATES, show)
    for part in (IMAGE, TEXT):
        embedder.release(part)
    return encoded


def _row(name: str, runtime: str, evidence: Evidence) -> ParityRow:
    values: dict[str, float | None] = {}
    for metric in SHOWN:
        measure = BY_NAME[metric].measure
        assert measure is not None  # noqa: S101 - only latency has none
        estimate = measure(evidence)
        values[metric] = None if isinstance(estimate, str) else estimate.value
    auc = macro_auc(evidence.candidate_scores, evidence.targets)
    own = macro_auc(evidence.baseline_scores, evidence.targets)
    values["auc_delta"] = None if auc is None or own is None else auc - own
    return ParityRow(name=name, runtime=runtime, values=values, auc=auc)
