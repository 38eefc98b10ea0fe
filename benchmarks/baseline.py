"""The reference's answers on a dataset: captured once, kept as a folder, opened by every check.

BASE/baseline.json           BaselineManifest
BASE/goldens.safetensors     Goldens, float32
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from pydantic import Field

from medge.benchmarks import host
from medge.benchmarks.datasets import Dataset, load_dataset
from medge.benchmarks.host import Host
from medge.benchmarks.records import Record
from medge.errors import CorruptError, RegressedError, UsageError
from medge.manifest import File, Manifest, Sha256, describe, sha256
from medge.runtimes.base import normalize
from medge.runtimes.embed import IMAGE, Embedder
from medge.spec import FloatArray, ImageSpec, Variant
from medge.staging import staged
from medge.tensorfile import read_header, write

BASELINE = "baseline.json"
GOLDENS = "goldens.safetensors"
TEMPLATES = ("{}",)
WARM_UP = 3
PIXELS = "pixel_values"

Progress = Callable[[int, int], None]
"""Called with (done, total) images."""


class BaselineManifest(Record):
    """baseline.json: what the reference was, what it saw, and where it ran."""

    model: str
    hub_id: str = ""
    weights_sha256: Sha256
    image: ImageSpec
    reference: str
    """The reference runtime, named: "torch 2.13.0 cpu fp32"."""
    data: str
    """Where the images lay; `check` reads them there unless told."""
    dataset_digest: Sha256
    images: tuple[str, ...] = Field(min_length=1)
    """Names, in the goldens' order; the dataset's digest holds their bytes."""
    labels: tuple[str, ...] = Field(min_length=2)
    templates: tuple[str, ...] = Field(min_length=1)
    host: Host
    latency_seconds: tuple[float, ...]
    """Per image, one at a time, the encoder alone."""
    noisy: str
    """Why the host was too noisy to time on, at capture; empty when it was quiet."""
    goldens: File


class Goldens:
    """What a model answers on a dataset of N images and L labels."""

    def __init__(self, image_embeddings: FloatArray, class_embeddings: FloatArray, targets: FloatArray) -> None:
        self.image_embeddings = image_embeddings
        """(N, D), L2-normalized."""
        self.class_embeddings = class_embeddings
        """(L, D), L2-normalized."""
        self.targets = targets
        """(N, L), 1 where the image has the label."""

    @property
    def scores(self) -> FloatArray:
        """(N, L) cosines: MedSigLIP's zero-shot scores before scale and bias, which keep every order."""
        return self.image_embeddings @ self.class_embeddings.T

    def tensors(self) -> Mapping[str, FloatArray]:
        """What the file holds. The scores are redundant, so that another language need not multiply."""
        return {
            "image_embeddings": self.image_embeddings,
            "class_embeddings": self.class_embeddings,
            "targets": self.targets,
            "scores": self.scores,
        }


class Baseline:
    """A baseline folder, opened: its goldens hash and shape as its manifest says, and all are finite."""

    def __init__(self, manifest: BaselineManifest, goldens: Goldens) -> None:
        self.manifest = manifest
        self.goldens = goldens

    @classmethod
    def open(cls, root: str | Path) -> Baseline:
        """Read a baseline and prove it whole.

        Raises:
            UsageError: no baseline there.
            CorruptError: altered, truncated, newer than this medge, or not of one piece.
        """
        root = Path(root)
        if not (root / BASELINE).is_file():
            raise UsageError(f"{root} is no baseline: it has no {BASELINE}", "Make one: medge baseline capture")
        manifest = BaselineManifest.load(root / BASELINE)
        path = root / manifest.goldens.path
        if not path.is_file() or path.stat().st_size != manifest.goldens.bytes:
            raise CorruptError(f"{path} is missing or truncated", "Capture the baseline again")
        if sha256(path) != manifest.goldens.sha256:
            raise CorruptError(f"{path} was altered: its sha256 differs", "Capture the baseline again")
        return cls(manifest, _read_goldens(path, manifest))


def write_baseline(
    out: Path, goldens: Goldens, make: Callable[[File], BaselineManifest], *, replace: bool = False
) -> Baseline:
    """Write a baseline folder, whole or not at all; `make` gets the entry of the goldens' file.

    Raises:
        UsageError: `out` exists or cannot be written.
    """
    tensors = goldens.tensors()
    with staged(out, replace=replace) as folder:
        write(folder / GOLDENS, {name: value.shape for name, value in tensors.items()}, tensors.__getitem__)
        manifest = make(describe(folder, GOLDENS))
        manifest.save(folder / BASELINE)
    return Baseline(manifest, goldens)


def _read_goldens(path: Path, manifest: BaselineManifest) -> Goldens:
    images, labels = len(manifest.images), len(manifest.labels)
    entries = read_header(path)
    names = ("image_embeddings", "class_embeddings", "targets")
    if any(name not in entries or len(entries[name].shape) != 2 for name in names):
        raise CorruptError(f"{path} lacks the baseline's arrays", "Capture the baseline again")
    width = entries["image_embeddings"].shape[1]
    shapes = ((images, width), (labels, width), (images, labels))
    if any(entries[name].shape != shape for name, shape in zip(names, shapes, strict=True)):
        raise CorruptError(f"{path} does not fit its {BASELINE}", "Capture the baseline again")
    arrays = [entries[name].read() for name in names]
    if not all(np.isfinite(array).all() for array in arrays):
        raise CorruptError(f"{path} holds NaN or infinity", "Capture the baseline again")
    return Goldens(*arrays)


