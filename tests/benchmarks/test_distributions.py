"""What is kept of a distribution against direct computation on all of it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from medge.benchmarks.distributions import Kept, divergence, keep, see

VOCABULARY = 400


def make(seed: int, rows: int = 40, spread: float = 2.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).normal(size=(rows, VOCABULARY)) * spread).astype(np.float32)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = logits.astype(np.float64)
    return np.asarray(exact - np.log(np.exp(exact).sum(axis=1, keepdims=True)))


def direct(p_logits: NDArray[np.float32], q_logits: NDArray[np.float32]) -> NDArray[np.float64]:
    p, q = log_softmax(p_logits), log_softmax(q_logits)
    return np.asarray((np.exp(p) * (p - q)).sum(axis=1))


def following(rows: int = 40) -> NDArray[np.int64]:
    return np.random.default_rng(7).integers(0, VOCABULARY, rows)


def kept_of(logits: NDArray[np.float32], top: int, tail: int = 32) -> Kept:
    return keep(logits, following(len(logits)), np.random.default_rng(0), top=top, tail=tail)


def kl(p: NDArray[np.float32], q: NDArray[np.float32], top: int, tail: int = 32) -> NDArray[np.float64]:
    kept = kept_of(p, top, tail)
    return divergence(kept, see(q, following(len(q)), kept))


@pytest.mark.parametrize("top", [VOCABULARY, VOCABULARY + 100])
def test_with_the_whole_vocabulary_kept_it_is_exact(top: int) -> None:
    p, q = make(0), make(1)
    np.testing.assert_allclose(kl(p, q, top), direct(p, q), rtol=1e-10)


def test_it_runs_from_the_reference_to_the_other() -> None:
    p, q = make(0), make(1, spread=1.0)
    assert np.abs(kl(p, q, VOCABULARY) - direct(q, p)).min() > 1e-3


@pytest.mark.parametrize("top", [1, 20, 399])
def test_the_same_distribution_is_at_no_distance(top: int) -> None:
    p = make(0)
    np.testing.assert_allclose(kl(p, p + np.float32(3), top), 0, atol=1e-6)  # logits are free to a constant


def test_the_tail_is_estimated_without_bias() -> None:
    p, q = make(0, 200), make(0, 200) + 0.5 * make(2, 200)
    kept = kept_of(p, top=20)
    assert kept.tail_mass.mean() > 0.2  # or this proves nothing
    estimated, exact = kl(p, q, top=20), direct(p, q)
    assert estimated.mean() == pytest.approx(exact.mean(), rel=0.05)
    np.testing.assert_allclose(kl(p, q, top=20, tail=20_000), exact, rtol=0.15)


def test_the_tail_is_drawn_by_the_reference() -> None:
    logits = np.full((1, VOCABULARY), -30.0, np.float32)
    logits[0, :3] = (5.0, 2.0, 1.0)
    kept = kept_of(logits, top=1, tail=10_000)
    share = np.exp(2) / (np.exp(2) + np.exp(1))
    assert (kept.tail_ids == 1).mean() == pytest.approx(share, abs=0.02)
    assert set(np.unique(kept.tail_ids)) == {1, 2}


def test_it_is_never_below_its_least_possible_value() -> None:
    p, q = make(0, 200), make(1, 200)
    kept = kept_of(p, top=5, tail=1)  # one draw is often far too low
    seen = see(q, following(200), kept)
    log_p, log_q = log_softmax(p), log_softmax(q)
    value = divergence(kept, seen)
    for row in range(200):
        top = kept.top_ids[row]
        p_top, q_top = np.exp(log_p[row, top]), np.exp(log_q[row, top])
        p_rest, q_rest = 1 - p_top.sum(), 1 - q_top.sum()
        least = (p_top * np.log(p_top / q_top)).sum() + p_rest * np.log(p_rest / q_rest)
        assert value[row] >= least - 1e-9
    assert (value >= -1e-9).all()


def test_a_tail_that_only_shrank_is_exact() -> None:
    p = make(0)
    q = p.copy()
    best = kept_of(p, top=10).top_ids
    np.put_along_axis(q, best, np.take_along_axis(p, best, 1) + 1, 1)  # the others keep their proportions
    np.testing.assert_allclose(kl(p, q, top=10), direct(p, q), rtol=1e-6, atol=1e-8)


def test_a_model_sure_of_another_token_is_far_but_finite() -> None:
    p, q = make(0, 1), np.full((1, VOCABULARY), -200.0, np.float32)
    q[0, int(p[0].argmin())] = 200.0
    value = kl(p, q, top=20)
    assert np.isfinite(value).all()
    assert value[0] > 300


def test_what_is_kept_is_what_it_says() -> None:
    logits = make(3)
    kept, exact = kept_of(logits, top=12), log_softmax(logits)
    np.testing.assert_array_equal(kept.top_ids, np.argsort(-exact, axis=1)[:, :12])
    np.testing.assert_allclose(kept.top_logprobs, -np.sort(-exact, axis=1)[:, :12], rtol=1e-12)
    np.testing.assert_allclose(kept.tail_mass, 1 - np.exp(kept.top_logprobs).sum(axis=1), rtol=1e-9)
    np.testing.assert_allclose(kept.logprobs, exact[np.arange(40), following()], rtol=1e-12)
    assert not any(set(top) & set(tail) for top, tail in zip(kept.top_ids, kept.tail_ids, strict=True))
    np.testing.assert_allclose(kept.tail_logprobs, np.take_along_axis(exact, kept.tail_ids, 1), rtol=1e-12)


def test_what_is_seen_is_what_it_says() -> None:
    p, q = make(0), make(1)
    kept, exact = kept_of(p, top=12), log_softmax(make(1))
    seen = see(q, following(), kept)
    np.testing.assert_array_equal(seen.best, q.argmax(axis=1))
    np.testing.assert_allclose(seen.top_logprobs, np.take_along_axis(exact, kept.top_ids, 1), rtol=1e-12)
    np.testing.assert_allclose(np.exp(seen.log_tail), 1 - np.exp(seen.top_logprobs).sum(axis=1), rtol=1e-9)
    np.testing.assert_allclose(seen.logprobs, exact[np.arange(40), following()], rtol=1e-12)


def test_ties_and_seeds_give_the_same_twice() -> None:
    logits = np.zeros((3, VOCABULARY), np.float32)
    one, two = kept_of(logits, top=5), kept_of(logits, top=5)
    np.testing.assert_array_equal(one.top_ids, two.top_ids)
    np.testing.assert_array_equal(one.tail_ids, two.tail_ids)
