"""Each metric against direct computation, and answers as SQuAD compares them."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from medge.benchmarks.chat_metrics import (
    CHAT_BY_NAME,
    CHAT_LIMITS,
    MIN_PLACES,
    Answered,
    ChatEvidence,
    exact_match,
    first_difference,
    normalized,
    token_f1,
)
from medge.benchmarks.distributions import keep, see
from medge.benchmarks.metrics import load_limits
from medge.benchmarks.stats import Estimate
from medge.errors import UsageError
from medge.prompts import Kind
from medge.quantize import scheme

ROWS, VOCABULARY = 150, 60


def logits(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(ROWS, VOCABULARY)).astype(np.float32) * 3


def log_softmax(values: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = values.astype(np.float64)
    return np.asarray(exact - np.log(np.exp(exact).sum(axis=1, keepdims=True)))


THEIRS, OURS = logits(0), (logits(0) + 0.3 * logits(1)).astype(np.float32)
NEXT = np.random.default_rng(2).integers(0, VOCABULARY, ROWS)
GIVEN = np.arange(ROWS) % 3 > 0


def evidence(answers: Sequence[Answered] = (), rows: int = ROWS, given: NDArray[np.bool_] = GIVEN) -> ChatEvidence:
    kept = keep(THEIRS[:rows], NEXT[:rows], np.random.default_rng(0))
    return ChatEvidence(kept, see(OURS[:rows], NEXT[:rows], kept), given[:rows], answers)


def measure(metric: str, found: ChatEvidence) -> Any:
    run = CHAT_BY_NAME[metric].measure
    assert run is not None
    return run(found)


def value(metric: str, found: ChatEvidence) -> float:
    estimate = measure(metric, found)
    assert isinstance(estimate, Estimate)
    assert estimate.value is not None
    return estimate.value


def answered(kind: Kind, right: str, theirs: str, ours: str, **fields: Any) -> Answered:
    return Answered(kind, right, theirs, ours, **fields)


def test_divergence_is_the_mean_and_the_99th_percentile_over_places() -> None:
    p, q = log_softmax(THEIRS), log_softmax(OURS)
    direct = (np.exp(p) * (p - q)).sum(axis=1)
    assert value("kl_mean", evidence()) == pytest.approx(direct.mean(), rel=1e-9)
    assert value("kl_p99", evidence()) == pytest.approx(np.quantile(direct, 0.99), rel=1e-9)


def test_few_places_have_no_99th_percentile() -> None:
    estimate = measure("kl_p99", evidence(rows=MIN_PLACES - 1))
    assert estimate.value is None
    assert "places" in estimate.undefined


def test_top1_agreement_counts_equal_argmaxes_where_the_reference_is_decided() -> None:
    same = THEIRS.argmax(axis=1) == OURS.argmax(axis=1)
    ordered = np.sort(log_softmax(THEIRS), axis=1)
    decided = np.exp(ordered[:, -1]) >= 2 * np.exp(ordered[:, -2])
    assert same.mean() < same[decided].mean() < 1  # or this proves nothing
    assert value("token_top1_agreement", evidence()) == pytest.approx(same[decided].mean())
    assert evidence().same_first.mean() == pytest.approx(same.mean())


def test_a_reference_that_is_nowhere_decided_has_no_top1_to_keep() -> None:
    flat = np.zeros((30, VOCABULARY), np.float32)
    kept = keep(flat, NEXT[:30], np.random.default_rng(0))
    found = ChatEvidence(kept, see(flat, NEXT[:30], kept), GIVEN[:30], ())
    assert "decided at 0 places" in measure("token_top1_agreement", found)


def test_perplexity_ratio_is_that_of_the_given_text_alone() -> None:
    theirs, ours = (log_softmax(x)[np.arange(ROWS), NEXT][GIVEN] for x in (THEIRS, OURS))
    direct = np.exp(-ours.mean()) / np.exp(-theirs.mean())
    assert value("perplexity_ratio", evidence()) == pytest.approx(direct, rel=1e-9)
    estimate = measure("perplexity_ratio", evidence())
    assert estimate.low < estimate.value < estimate.high
    assert "reference's own" in measure("perplexity_ratio", evidence(given=np.zeros(ROWS, bool)))


@pytest.mark.parametrize(
    ("theirs", "ours", "at"),
    [
        ((1, 2, 3), (1, 2, 3), None),
        ((1, 2, 3), (1, 9, 3), 1),
        ((1, 2), (1, 2, 3), 2),
        ((), (4,), 0),
        ((), (), None),
    ],
)
def test_first_difference(theirs: tuple[int, ...], ours: tuple[int, ...], at: int | None) -> None:
    assert first_difference(theirs, ours) == at


def test_an_answers_prefix_is_its_share_of_the_longer_answer() -> None:
    found = evidence(
        [
            answered("f1", "x", "a", "a", their_tokens=(1, 2), our_tokens=(1, 2)),
            answered("exact", "x", "a", "b", their_tokens=(1, 2, 3, 4), our_tokens=(1, 9)),
            answered("choice", "A", "A", "B"),
        ]
    )
    assert value("answer_prefix", found) == pytest.approx((1 + 0.25) / 2)
    assert "freely" in measure("answer_prefix", evidence([answered("choice", "A", "A", "A")]))


@pytest.mark.parametrize(
    ("text", "right", "match", "f1"),
    [
        ("The heart.", "heart", 1, 1),
        ("a chest X-ray", "Chest xray!", 1, 1),
        ("left lung", "the left lower lung", 0, 0.8),
        ("lung lung", "lung", 0, 2 / 3),
        ("bone", "lung", 0, 0),
        ("", "lung", 0, 0),
        ("the", "", 1, 1),
        ("anterior", "an terior", 0, 0),
    ],
)
def test_answers_compare_as_in_squad(text: str, right: str, match: float, f1: float) -> None:
    assert exact_match(text, right) == match
    assert token_f1(text, right) == pytest.approx(f1)
    assert token_f1(right, text) == pytest.approx(f1)


def test_articles_go_as_words_only() -> None:
    assert normalized("An  theatre, a cat") == ["theatre", "cat"]


def test_tasks_are_changes_against_the_reference() -> None:
    found = evidence(
        [
            answered("exact", "yes", "Yes.", "no"),
            answered("exact", "no", "no", "No"),
            answered("f1", "left lung", "left lung", "left"),
            *(answered("choice", "A", "A", "B" if i < 3 else "A", choices=3) for i in range(9)),
            answered("choice", "A", "B", "A", choices=3),
        ]
    )
    assert value("exact_match_delta", found) == -0.5
    assert value("token_f1_delta", found) == pytest.approx(2 / 3 - 1)
    assert value("choice_accuracy_delta", found) == pytest.approx(-0.2)
    assert "kind 'f1'" in measure("token_f1_delta", evidence([answered("choice", "A", "A", "A")]))


@pytest.mark.parametrize(("right", "judged"), [(4, False), (6, False), (7, True), (10, True)])
def test_a_task_that_the_reference_answers_by_luck_judges_nothing(right: int, judged: bool) -> None:
    """Of 10 among 3, chance gets 7 or more with probability .0197, 6 or more with .0766."""
    answers = [answered("choice", "A", "A" if i < right else "B", "B", choices=3) for i in range(10)]
    found = measure("choice_accuracy_delta", evidence(answers))
    assert isinstance(found, Estimate) == judged
    if not judged:
        assert "no better than chance" in found


def test_a_reference_that_never_answers_rightly_judges_nothing() -> None:
    for kind, metric in (("exact", "exact_match_delta"), ("f1", "token_f1_delta")):
        found = measure(metric, evidence([answered(kind, "lung", "bone", "lung")]))  # type: ignore[arg-type]
        assert "no better than chance" in found


def test_prompt_agreement_is_a_share_of_prompts() -> None:
    found = evidence([answered("text", "", "", "", same_prompt=same) for same in (True, True, True, False)])
    assert value("prompt_agreement", found) == 0.75


def test_every_family_limits_known_metrics_with_a_reason() -> None:
    families = tomllib.loads(CHAT_LIMITS.read_text(encoding="utf-8"))
    for family in families:
        limits = load_limits(family, CHAT_LIMITS, CHAT_BY_NAME)
        assert set(CHAT_BY_NAME) - set(limits) <= {"answer_prefix"}
        assert all(len(limit.reason) > 8 for limit in limits.values())


def test_every_scheme_that_gguf_takes_has_limits() -> None:
    for name in scheme.names():
        if not name.startswith("palette"):
            assert load_limits(name, CHAT_LIMITS, CHAT_BY_NAME)


def test_coarser_families_may_cost_more() -> None:
    order = ("fp32", "int8", "int5", "int4")
    kl = [load_limits(family, CHAT_LIMITS, CHAT_BY_NAME)["kl_mean"].limit for family in order]
    assert kl == sorted(kl)


def test_a_metric_of_an_encoder_is_none_of_a_generators(tmp_path: Path) -> None:
    path = tmp_path / "limits.toml"
    path.write_text('[int8]\nauc_delta = { limit = 0, reason = "x" }\n')
    with pytest.raises(UsageError, match="no metric 'auc_delta'"):
        load_limits("int8", path, CHAT_BY_NAME)