@dataclass(frozen=True)
class Identity:
    """Whose answers they are: the checkpoint, by id and by its weights' hash."""

    model: str
    hub_id: str
    weights_sha256: str


class Origin(Protocol):
    """What a baseline says of the model that it was captured from."""

    @property
    def model(self) -> str:
        """Its id."""
        ...

    @property
    def weights_sha256(self) -> str:
        """Its weights' hash."""
        ...

    @property
    def image(self) -> ImageSpec | None:
        """How images were prepared."""
        ...


def require_same_model(manifest: Manifest, origin: Origin, remedy: str) -> None:
    """Refuse to compare an artifact with another model's answers; `remedy` is for another preprocessing.

    Raises:
        UsageError: other weights, or images prepared in another way.
    """
    if manifest.source.weights_sha256 != origin.weights_sha256:
        raise UsageError(
            f"The artifact was made from other weights ('{manifest.source.model}', "
            f"{manifest.source.weights_sha256[:12]}…) than the baseline ('{origin.model}', "
            f"{origin.weights_sha256[:12]}…)",
            "Capture a baseline of the artifact's own checkpoint",
        )
    if manifest.image != origin.image:
        raise UsageError(f"The artifact preprocesses as {manifest.image}, the baseline as {origin.image}", remedy)


@dataclass(frozen=True)
class Encoded:
    """A model's answers and the seconds that the encoder alone took for each image."""

    goldens: Goldens
    seconds: tuple[float, ...]
    noisy: str
    """Why these seconds say little; empty when the host was quiet."""


def encode(embedder: Embedder, dataset: Dataset, templates: Sequence[str], progress: Progress) -> Encoded:
    """Embed every image and every class.

    One image at a time: dynamic quantization shares its scale over a batch, so that in a batch an image's
    answer would depend on its neighbours, and a phone has none.

    Raises:
        RegressedError: an embedding is not finite.
    """
    noisy = host.noise().reason
    session = embedder.session(IMAGE)
    for item in dataset.items[:WARM_UP]:
        session.run({PIXELS: embedder.pixels([item.path])})
    rows, seconds = [], []
    for done, item in enumerate(dataset.items, start=1):
        pixels = embedder.pixels([item.path])
        start = time.perf_counter()
        (row,) = session.run({PIXELS: pixels}).values()
        seconds.append(time.perf_counter() - start)
        rows.append(normalize(_finite(row, f"the embedding of '{item.name}'", embedder)))
        progress(done, len(dataset.items))
    classes = _finite(embedder.class_embeddings(dataset.labels, templates), "a class embedding", embedder)
    goldens = Goldens(np.concatenate(rows), classes, dataset.targets.astype(np.float32))
    return Encoded(goldens, tuple(seconds), noisy)


def _finite(values: FloatArray, what: str, embedder: Embedder) -> FloatArray:
    if not np.isfinite(values).all():
        raise RegressedError(f"{embedder.name}: {what} holds NaN or infinity", "An activation left its range")
    return values


def quiet(done: int, total: int) -> None:
    """No progress shown."""


def capture(
    checkpoint: Path,
    data: Path,
    out: Path,
    *,
    templates: Sequence[str] = TEMPLATES,
    variant: Variant | None = None,
    replace: bool = False,
    progress: Progress = quiet,
) -> Baseline:
    """Run the torch reference over a dataset and keep its answers as a baseline folder.

    Raises:
        UsageError: no checkpoint, an unusable dataset, or `out` exists.
        WeightsError, CorruptError: the checkpoint is incomplete or unsound.
        MissingExtraError: torch is not installed.
    """
    from medge.checkpoint import Checkpoint
    from medge.runtimes.torch_reference import open_reference

    if out.exists() and not replace:  # before minutes of work, not after
        raise UsageError(f"{out} exists", "Name another folder, or pass --force to replace it")
    dataset = load_dataset(data)
    source = Checkpoint.open(checkpoint)
    reference = open_reference(source, variant=variant)
    identity = Identity(source.spec.id, source.spec.hub_id, source.sha256)
    return record(reference, identity, dataset, out, templates=templates, replace=replace, progress=progress)


def record(
    reference: Embedder,
    identity: Identity,
    dataset: Dataset,
    out: Path,
    *,
    templates: Sequence[str] = TEMPLATES,
    replace: bool = False,
    progress: Progress = quiet,
) -> Baseline:
    """Keep an opened reference's answers: what `capture` does, for any runtime that can serve as one."""
    encoded = encode(reference, dataset, templates, progress)

    def manifest(goldens: File) -> BaselineManifest:
        return BaselineManifest(
            model=identity.model,
            hub_id=identity.hub_id,
            weights_sha256=identity.weights_sha256,
            image=reference.image,
            reference=reference.name,
            data=str(dataset.root.resolve()),
            dataset_digest=dataset.digest,
            images=tuple(item.name for item in dataset.items),
            labels=dataset.labels,
            templates=tuple(templates),
            host=host.fingerprint(),
            latency_seconds=encoded.seconds,
            noisy=encoded.noisy,
            goldens=goldens,
        )

    return write_baseline(out, encoded.goldens, manifest, replace=replace)
