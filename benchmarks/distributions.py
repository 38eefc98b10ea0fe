"""Next-token distributions, kept small: what it takes to say how far another model's are from them.

A distribution over Gemma's 262,208 tokens is a megabyte. Kept of it are its K likeliest tokens with their
log-probabilities, the mass of all the others (the tail), and M tokens drawn from the tail by its own probabilities.
The Kullback–Leibler divergence from p (kept) to q (another model's, seen whole) is then

    sum over the K of p log(p/q)  +  P · (mean over the M of log(p/q))          P, Q: the tails' masses

The first sum is exact. The second term is an unbiased estimate of the tail's share, since the tail is drawn by p;
and it is never taken below P log(P/Q), which the tail's share cannot be less than (log-sum inequality, Cover &
Thomas, Elements of Information Theory, theorem 2.7.1). With K at the vocabulary's size nothing is estimated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from medge.spec import FloatArray

TOP, TAIL = 128, 32
"""K and M: 1.3 kB a place. On text, Gemma 3 has 92 to 99.9 % of the mass among 128 tokens."""
_ROWS = 8
"""Distributions in work at once: 17 MB a copy over Gemma's vocabulary, which the allocator keeps for the next."""

Ids = NDArray[np.int64]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Rows:
    """Arrays of equal length, a row a place."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    @classmethod
    def join(cls, parts: Iterable[Self]) -> Self:
        """The rows of all parts, in order."""
        listed = list(parts)
        return cls(*(np.concatenate([getattr(part, field.name) for part in listed]) for field in fields(cls)))

    def rows(self, start: int, stop: int) -> Self:
        """Rows `start` to `stop`."""
        return type(self)(*(getattr(self, field.name)[start:stop] for field in fields(self)))


@dataclass(frozen=True)
class Kept(Rows):
    """The reference's distributions at R places."""

    top_ids: Ids
    """(R, K), the likeliest first."""
    top_logprobs: Doubles
    """(R, K) natural logarithms."""
    tail_ids: Ids
    """(R, M), drawn from what is not among the K."""
    tail_logprobs: Doubles
    """(R, M)."""
    tail_mass: Doubles
    """(R,) probability of all that is not among the K."""
    logprobs: Doubles
    """(R,) of the token that the text has next."""


@dataclass(frozen=True)
class Seen(Rows):
    """Another model's distributions, at the same places and tokens."""

    best: Ids
    """(R,) its likeliest token."""
    top_logprobs: Doubles
    tail_logprobs: Doubles
    log_tail: Doubles
    """(R,) logarithm of the mass of what is not among the reference's K; -inf where these are all tokens."""
    logprobs: Doubles


def keep(logits: FloatArray, following: Ids, rng: np.random.Generator, *, top: int = TOP, tail: int = TAIL) -> Kept:
    """Distil (R, vocabulary) logits, with the (R,) tokens that the text has next."""
    return Kept.join(_keep(part, ids, rng, min(top, logits.shape[1]), tail) for part, ids in _parts(logits, following))


def see(logits: FloatArray, following: Ids, kept: Kept) -> Seen:
    """Read (R, vocabulary) logits of another model where the reference's distributions were kept."""
    starts = range(0, len(kept), _ROWS)
    parts = zip(_parts(logits, following), starts, strict=True)
    return Seen.join(_see(part, ids, kept.rows(start, start + _ROWS)) for (part, ids), start in parts)


def divergence(kept: Kept, seen: Seen) -> Doubles:
    """(R,) Kullback–Leibler divergences from the reference to the other model, in nats; see the module."""
    p = np.exp(kept.top_logprobs)
    exact = (p * (kept.top_logprobs - seen.top_logprobs)).sum(axis=1)
    has_tail = kept.tail_mass > 0
    mass = kept.tail_mass[has_tail]
    bound = mass * (np.log(mass) - seen.log_tail[has_tail])
    drawn = mass * (kept.tail_logprobs - seen.tail_logprobs)[has_tail].mean(axis=1)
    exact[has_tail] += np.maximum(bound, drawn)
    return np.asarray(exact, np.float64)


def _parts(logits: FloatArray, following: Ids) -> Iterator[tuple[Doubles, Ids]]:
    """Log-probabilities, some rows at a time."""
    for start in range(0, len(logits), _ROWS):
        part = logits[start : start + _ROWS].astype(np.float64)
        part -= _log_sum(part)[:, None]
        yield part, following[start : start + _ROWS]


def _log_sum(values: Doubles) -> Doubles:
    """log Σ exp over the last axis; -inf where all are."""
    highest = values.max(axis=-1)
    finite = np.where(np.isfinite(highest), highest, 0.0)
    shifted = values - finite[..., None]
    np.exp(shifted, out=shifted)  # in place, here and below: memory that is asked for anew is cleared by the system
    with np.errstate(divide="ignore"):
        return np.asarray(finite + np.log(shifted.sum(axis=-1)), np.float64)


def _keep(logprobs: Doubles, following: Ids, rng: np.random.Generator, top: int, tail: int) -> Kept:
    chosen = np.argpartition(-logprobs, top - 1, axis=1)[:, :top]
    order = np.lexsort((chosen, -_at(logprobs, chosen)), axis=1)
    top_ids = _at(chosen, order)
    rest = _without(logprobs, top_ids)
    np.exp(rest, out=rest)
    tail_ids = np.stack([_draw(row, tail, rng) for row in rest])
    return Kept(
        top_ids=top_ids,
        top_logprobs=_at(logprobs, top_ids),
        tail_ids=tail_ids,
        tail_logprobs=_at(logprobs, tail_ids),
        tail_mass=rest.sum(axis=1),
        logprobs=_at(logprobs, following[:, None])[:, 0],
    )


def _see(logprobs: Doubles, following: Ids, kept: Kept) -> Seen:
    return Seen(
        best=logprobs.argmax(axis=1),
        top_logprobs=_at(logprobs, kept.top_ids),
        tail_logprobs=_at(logprobs, kept.tail_ids),
        log_tail=_log_sum(_without(logprobs, kept.top_ids)),
        logprobs=_at(logprobs, following[:, None])[:, 0],
    )


def _at(values: NDArray[Any], ids: Ids) -> Any:
    return np.take_along_axis(values, ids, axis=1)


def _without(logprobs: Doubles, ids: Ids) -> Doubles:
    rest = logprobs.copy()
    np.put_along_axis(rest, ids, -np.inf, axis=1)
    return rest


def _draw(weights: Doubles, count: int, rng: np.random.Generator) -> Ids:
    """`count` indices by (vocabulary,) weights, with replacement; zeros where there is no weight at all."""
    cumulated = np.cumsum(weights)
    at = rng.random(count) * cumulated[-1]
    drawn = np.searchsorted(cumulated, at, side="right").clip(max=len(weights) - 1)
    return np.asarray(drawn * (cumulated[-1] > 0), np.int64)
