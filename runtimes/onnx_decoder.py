"""A decoder in ONNX: decoder.onnx over a cache that it updates in place, fed by embedding.onnx.

What the graph's inputs mean is told where they are made, in export/onnx_decoder.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from medge.errors import CorruptError, UsageError
from medge.manifest import Artifact
from medge.runtimes.base import RunOptions
from medge.runtimes.onnx_backend import OnnxSession, explain, inference_session
from medge.runtimes.onnx_run import interruptible
from medge.runtimes.watch import Watch
from medge.spec import FloatArray

SLACK = 512
"""Places that a layer with a window has beside that window: it moves its keys that seldom, and so far back an
earlier place in the sequence can be returned to."""


class OnnxDecoder:
    """A `Decoder`."""

    def __init__(self, artifact: Artifact, context: int, options: RunOptions, watch: Watch) -> None:
        """Load both graphs and allocate the cache.

        Raises:
            CorruptError: ONNX Runtime cannot read a file.
            UsageError: there is not enough memory for the cache.
        """
        settings = artifact.manifest.session
        self._embedding = OnnxSession(str(artifact.part_path("embedding")), settings, options)
        self._path = str(artifact.part_path("decoder"))
        self._session = inference_session(self._path, settings, options)
        self._watch = watch
        facts = self._session.get_modelmeta().custom_metadata_map
        self._window = int(facts.get("window", 0))
        self._room = max(self._window, min(context, self._window + SLACK))
        self.vocabulary_size = int(self._session.get_outputs()[0].shape[-1])
        self._binding = self._session.io_binding()
        self._ones = np.ones((1, context), np.int64)
        self._images = any(found.name == "is_image" for found in self._session.get_overridable_initializers())
        self._cache = self._allocate(context)
        self._length = 0
        self._whole = True
        self._logits: FloatArray = np.empty((0, self.vocabulary_size), np.float32)

    def _allocate(self, context: int) -> list[Any]:
        """Bind each layer's keys and values, as input and as output, to one piece of memory."""
        import onnxruntime

        values = []
        places = {"context": context, "window": self._room}
        for found in self._session.get_inputs():
            if found.name.startswith("past_key_values."):
                shape = [places.get(size, size) for size in found.shape]
                try:
                    value = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
                except (MemoryError, RuntimeError):
                    raise UsageError(
                        f"No memory for a context of {context:,} tokens", "Open the artifact with a smaller one"
                    ) from None
                self._binding.bind_ortvalue_input(found.name, value)
                self._binding.bind_ortvalue_output(found.name.replace("past_key_values", "present"), value)
                values.append(value)
        return values

    def keep(self, length: int) -> bool:
        """See `Decoder.keep`. Layers with a window have evicted what it has passed, now and then."""
        if length and self._whole and length <= self._length and self._reachable(length):
            self._length = length
            return True
        self.clear()
        return False

    def _reachable(self, length: int) -> bool:
        """Whether a shorter sequence's keys lie where they would lie if no more had come."""
        if not self._window:
            return True
        return self._resident(length) == self._resident(self._length) - (self._length - length)

    def _resident(self, length: int) -> int:
        """Places that a layer with a window holds after `length` tokens, by GroupQueryAttention's own rule."""
        gap = self._room - self._window + 1
        return length - gap * max(0, -(-(length - self._room) // gap))

    def clear(self) -> None:
        """See `Decoder.clear`."""
        self._length, self._whole = 0, True

    def step(self, token: int) -> None:
        """See `Decoder.step`."""
        self._bind(self._embedded([token]), 1, image=False)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise explain(f"ONNX Runtime cannot run {self._path}", error) from error
        self._advance(1)

    def tokens(self, ids: Sequence[int], outputs: int = 0) -> bool:
        """See `Decoder.tokens`."""
        return self._append(self._embedded(ids), outputs, image=False)

    def image(self, embeddings: FloatArray, outputs: int = 0) -> bool:
        """See `Decoder.image`."""
        return self._append(embeddings[None], outputs, image=True)

    def logits(self) -> FloatArray:
        """See `Decoder.logits`."""
        row: FloatArray = self._finite()[-1].copy()
        return row

    def block(self, count: int) -> FloatArray:
        """See `Decoder.block`."""
        return self._finite()[-count:].copy()

    def close(self) -> None:
        """See `Decoder.close`."""
        del self._binding, self._cache, self._session, self._embedding

    def _embedded(self, ids: Sequence[int]) -> FloatArray:
        found = self._embedding.run({"input_ids": np.array([ids], np.int64)})
        return found["inputs_embeds"]

    def _append(self, embeddings: FloatArray, outputs: int, *, image: bool) -> bool:
        self._bind(embeddings, outputs, image=image)

        def run(options: Any) -> None:
            self._session.run_with_iobinding(self._binding, options)

        self._whole = interruptible(run, self._watch, f"ONNX Runtime cannot run {self._path}")
        if self._whole:
            self._advance(embeddings.shape[1])
        return self._whole

    def _bind(self, embeddings: FloatArray, outputs: int, *, image: bool) -> None:
        import onnxruntime

        inputs: dict[str, Any] = {
            "inputs_embeds": np.ascontiguousarray(embeddings, np.float32),
            "attention_mask": self._ones[:, : self._length + embeddings.shape[1]],
            "logits_to_keep": np.array([outputs], np.int64),
        }
        if self._images:
            inputs["is_image"] = np.array([image])
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in inputs.items()}
        for name, value in values.items():
            self._binding.bind_ortvalue_input(name, value)
        self._inputs = values  # they are not copied, and have to live until they are read
        self._binding.bind_output("logits")

    def _advance(self, count: int) -> None:
        self._length += count
        self._logits = self._binding.get_outputs()[-1].numpy()[0]

    def _finite(self) -> FloatArray:
        if not np.isfinite(self._logits).all():
            raise CorruptError(f"{self._path} gives NaN or infinity", "Run: medge verify ARTIFACT")
        return self._logits
