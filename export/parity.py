"""Export parity: a fresh artifact against the reference, on real images and prompts.

The reference's embeddings are kept in the user's cache under the weights' hash, so that the schemes of one
checkpoint pay for them once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medge.checkpoint import Checkpoint
from medge.errors import RegressedError
from medge.manifest import Parity
from medge.quantize.scheme import Scheme
from medge.runtimes.embed import IMAGE, TEXT, Embedder
from medge.runtimes.torch_reference import open_reference
from medge.samples import digest
from medge.spec import FloatArray, Variant

CENTRE_FROM = 3
"""Samples that a centred cosine needs: with two, both sides are antiparallel by construction."""


@dataclass(frozen=True)
class Inputs:
    """What parity is measured on."""

    images: Sequence[Path]
    texts: Sequence[str]


@dataclass(frozen=True)
class Expected:
    """The reference's embeddings by part, and its name."""

    reference: str
    embeddings: dict[str, FloatArray]


def expected(checkpoint: Checkpoint, inputs: Inputs, variant: Variant, on_part: Callable[[str], None]) -> Expected:
    """The CPU fp32 reference's embeddings, from the cache or computed one tower at a time."""
    path = _cache_path(checkpoint, inputs, variant)
    cached = _load(path)
    if cached is not None:
        return cached
    reference = open_reference(checkpoint, variant=variant, device="cpu")
    embeddings = {}
    for part in (IMAGE, TEXT):
        on_part(part)
        embeddings[part] = _embed(reference, part, inputs)
        reference.release(part)
    _save(path, Expected(reference.name, embeddings))
    return Expected(reference.name, embeddings)


def measure(
    artifact: Embedder, expected: Expected, inputs: Inputs, on_part: Callable[[str], None]
) -> dict[str, Parity]:
    """Parity of each part."""
    found = {}
    for part, reference in expected.embeddings.items():
        on_part(part)
        found[part] = compare(_embed(artifact, part, inputs), reference, expected.reference)
        artifact.release(part)
    return found


def compare(ours: FloatArray, reference: FloatArray, name: str) -> Parity:
    """Cosines of matching rows; rows have length one."""
    cosine = np.sum(ours * reference, axis=1, dtype=np.float64)
    centred = centred_cosine(ours, reference) if len(reference) >= CENTRE_FROM else None
    return Parity(
        reference=name,
        samples=len(reference),
        cosine_mean=float(cosine.mean()),
        cosine_min=float(cosine.min()),
        centred_cosine_min=None if centred is None else float(centred.min()),
    )


def centred_cosine(ours: FloatArray, reference: FloatArray) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Cosines after subtracting the reference's mean: only what tells the samples apart is left."""
    mean = reference.mean(0, dtype=np.float64)
    a, b = ours - mean, reference - mean
    length = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(1) / np.maximum(length, 1e-30), np.float64)


def judge(parity: dict[str, Parity], scheme: Scheme) -> None:
    """Refuse an export that is broken rather than merely rounded.

    Raises:
        RegressedError: a part's least cosine is below the scheme's floor.
    """
    for part, found in parity.items():
        if not found.cosine_min >= scheme.parity_floor:
            raise RegressedError(
                f"Parity failed: {part} in {scheme.name} has cosine {found.cosine_min:.4f} to {found.reference}, "
                f"below {scheme.parity_floor}",
                "Try a scheme with more bits; --set parity=off writes it all the same",
            )


def _embed(embedder: Embedder, part: str, inputs: Inputs) -> FloatArray:
    return embedder.embed_images(inputs.images) if part == IMAGE else embedder.embed_texts(inputs.texts)


def _cache_path(checkpoint: Checkpoint, inputs: Inputs, variant: Variant) -> Path:
    import platformdirs

    name = f"{checkpoint.sha256[:32]}-{variant}-{digest(inputs.images, inputs.texts)[:16]}.safetensors"
    return platformdirs.user_cache_path("medge") / "parity" / name


def _load(path: Path) -> Expected | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            parts = file.keys()
            return Expected(file.metadata()["reference"], {part: file.get_tensor(part) for part in parts})
    except (OSError, SafetensorError, KeyError, TypeError):  # absent or damaged: a cache may be either
        return None


def _save(path: Path, value: Expected) -> None:
    """Keep for the next export; a full disk or a read-only home costs time then, and nothing now."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(value.embeddings, partial, {"reference": value.reference})
        partial.replace(path)
    except (OSError, SafetensorError):
        with suppress(OSError):
            partial.unlink()
