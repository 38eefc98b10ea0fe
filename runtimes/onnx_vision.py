"""An image tower in ONNX: 8-bit pixels of the model's own size in, embeddings out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from medge.errors import CorruptError
from medge.runtimes.base import RunOptions
from medge.runtimes.onnx_backend import inference_session
from medge.runtimes.onnx_run import interruptible
from medge.runtimes.prefix import Pixels
from medge.runtimes.preprocess import normalized
from medge.runtimes.watch import Watch
from medge.spec import FloatArray, ImageSpec


class OnnxVision:
    """An `Encoder`."""

    def __init__(
        self, path: Path, settings: dict[str, str], image: ImageSpec, tokens: int, options: RunOptions, watch: Watch
    ) -> None:
        """Load a file that makes `tokens` embeddings of an image.

        Raises:
            CorruptError: ONNX Runtime cannot read it.
        """
        self._path, self._image, self._tokens, self._watch = path, image, tokens, watch
        self._session = inference_session(str(path), settings, options)

    def encode(self, pixels: Pixels) -> FloatArray | None:
        """See `Encoder.encode`."""
        inputs = {"pixel_values": normalized(pixels, self._image)[None]}
        found: list[Any] = []

        def run(options: Any) -> None:
            found.extend(self._session.run(["image_embeds"], inputs, options))

        if not interruptible(run, self._watch, f"ONNX Runtime cannot run {self._path}"):
            return None
        embeddings: FloatArray = found[0][0]
        if len(embeddings) != self._tokens:
            raise CorruptError(f"{self._path} does not make {self._tokens} tokens of an image", "Export it again")
        if not np.isfinite(embeddings).all():
            raise CorruptError(f"{self._path} gives NaN or infinity", "Run: medge verify ARTIFACT")
        return embeddings

    def close(self) -> None:
        """See `Encoder.close`."""
        del self._session
