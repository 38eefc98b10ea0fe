"""What the cache of keys and values holds, and how a prompt is laid over it without computing a common prefix again.

Images are compared by the hash of their pixels. Their embeddings are kept as well: an image that only moved, or whose
keys and values a sliding window has dropped, is not sent through the tower again.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medge.errors import UsageError
from medge.runtimes.generate import Tally
from medge.runtimes.watch import Watch
from medge.spec import FloatArray

EMBEDDING_BYTES = 128 * 2**20
"""Room for the embeddings of about 50 images of MedGemma 4B."""

BATCH = 512
"""Tokens computed at once; an image's always are, since each sees all of the others."""
ROWS = 128
"""Tokens whose logits are kept at once, at most: 134 MB over Gemma's vocabulary."""

Cell = int | str
"""One place of a prompt: a token, or all of an image by its hash."""
Pixels = NDArray[np.uint8]


class Decoder(Protocol):
    """A decoder and its cache of keys and values over one sequence, which only its end changes."""

    def keep(self, length: int) -> bool:
        """Cut the sequence to its first `length` positions. False, and all is gone, where those cannot be built on."""
        ...

    def clear(self) -> None:
        """Forget the sequence."""
        ...

    def step(self, token: int) -> None:
        """Append one token; its logits are then at `logits`."""
        ...

    def tokens(self, ids: Sequence[int], outputs: int = 0) -> bool:
        """Append up to BATCH tokens, keeping the logits of the last `outputs`. False when cancelled within."""
        ...

    def image(self, embeddings: FloatArray, outputs: int = 0) -> bool:
        """Append an image's (N, D) embeddings, each seeing all of them. False when cancelled within."""
        ...

    def logits(self) -> FloatArray:
        """(vocabulary,) logits after the last token, a copy.

        Raises:
            CorruptError: the weights give no numbers.
        """
        ...

    def block(self, count: int) -> FloatArray:
        """(count, vocabulary) logits: all that the last call kept, a copy.

        Raises:
            CorruptError: the weights give no numbers.
        """
        ...

    def close(self) -> Any:
        """Give the memory back."""
        ...


class Encoder(Protocol):
    """An image tower with its projector."""

    def encode(self, pixels: Pixels) -> FloatArray | None:
        """(S, S, 3) 8-bit RGB -> (tokens, D) float32, or None when cancelled within.

        Raises:
            CorruptError: the weights give no numbers, or not as many as stated.
        """
        ...

    def close(self) -> Any:
        """Give the memory back."""
        ...


def image_hash(pixels: Pixels) -> str:
    """What an image is known by."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()


class Prefix:
    """The cells whose keys and values a context holds, always the first ones of what it holds."""

    def __init__(
        self, context: Decoder, open_vision: Callable[[], Encoder] | None, image_tokens: int, watch: Watch
    ) -> None:
        self._context, self._open_vision, self._image_tokens, self._watch = context, open_vision, image_tokens, watch
        self._vision: Encoder | None = None
        self._cells: list[Cell] = []
        self._embeddings: OrderedDict[str, FloatArray] = OrderedDict()

    def fill(self, cells: Sequence[Cell], last: int, pixels: Mapping[str, Pixels], tally: Tally) -> bool:
        """Make the context hold these cells and the last token, with the logits after it. False when cancelled within.

        The last token is always computed by itself: a batch rounds otherwise, and a prompt asked again, of which only
        that token is left to compute, would draw other tokens from the same seed.
        """
        self._reuse(cells, tally)
        for run in _runs(cells[len(self._cells) :]):
            done = self._image(run, pixels, tally) if isinstance(run, str) else self._tokens(run, tally)
            if self._watch.check() or not done:
                return False
        with timed(tally, "prefill"):
            self.append(last)
        return True

    def append(self, token: int) -> None:
        """Continue by one token, with the logits after it."""
        self._context.step(token)
        self._cells.append(token)

    def blocks(self, cells: Sequence[Cell], pixels: Mapping[str, Pixels]) -> Iterator[FloatArray]:
        """Fill the context anew, giving the logits of every place in blocks of rows."""
        self.clear()
        for run in _runs(cells, ROWS):
            count = self._image_tokens if isinstance(run, str) else len(run)
            if isinstance(run, str):
                self._image(run, pixels, Tally(), count)
            else:
                self._tokens(run, Tally(), count)
            self._watch.check()  # an interrupt within has left a block half computed
            yield self._context.block(count)

    def clear(self) -> None:
        """Forget the cells; embeddings stay."""
        self._context.clear()
        self._cells = []

    def forget(self) -> None:
        """Forget the cells and the images."""
        self.clear()
        self._embeddings.clear()

    def close(self) -> None:
        """Give the tower's memory back."""
        if self._vision is not None:
            self._vision.close()

    def _reuse(self, cells: Sequence[Cell], tally: Tally) -> None:
        """Cut to what both begin with."""
        pairs = zip(self._cells, cells, strict=False)
        same = next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(self._cells), len(cells)))
        length = self._length(cells[:same])
        if not self._context.keep(length):
            same = length = 0
        self._cells = list(cells[:same])
        tally.reused_tokens = length

    def _length(self, cells: Sequence[Cell]) -> int:
        """Positions that cells take."""
        return sum(self._image_tokens if isinstance(cell, str) else 1 for cell in cells)

    def _tokens(self, ids: list[int], tally: Tally, outputs: int = 0) -> bool:
        with timed(tally, "prefill"):
            done = self._context.tokens(ids, outputs)
        if done:
            self._cells += ids
        return done

    def _image(self, key: str, pixels: Mapping[str, Pixels], tally: Tally, outputs: int = 0) -> bool:
        embeddings = self._encoded(key, pixels, tally)
        if embeddings is None:
            return False
        with timed(tally, "prefill"):
            done = self._context.image(embeddings, outputs)
        if done:
            self._cells.append(key)
        return done

    def _tower(self) -> Encoder:
        if self._vision is None:
            if self._open_vision is None:
                raise UsageError("An image is given and the model has no image tower", "Leave the image out")
            self._vision = self._open_vision()
        return self._vision

    def _encoded(self, key: str, pixels: Mapping[str, Pixels], tally: Tally) -> FloatArray | None:
        """An image's embeddings, from the tower if they are not kept; None when cancelled within."""
        if key in self._embeddings:
            self._embeddings.move_to_end(key)
            return self._embeddings[key]
        with timed(tally, "vision"):
            embeddings = self._tower().encode(pixels[key])
        if embeddings is not None:
            tally.images_encoded += 1
            self._embeddings[key] = embeddings
            while len(self._embeddings) > max(1, EMBEDDING_BYTES // embeddings.nbytes):
                self._embeddings.popitem(last=False)
        return embeddings


def _runs(cells: Sequence[Cell], size: int = BATCH) -> Iterator[list[int] | str]:
    """Images one by one, and the tokens between them in batches."""
    run: list[int] = []
    for cell in cells:
        if isinstance(cell, int):
            run.append(cell)
        if run and (isinstance(cell, str) or len(run) == size):
            yield run
            run = []
        if isinstance(cell, str):
            yield cell
    if run:
        yield run


@contextmanager
def timed(tally: Tally, phase: str) -> Iterator[None]:
    """Add what happens within to a phase."""
    start = time.perf_counter()
    try:
        yield
    finally:
        tally.seconds[phase] += time.perf_counter() - start
