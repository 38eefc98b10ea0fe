"""The image tower through libmtmd: 8-bit pixels of the model's own size in, embeddings out.

libmtmd resizes too, but never what already has the model's size; so the pixels are those of
`medge.runtimes.preprocess`, which equal transformers' to the last level. Of the three pieces that it makes of an
image only the middle one is used: the marks around the image belong to the text (chat.py).
"""

from __future__ import annotations

import ctypes
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medge.errors import CorruptError, require
from medge.runtimes.gguf_header import F16, F32, GgufHeader
from medge.runtimes.llama_model import Model, complaints, refused
from medge.runtimes.watch import Watch
from medge.spec import FloatArray

_IMAGE = 1
"""mtmd's type of a piece."""
_ASK_EVERY = 16
"""Nodes of the graph between two questions whether to stop: of a full-size tower about a second."""


def check_tower(path: Path, size: int) -> None:
    """Find in the header what libmtmd would compute wrongly without a word.

    Raises:
        CorruptError: the file is damaged, wants images of another size than `size`, which libmtmd would resize a second
            time, or holds its projection in blocks, which libmtmd transposes as if they were numbers.
    """
    with GgufHeader(path) as header:
        if header.number("clip.vision.image_size") != size:
            raise CorruptError(
                f"{path} takes no images of {size} px, as its manifest says", "Export the artifact again"
            )
        if header.type("mm.input_projection.weight") not in (None, F32, F16):
            raise CorruptError(
                f"{path} holds its projection in blocks: every answer about an image would be wrong",
                "Export the artifact again; the projection stays in F16",
            )


class Vision:
    """One mmproj file."""

    def __init__(self, path: Path, model: Model, threads: int, tokens: int, watch: Watch) -> None:
        """Load it; `tokens` is how many embeddings an image must give.

        Raises:
            CorruptError: libmtmd cannot load it, or it belongs to another text model.
        """
        self._mtmd: Any = require("llama_cpp.mtmd_cpp", "gguf")
        self._path, self._model, self._tokens, self._watch = path, model, tokens, watch
        observe = model.api.ggml_backend_sched_eval_callback(_Observer(watch))
        settings = self._mtmd.mtmd_context_params_default()
        settings.n_threads, settings.print_timings, settings.warmup = threads, False, False
        settings.cb_eval = observe
        with complaints() as said:
            self._handle = self._mtmd.mtmd_init_from_file(bytes(path), model.handle, settings)
        if not self._handle:
            raise refused(path, said)
        self.close = weakref.finalize(self, _free, self._mtmd, self._handle, model, observe)  # keeps them

    def encode(self, pixels: NDArray[np.uint8]) -> FloatArray | None:
        """(S, S, 3) 8-bit RGB -> (tokens, width) float32, or None when cancelled within.

        Raises:
            CorruptError: the file's token count is not the artifact's, or it gives no numbers.
        """
        chunks = self._mtmd.mtmd_input_chunks_init()
        try:
            chunk = self._chunk(chunks, pixels)
            failed = self._mtmd.mtmd_encode_chunk(self._handle, chunk)
            if self._watch.check():
                return None
            if failed:
                raise CorruptError(f"libmtmd cannot encode an image with {self._path}", "Run: medge verify ARTIFACT")
            return self._output()
        finally:
            self._mtmd.mtmd_input_chunks_free(chunks)

    def _output(self) -> FloatArray:
        pointer = self._mtmd.mtmd_get_output_embd(self._handle)
        values: FloatArray = np.ctypeslib.as_array(pointer, (self._tokens, self._model.width)).copy()
        if not np.isfinite(values).all():
            raise CorruptError(f"{self._path} gives NaN or infinity", "Run: medge verify ARTIFACT")
        return values

    def _chunk(self, chunks: Any, pixels: NDArray[np.uint8]) -> Any:
        """The piece that holds the image; it lives as long as `chunks`."""
        bitmap = self._bitmap(pixels)
        try:
            failed = self._mtmd.mtmd_tokenize(self._handle, chunks, ctypes.byref(self._text()), _array(bitmap), 1)
        finally:
            self._mtmd.mtmd_bitmap_free(bitmap)
        count = 0 if failed else self._mtmd.mtmd_input_chunks_size(chunks)
        found = (self._mtmd.mtmd_input_chunks_get(chunks, i) for i in range(count))
        images = [piece for piece in found if self._mtmd.mtmd_input_chunk_get_type(piece) == _IMAGE]
        if [self._mtmd.mtmd_input_chunk_get_n_tokens(piece) for piece in images] != [self._tokens]:
            raise CorruptError(f"{self._path} does not make {self._tokens} tokens of an image", "Export it again")
        return images[0]

    def _bitmap(self, pixels: NDArray[np.uint8]) -> Any:
        rows = np.ascontiguousarray(pixels)
        data = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        return self._mtmd.mtmd_bitmap_init(rows.shape[1], rows.shape[0], data)  # copies

    def _text(self) -> Any:
        marker = self._mtmd.mtmd_default_marker()
        return self._mtmd.mtmd_input_text(marker, len(marker), False, True)


class _Observer:
    """libmtmd asks which nodes of the graph to show (`ask`), then shows them: not true there ends the computation."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._nodes = 0

    def __call__(self, _: Any, ask: bool, __: Any) -> bool:
        if not ask:
            return not self._watch()
        self._nodes += 1
        return self._nodes % _ASK_EVERY == 0


def _array(bitmap: Any) -> Any:
    return (ctypes.c_void_p * 1)(bitmap)


def _free(mtmd: Any, handle: Any, *_: Any) -> None:
    mtmd.mtmd_free(handle)
