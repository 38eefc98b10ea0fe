"""One inference interface over every artifact. Imports no torch."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from pathlib import Path
from typing import cast

from medge.errors import CorruptError, UnsupportedError, require_installed
from medge.manifest import Artifact, Format
from medge.runtimes.base import Backend, RunOptions
from medge.runtimes.embed import IMAGE, SCALARS, Embedder
from medge.runtimes.generate import Generator

__all__ = ["Embedder", "Generator", "RunOptions", "open", "open_embedder", "open_generator"]


def open(path: str | Path, options: RunOptions | None = None) -> Embedder | Generator:
    """Open an artifact folder of any format: an Embedder of a dual encoder, a Generator of a chat model.

    Raises:
        UsageError: no artifact there.
        CorruptError: the artifact contradicts its manifest.
        UnsupportedError: a model or layout that this medge cannot run.
        MissingExtraError: the format's runtime is not installed.
    """
    if Artifact.open(path).manifest.task == "generate":
        return open_generator(path, options)
    return open_embedder(path, options)


def open_embedder(path: str | Path, options: RunOptions | None = None) -> Embedder:
    """Open an artifact of a dual encoder.

    Raises:
        UsageError, CorruptError, UnsupportedError, MissingExtraError: as from `open`; it is a chat model.
    """
    artifact = Artifact.open(path)
    manifest = artifact.manifest
    if manifest.image is None or manifest.tokenizer is None:
        raise UnsupportedError(f"{path} is a chat model", "Use: medge generate")
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


def open_generator(path: str | Path, options: RunOptions | None = None) -> Generator:
    """Open an artifact of a chat model.

    Raises:
        UsageError, CorruptError, UnsupportedError, MissingExtraError: as from `open`; it is no chat model.
    """
    artifact = Artifact.open(path)
    if artifact.manifest.task != "generate":
        raise UnsupportedError(f"{path} is no chat model", "Use: medge classify, medge embed")
    if artifact.manifest.format not in _GENERATORS:
        raise UnsupportedError(
            f"This medge runs no chat models in {artifact.manifest.format} yet", "Use --format gguf or onnx"
        )
    module, name, package, extra = _GENERATORS[artifact.manifest.format]
    require_installed(package, extra)
    opened = getattr(importlib.import_module(module), name)(artifact, options or RunOptions())
    return cast("Generator", opened)


_GENERATORS = {
    "gguf": ("medge.runtimes.llama_backend", "LlamaGenerator", "llama_cpp", "gguf"),
    "onnx": ("medge.runtimes.onnx_generator", "OnnxGenerator", "tokenizers", "chat"),
}
"""Format -> module, class, the package that it needs, the extra that brings it."""
_COREML_NEEDS = "coremltools" if sys.platform == "darwin" else "numpy"
_BACKENDS = {
    "onnx": ("medge.runtimes.onnx_backend", "OnnxBackend", "onnxruntime", ""),
    "executorch": ("medge.runtimes.executorch_backend", "ExecutorchBackend", "executorch", "executorch"),
    # Off a Mac our own interpreter reads the package, and needs no more than numpy.
    "coreml": ("medge.runtimes.coreml_backend", "CoremlBackend", _COREML_NEEDS, "coreml"),
    "gguf": ("medge.runtimes.gguf_backend", "GgufBackend", "llama_cpp", "gguf"),
}
"""Format -> module, class, the package that it needs, the extra that brings it."""


def _backend(format: Format) -> Backend:
    module, name, package, extra = _BACKENDS[format]
    require_installed(package, extra)
    return cast("Backend", getattr(importlib.import_module(module), name)())
