"""Verbs that run artifacts: classify, embed, probe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medge.cli.console import Json, Threads, print_json, print_table, progress, say
from medge.errors import UsageError
from medge.progress import counter

if TYPE_CHECKING:
    from medge.runtimes import Embedder
    from medge.runtimes.probe import Probe
    from medge.spec import FloatArray

ArtifactPath = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="An artifact folder.")]
Images = Annotated[list[Path], typer.Argument(metavar="IMAGE…", help="Image or DICOM files.")]
Frame = Annotated[int, typer.Option(min=0, help="Which frame of a multi-frame file, from 0.")]
Templates = Annotated[
    list[str] | None, typer.Option("--template", help="Prompt with {} for the label; several are averaged.")
]


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    app.command()(classify)
    app.command()(embed)
    probe = typer.Typer(help="Linear probes: fit one on your images, apply it.", no_args_is_help=True)
    probe.command()(fit)
    probe.command()(apply)
    app.add_typer(probe, name="probe")


def _open(artifact: Path, threads: int | None) -> Embedder:
    from medge.runtimes import RunOptions
    from medge.runtimes import open_embedder as open_artifact

    return open_artifact(artifact, RunOptions(threads=threads))


def _embed(model: Embedder, images: Sequence[Path], frame: int = 0) -> FloatArray:
    with progress() as report:
        return model.embed_images(images, counter(report, "embed images", len(images)), frame=frame)


def classify(
    artifact: ArtifactPath,
    images: Images,
    label: Annotated[list[str] | None, typer.Option("--label", help="A class; give several.")] = None,
    template: Templates = None,
    multilabel: Annotated[bool, typer.Option("--multilabel", help="A sigmoid a label, not a softmax.")] = False,
    frame: Frame = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Zero-shot classification of images against labels."""
    from medge.runtimes.embed import check_labels

    labels, templates = label or [], template or ["{}"]
    check_labels(labels, templates)
    model = _open(artifact, threads)
    embeddings = _embed(model, images, frame)
    scores = model.scores(embeddings, model.class_embeddings(labels, templates), multilabel=multilabel)
    _print_scores(images, labels, scores, json)


def _print_scores(images: Sequence[Path], labels: Sequence[str], scores: FloatArray, json: bool) -> None:
    if json:
        rows = [dict(zip(labels, map(float, row), strict=True)) for row in scores]
        print_json([{"image": str(image), "scores": row} for image, row in zip(images, rows, strict=True)])
        return
    for image, row in zip(images, scores, strict=True):
        order = row.argsort()[::-1]
        bars = [[labels[i], f"{row[i]:.4f}", "█" * round(float(row[i]) * 30)] for i in order]
        print_table(image.name, ["label", "score", ""], bars)
    say("Not a medical device: scores are no diagnosis.")


def embed(
    artifact: ArtifactPath,
    images: Annotated[list[Path] | None, typer.Argument(metavar="[IMAGE…]")] = None,
    text: Annotated[list[str] | None, typer.Option("--text", help="A text; give several.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="A .npy file; images first, then texts.")] = None,
    frame: Frame = 0,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Embed images and texts: rows of length one."""
    import numpy as np

    images, texts = images or [], text or []
    if not images and not texts:
        raise UsageError("Nothing to embed", "Pass image files, or --text")
    model = _open(artifact, threads)
    parts = [_embed(model, images, frame)] if images else []
    rows = np.concatenate([*parts, *([model.embed_texts(texts)] if texts else [])])
    if out is not None:
        with out.open("wb") as stream:
            np.save(stream, rows, allow_pickle=False)
    if json:
        named = zip([*map(str, images), *texts], rows.tolist(), strict=True)
        print_json([{"input": name, "embedding": row} for name, row in named])
    else:
        say(f"{len(rows)} embeddings of {rows.shape[1]}" + (f" in {out}" if out else "; pass -o FILE.npy or --json"))


def fit(
    artifact: ArtifactPath,
    data: Annotated[Path, typer.Option(help="A folder per class, or a CSV with path and label.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Default: ARTIFACT/probe.safetensors.")] = None,
    c: Annotated[float, typer.Option("-c", min=1e-6, help="Inverse regularization strength.")] = 1.0,
    threads: Threads = None,
) -> None:
    """Fit a logistic regression on the artifact's image embeddings."""
    from medge.benchmarks.datasets import load_dataset
    from medge.manifest import read_manifest
    from medge.runtimes.probe import FILE
    from medge.runtimes.probe import fit as fit_probe

    dataset = load_dataset(data)
    if dataset.multilabel:
        raise UsageError("A probe is fitted on images with one label each", "Use a folder per class")
    model = _open(artifact, threads)
    embeddings = _embed(model, [item.path for item in dataset.items])
    labels = [item.labels[0] for item in dataset.items]
    probe = fit_probe(embeddings, labels, read_manifest(artifact).source.weights_sha256, c=c)
    probe.save(out or artifact / FILE)
    right = (probe.apply(embeddings).argmax(1) == [probe.labels.index(label) for label in labels]).mean()
    say(f"{out or artifact / FILE}: {len(probe.labels)} labels, {right:.1%} of its own training images")


def apply(
    artifact: ArtifactPath,
    images: Images,
    probe: Annotated[Path | None, typer.Option(help="Default: ARTIFACT/probe.safetensors.")] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Classify images with a fitted probe."""
    from medge.runtimes.probe import FILE, Probe

    loaded = Probe.load(probe or artifact / FILE)
    _check_source(artifact, loaded)
    scores = loaded.apply(_embed(_open(artifact, threads), images))
    _print_scores(images, loaded.labels, scores, json)


def _check_source(artifact: Path, probe: Probe) -> None:
    from medge.manifest import read_manifest

    if read_manifest(artifact).source.weights_sha256 != probe.weights_sha256:
        raise UsageError("The probe was fitted on another model's embeddings", "Fit it again: medge probe fit")
