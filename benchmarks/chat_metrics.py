"""A generator's metrics as data: how far its distributions are from the reference's, and what that does to answers.

All are *exact* (benchmarks/metrics.py): facts about these prompts, held against their limits as they stand. The
intervals are for the reader. Exact match and token F1 are those of SQuAD (Rajpurkar et al. 2016, evaluate-v1.1.py),
which VQA-RAD and SLAKE are published with too.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medge.benchmarks import stats
from medge.benchmarks.distributions import Doubles, Kept, Seen, divergence
from medge.benchmarks.metrics import Metric
from medge.benchmarks.stats import Estimate
from medge.errors import require
from medge.prompts import Kind

CHAT_LIMITS = Path(__file__).with_name("chat_limits.toml")
MIN_PLACES = 100
"""Below it the 99th percentile would be the largest value."""
MIN_DECIDED = 20
_DECIDED = math.log(2)
"""Nats between the likeliest token and the next: at a lesser distance a change of the first is a change of wording,
and a model of random weights, whose distributions are flat, has little but near ties."""
_CHANCE = 0.05
"""A task is judged where chance would answer it as well as the reference does with less probability than this."""


@dataclass(frozen=True)
class Answered:
    """One prompt, both replies."""

    kind: Kind
    right: str
    """The right answer."""
    theirs: str
    """The reference's."""
    ours: str
    """The artifact's."""
    their_tokens: tuple[int, ...] = ()
    our_tokens: tuple[int, ...] = ()
    """Of a free answer."""
    choices: int = 0
    """Among how many the answer was to be chosen."""
    same_prompt: bool = True
    """Whether the artifact's template and tokenizer made the ids that the reference read."""

    @property
    def free(self) -> bool:
        """Whether it was answered freely."""
        return self.kind in ("exact", "f1")

    @property
    def diverges(self) -> int | None:
        """At which token the answers part; None where they are the same."""
        return first_difference(self.their_tokens, self.our_tokens) if self.free else None


@dataclass(frozen=True)
class ChatEvidence:
    """Both models on one set of prompts, R places in all."""

    kept: Kept
    seen: Seen
    given: NDArray[np.bool_]
    """(R,) whether the place's next token stood in the prompt, and is none that the reference wrote."""
    answers: Sequence[Answered]

    @cached_property
    def divergences(self) -> Doubles:
        """(R,) nats."""
        return divergence(self.kept, self.seen)

    @cached_property
    def same_first(self) -> NDArray[np.bool_]:
        """(R,) whether both find the same token likeliest."""
        return np.asarray(self.seen.best == self.kept.top_ids[:, 0])

    @cached_property
    def decided(self) -> NDArray[np.bool_]:
        """(R,) whether the reference finds one token at least twice as likely as any other."""
        first, second = self.kept.top_logprobs[:, :2].T
        return np.asarray(first - second >= _DECIDED)

    def of(self, kind: Kind) -> list[Answered]:
        """The answers to prompts of one kind."""
        return [answer for answer in self.answers if answer.kind == kind]


def first_difference(theirs: Sequence[int], ours: Sequence[int]) -> int | None:
    """The first position at which two sequences differ, one's end included; None where they are equal."""
    pairs = enumerate(zip(theirs, ours, strict=False))
    shorter = min(len(theirs), len(ours))
    return next((i for i, (a, b) in pairs if a != b), shorter if len(theirs) != len(ours) else None)


