"""One inference interface over every artifact. Imports no torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from medge.errors import CorruptError, MissingExtraError, UnsupportedError
from medge.manifest import Artifact
from medge.runtimes.base import Backend, RunOptions
from medge.runtimes.embed import IMAGE, SCALARS, Embedder

__all__ = ["Embedder", "RunOptions", "open"]


def open(path: str | Path, options: RunOptions | None = None) -> Embedder:
    """Open an artifact folder of any format.

    Raises:
        UsageError: no artifact there.
        CorruptError: the artifact contradicts its manifest.
        UnsupportedError: a model or layout that this medge cannot run.
        MissingExtraError: the format's runtime is not installed.
    """
    artifact = Artifact.open(path)
    manifest = artifact.manifest
    if manifest.image is None or manifest.tokenizer is None:
        raise UnsupportedError(f"{path} holds a '{manifest.task}' model, which this medge cannot run yet")
    if IMAGE not in manifest.parts:
        raise UnsupportedError(
            f"{path} holds the graph of another tool ({', '.join(manifest.parts)})",
            "Open it with optimum's ORTModelForZeroShotImageClassification, or export without layout=optimum",
        )
    missing = [name for name in SCALARS if name not in manifest.scalars]
    if missing:
        raise CorruptError(f"{path} lacks the scalars {', '.join(missing)}", "Export the artifact again")
    backend = _backend(manifest.format)
    return Embedder(
        partial(backend.open, artifact, options=options or RunOptions()),
        name=backend.name,
        image=manifest.image,
        tokenizer=(artifact.file(manifest.tokenizer.file), manifest.tokenizer),
        scalars=manifest.scalars,
        root=artifact.root,
    )


def _backend(format: str) -> Backend:
    if format == "onnx":
        from medge.runtimes.onnx_backend import OnnxBackend

        return OnnxBackend()
    if format in ("executorch", "coreml", "gguf"):
        raise MissingExtraError(f"This medge runs no {format} artifacts yet", "Export the model with --format onnx")
    raise UnsupportedError(f"'{format}' is no format that medge knows")
