"""Choosing a token in numpy, in transformers' order, under a grammar where one is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from medge.runtimes.generate import GenerateOptions
from medge.spec import FloatArray


class Constraint(Protocol):
    """What a grammar allows next."""

    def allowed(self) -> NDArray[np.bool_]:
        """(vocabulary,): which tokens may come next."""
        ...

    def accept(self, token: int) -> None:
        """Move on by a token."""
        ...


class Chooser:
    """Draws from logits as generate.py defines it."""

    def __init__(self, options: GenerateOptions) -> None:
        self._options = options
        self._random = np.random.Generator(np.random.PCG64(options.seed))

    def __call__(self, logits: FloatArray) -> int:
        """The next token by (vocabulary,) logits, of which some may be -inf."""
        options = self._options
        if options.temperature == 0:
            return int(logits.argmax())
        ids = _likeliest(logits, options.top_k)
        weights = np.exp((logits[ids] - logits[ids[0]]).astype(np.float64) / options.temperature)
        before = np.cumsum(weights) - weights
        kept = before < options.top_p * weights.sum()  # those that stand before it leave room for a token
        if options.min_p:
            kept &= weights >= options.min_p
        kept[0] = True
        reached = np.cumsum(weights[kept])
        drawn = np.searchsorted(reached, self._random.random() * reached[-1], side="right")
        return int(ids[kept][min(int(drawn), len(reached) - 1)])


def _likeliest(logits: FloatArray, count: int) -> NDArray[np.intp]:
    """Ids of the `count` largest logits, and of those equal to the last of them, best first; 0 is all."""
    if 0 < count < len(logits):
        ids = np.flatnonzero(logits >= np.partition(logits, -count)[-count])
    else:
        ids = np.arange(len(logits))
    return ids[np.argsort(-logits[ids], kind="stable")]


class ArraySampler:
    """A `Sampler` over logits in memory."""

    def __init__(
        self, logits: Callable[[], FloatArray], options: GenerateOptions, constraint: Constraint | None = None
    ) -> None:
        """`logits` gives those after the last token, to be changed at will."""
        self._logits, self._choose, self._constraint = logits, Chooser(options), constraint

    def sample(self) -> int | None:
        """See `Sampler.sample`."""
        logits = self._logits()
        if self._constraint is not None:
            allowed = self._constraint.allowed()
            if not allowed.any():
                return None
            logits[~allowed] = -np.inf
        return self._choose(logits)

    def accept(self, token: int) -> None:
        """See `Sampler.accept`."""
        if self._constraint is not None:
            self._constraint.accept(token)

    def close(self) -> None:
        """Nothing to give back."""
