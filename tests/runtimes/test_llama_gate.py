"""The gate across engines: torch's answers recorded, llama.cpp's held against them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from medge.benchmarks import chat_baseline, chat_check
from medge.benchmarks.baseline import Identity
from medge.benchmarks.chat_baseline import ChatBaseline
from medge.benchmarks.chat_data import built_in
from medge.benchmarks.chat_metrics import CHAT_BY_NAME, CHAT_LIMITS
from medge.benchmarks.metrics import load_limits
from medge.runtimes.base import RunOptions
from medge.runtimes.generate import Generator
from medge.runtimes.torch_generator import open_reference

if TYPE_CHECKING:
    from tests.runtimes.conftest import TinyGemma

PROMPTS = built_in().first(14)


@pytest.fixture(scope="session")
def gemma_checkpoint(gemma: TinyGemma, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model of conftest.py as transformers writes it."""
    root = tmp_path_factory.mktemp("gate") / "checkpoint"
    gemma.model.save_pretrained(root)
    gemma.processor.tokenizer.save_pretrained(root)
    return root


@pytest.fixture(scope="session")
def recorded(gemma_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ChatBaseline:
    reference = open_reference(gemma_checkpoint, device="cpu", options=RunOptions(threads=1))
    out = tmp_path_factory.mktemp("gate") / "base"
    return chat_baseline.record(reference, Identity("tiny", "", "0" * 64), PROMPTS, out, max_tokens=16)


def test_f16_in_llama_cpp_is_what_torch_answers(recorded: ChatBaseline, generator: Generator) -> None:
    evidence = chat_check.examine(generator, recorded, PROMPTS)
    limits = load_limits("fp16", CHAT_LIMITS, CHAT_BY_NAME)
    verdicts, notes = chat_check.judged(evidence, limits)
    untrained = {"exact_match_delta", "token_f1_delta", "choice_accuracy_delta"}  # no better than chance
    outcomes = {verdict.metric: verdict.outcome for verdict in verdicts}
    assert outcomes == dict.fromkeys(set(limits) - untrained, "ok")
    assert len(notes) == len(untrained)
    values = {verdict.metric: verdict.value for verdict in verdicts}
    assert 0 < (values["kl_mean"] or 0) < 2e-4  # measured 3.4e-5
    assert values["prompt_agreement"] == 1


def test_another_model_is_told_from_it(recorded: ChatBaseline, gemma_checkpoint: Path) -> None:
    other = open_reference(gemma_checkpoint, device="cpu", options=RunOptions(threads=1))
    for parameter in other._model.model.language_model.layers[0].parameters():
        parameter.data = parameter.data * 1.1
    evidence = chat_check.examine(other, recorded, PROMPTS)
    verdicts, _ = chat_check.judged(evidence, load_limits("fp16", CHAT_LIMITS, CHAT_BY_NAME))
    found = {verdict.metric: verdict.outcome for verdict in verdicts}
    assert (found["kl_mean"], found["prompt_agreement"]) == ("regressed", "ok")