def normalized(text: str) -> list[str]:
    """The words of an answer as SQuAD compares them: lower case, without punctuation and articles."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def exact_match(text: str, right: str) -> float:
    """1 where both are the same words in the same order."""
    return float(normalized(text) == normalized(right))


def token_f1(text: str, right: str) -> float:
    """Harmonic mean of precision and recall of words, repeats counted; 1 where both have none."""
    ours, expected = normalized(text), normalized(right)
    if not ours or not expected:
        return float(ours == expected)
    common = sum((Counter(ours) & Counter(expected)).values())
    return 2 * common / (len(ours) + len(expected))


def _prompt_agreement(evidence: ChatEvidence) -> Estimate:
    return stats.proportion(sum(answer.same_prompt for answer in evidence.answers), len(evidence.answers))


def _kl_mean(evidence: ChatEvidence) -> Estimate:
    return _mean(evidence.divergences)


def _kl_p99(evidence: ChatEvidence) -> Estimate:
    if len(evidence.divergences) < MIN_PLACES:
        return Estimate(None, undefined=f"{len(evidence.divergences)} places, fewer than {MIN_PLACES}")
    return Estimate(float(np.quantile(evidence.divergences, 0.99)))


def _top1(evidence: ChatEvidence) -> Estimate | str:
    decided = evidence.decided
    if decided.sum() < MIN_DECIDED:
        return f"the reference is decided at {decided.sum()} places, fewer than {MIN_DECIDED}"
    return stats.proportion(int(evidence.same_first[decided].sum()), int(decided.sum()))


def _perplexity_ratio(evidence: ChatEvidence) -> Estimate | str:
    if not evidence.given.any():
        return "there is no text but the reference's own"
    loss = (evidence.kept.logprobs - evidence.seen.logprobs)[evidence.given]
    estimate = _mean(loss)
    value, low, high = (None if v is None else float(np.exp(v)) for v in (estimate.value, estimate.low, estimate.high))
    return Estimate(value, low, high)


def _answer_prefix(evidence: ChatEvidence) -> Estimate | str:
    free = [answer for answer in evidence.answers if answer.free]
    if not free:
        return "no prompt is answered freely"
    return _mean(np.array([_kept_share(answer) for answer in free]))


def _kept_share(answer: Answered) -> float:
    if answer.diverges is None:
        return 1.0
    return answer.diverges / max(len(answer.their_tokens), len(answer.our_tokens))


def _delta(kind: Kind, score: Callable[[str, str], float]) -> Callable[[ChatEvidence], Estimate | str]:
    """Mean score of the artifact's answers minus the reference's, paired by prompt."""

    def measure(evidence: ChatEvidence) -> Estimate | str:
        answers = evidence.of(kind)
        if not answers:
            return f"no prompt is of the kind '{kind}'"
        theirs = np.array([score(answer.theirs, answer.right) for answer in answers])
        if no_better_than_chance(theirs, answers):
            return f"the reference itself answers no better than chance (mean {theirs.mean():.2f} of {len(answers)})"
        ours = np.array([score(answer.ours, answer.right) for answer in answers])
        return stats.mean_difference(ours, theirs)

    return measure


def no_better_than_chance(scores: Doubles, answers: Sequence[Answered]) -> bool:
    """Whether a model's (N,) scores could be luck: what it loses on such a task says nothing.

    Of choices by a one-sided binomial test; a free answer is no luck, so one right word in twenty is asked for.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    if not answers[0].choices:
        return bool(scores.mean() < _CHANCE)
    luck = float(np.mean([1 / answer.choices for answer in answers]))
    test = require("scipy.stats", "eval").binomtest(round(scores.sum()), len(scores), luck, alternative="greater")
    return bool(test.pvalue >= _CHANCE)


def _mean(values: Doubles) -> Estimate:
    return stats.mean_difference(values, np.zeros_like(values))


CHAT_METRICS: tuple[Metric, ...] = (
    Metric(
        "prompt_agreement",
        "Same prompt tokens",
        "share",
        "at_least",
        "exact",
        "Share of prompts that template and tokenizer turn into the very tokens that the reference reads",
        _prompt_agreement,
    ),
    Metric(
        "kl_mean",
        "KL divergence, mean",
        "nats",
        "at_most",
        "exact",
        "From the reference's next-token distribution to the artifact's, over every place of the texts",
        _kl_mean,
    ),
    Metric(
        "kl_p99",
        "KL divergence, 99th percentile",
        "nats",
        "at_most",
        "exact",
        "The place at which one in a hundred is further off",
        _kl_p99,
    ),
    Metric(
        "token_top1_agreement",
        "Top-1 token agreement",
        "share",
        "at_least",
        "exact",
        "Share of places at which both find the same token likeliest, of those where the reference finds it at least "
        "twice as likely as any other (Wilson interval)",
        _top1,
    ),
    Metric(
        "perplexity_ratio",
        "Perplexity, against the reference",
        "ratio",
        "at_most",
        "exact",
        "Of the prompts' own text, the artifact's over the reference's; the reference's answers are left out",
        _perplexity_ratio,
    ),
    Metric(
        "answer_prefix",
        "Greedy answer before it parts",
        "share",
        "at_least",
        "exact",
        "Mean share of the longer answer's tokens that stand before the first difference",
        _answer_prefix,
    ),
    Metric(
        "exact_match_delta",
        "Exact match, change",
        "share",
        "at_least",
        "exact",
        "Share of answers that are the right words, artifact minus reference",
        _delta("exact", exact_match),
    ),
    Metric(
        "token_f1_delta",
        "Token F1, change",
        "share",
        "at_least",
        "exact",
        "Mean overlap of answers' words with the right ones, artifact minus reference",
        _delta("f1", token_f1),
    ),
    Metric(
        "choice_accuracy_delta",
        "Multiple-choice accuracy, change",
        "share",
        "at_least",
        "exact",
        "Share of questions whose likeliest choice is right, artifact minus reference",
        _delta("choice", lambda text, right: float(text == right)),
    ),
)
CHAT_BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in CHAT_METRICS}
