"""A llama.cpp context: the cache of keys and values, filled in batches of tokens or of image embeddings."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from medge.errors import CorruptError, UsageError
from medge.runtimes.llama_model import Model, complaints
from medge.runtimes.prefix import BATCH, ROWS
from medge.runtimes.watch import Watch
from medge.spec import FloatArray

_ABORTED = 2


class Context:
    """One sequence."""

    def __init__(self, model: Model, size: int, threads: int, watch: Watch, image_tokens: int) -> None:
        """Allocate the cache for `size` tokens; an image's `image_tokens` are appended at once.

        Raises:
            UsageError: there is not enough memory for it.
        """
        self._api, self._model, self._watch = model.api, model, watch
        settings = self._settings(size, threads, image_tokens)
        with complaints():
            self._handle = self._api.llama_init_from_model(model.handle, settings)
        if not self._handle:
            raise UsageError(f"No memory for a context of {size:,} tokens", "Open the artifact with a smaller one")
        self.close = weakref.finalize(self, _free, self._api, self._handle, model)  # keeps the model until then
        self._memory = self._api.llama_get_memory(self._handle)
        self._abort = self._api.ggml_abort_callback(watch)
        self._no_abort = self._api.ggml_abort_callback()
        self._one = (ctypes.c_int32 * 1)()
        self._step = self._api.llama_batch_get_one(self._one, 1)

    def _settings(self, size: int, threads: int, image_tokens: int) -> Any:
        settings = self._api.llama_context_default_params()
        settings.n_ctx = size
        settings.n_batch = settings.n_ubatch = max(BATCH, image_tokens)
        settings.n_outputs_max = max(ROWS, image_tokens)
        settings.n_threads = settings.n_threads_batch = threads
        # llama.cpp's flash attention sums values in float16 when few tokens are computed: an error of 0.04 against
        # 0.006, of logits of deviation 1, at 1,780 tokens. On a CPU it gains nothing: with it, a 4B model's prefill
        # took 0.98 of the time and decoding at 1,536 tokens 1.07.
        settings.flash_attn_type = self._api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.swa_full = False  # sliding-window layers keep their window, not the whole context
        return settings

    @property
    def handle(self) -> Any:
        """llama.cpp's handle."""
        return self._handle

    def keep(self, length: int) -> bool:
        """Cut the sequence to its first `length` positions. False, and all is gone, where those cannot be built on.

        Sliding-window layers have dropped what their window has passed: after a long answer, going back to before it
        would leave the next token without part of its window.
        """
        first = self._api.llama_memory_seq_pos_min(self._memory, 0)
        whole = first <= max(0, length - self._model.window) if self._model.window else True
        if length and whole and self._api.llama_memory_seq_rm(self._memory, 0, length, -1):
            return True
        self.clear()
        return False

    def clear(self) -> None:
        """Forget the sequence."""
        self._api.llama_memory_clear(self._memory, False)

    def step(self, token: int) -> None:
        """Append one token; its logits are then at `logits`."""
        self._one[0] = token
        self._check(self._api.llama_decode(self._handle, self._step))

    def tokens(self, ids: Sequence[int], outputs: int = 0) -> bool:
        """Append up to BATCH tokens, keeping the logits of the last `outputs`. False when cancelled within."""
        batch = self._api.llama_batch(n_tokens=len(ids), token=(ctypes.c_int32 * len(ids))(*ids))
        return self._append(batch, outputs)

    def image(self, embeddings: FloatArray, outputs: int = 0) -> bool:
        """Append an image's (N, width) embeddings, each seeing all of them. False when cancelled within."""
        rows = np.ascontiguousarray(embeddings, np.float32)
        pointer = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        self._api.llama_set_causal_attn(self._handle, False)
        try:
            return self._append(self._api.llama_batch(n_tokens=len(rows), embd=pointer), outputs)
        finally:
            self._api.llama_set_causal_attn(self._handle, True)

    def _append(self, batch: Any, outputs: int) -> bool:
        """Positions and the sequence are left to llama.cpp, which continues where it is."""
        marks = [0] * (batch.n_tokens - outputs) + [1] * outputs
        batch.logits = (ctypes.c_int8 * batch.n_tokens)(*marks)
        self._api.llama_set_abort_callback(self._handle, self._abort, None)
        try:
            return self._check(self._api.llama_decode(self._handle, batch))
        finally:  # not while decoding: a question for each of a graph's nodes would cost a token's time
            self._api.llama_set_abort_callback(self._handle, self._no_abort, None)

    def _check(self, code: int) -> bool:
        if code not in (0, _ABORTED):
            raise CorruptError(f"llama.cpp fails to compute (code {code})", "Run: medge verify ARTIFACT")
        return code == 0

    def logits(self) -> FloatArray:
        """(vocabulary,) logits after the last token, a copy.

        Raises:
            CorruptError: the weights give no numbers.
        """
        return self._finite(self._api.llama_get_logits_ith(self._handle, -1), (self._model.vocabulary_size,))

    def block(self, count: int) -> FloatArray:
        """(count, vocabulary) logits: all that the last batch kept, a copy.

        Raises:
            CorruptError: the weights give no numbers.
        """
        return self._finite(self._api.llama_get_logits(self._handle), (count, self._model.vocabulary_size))

    def _finite(self, pointer: Any, shape: tuple[int, ...]) -> FloatArray:
        values: FloatArray = np.ctypeslib.as_array(pointer, shape).copy()
        if not np.isfinite(values).all():
            raise CorruptError(f"{self._model.path} gives NaN or infinity", "Run: medge verify ARTIFACT")
        return values


def _free(api: Any, handle: Any, _: Model) -> None:
    api.llama_free(handle)
