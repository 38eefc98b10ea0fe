"""The demo's second half: the trained generator answers questions about a real image.

transformers answers wherever the demo runs. GGUF artifacts answer beside it, held to its baseline, where llama.cpp is
installed: it is compiled for minutes, and no part of what the demo needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from medge.benchmarks.chat_baseline import capture
from medge.benchmarks.chat_check import check
from medge.benchmarks.chat_data import BUILT_IN
from medge.benchmarks.records import CheckResult
from medge.benchmarks.report import number, size
from medge.checkpoint import Checkpoint
from medge.demo import GENERATOR
from medge.demo.findings import REPORT, TOPICS, named
from medge.demo.table import Table
from medge.errors import MissingExtraError, require_installed
from medge.export.pipeline import export
from medge.export.request import Request
from medge.progress import Progress
from medge.quantize.scheme import load
from medge.runtimes import open_generator
from medge.runtimes.generate import GenerateOptions, Generator, Message, complete
from medge.runtimes.torch_generator import open_reference

SCHEMES = ("int8", "int4-k")
QUESTIONS = (TOPICS["kind"][0], REPORT[0])
PROMPTS = 12
"""Of the built-in ones, for the baseline."""
_TOKENS = 48
"""The longest answer that it was taught has 35."""
_METRICS = {
    "kl_mean": "KL, mean",
    "token_top1_agreement": "top-1",
    "perplexity_ratio": "perplexity",
    "token_f1_delta": "ΔF1",
}
"""What is shown of a check, and its short name."""


@dataclass(frozen=True)
class Answers:
    """What was asked and answered, and the artifacts that answered."""

    tables: tuple[Table, ...]
    checks: tuple[CheckResult, ...]
    artifacts: tuple[Path, ...]
    missing: str
    """Why no artifact answered; empty where some did."""


def ask(image: Path, label: str, out: Path, show: Progress) -> Answers:
    """Ask about an image of a kind, writing artifacts and their baseline into `out`."""
    show("ask", 0, 0)
    with_reference = _answers("torch fp32", open_reference(GENERATOR), image)
    missing = _missing()
    checks = () if missing else tuple(_checked(out, show))
    artifacts = tuple(_artifact(out, one.artifact.scheme) for one in checks)
    by_artifacts = (
        _answers(f"gguf {one.artifact.scheme}", open_generator(path), image)
        for one, path in zip(checks, artifacts, strict=True)
    )
    rows = [[*row, _verdict(row[1:], label)] for row in (with_reference, *by_artifacts)]
    said = Table(f"{label}/{image.name}, asked", ["by", *QUESTIONS, "kind"], rows)
    tables = (said, _verdicts(checks)) if checks else (said,)
    return Answers(tables, checks, artifacts, missing)


def _missing() -> str:
    try:
        for module in ("gguf", "llama_cpp"):
            require_installed(module, "gguf")
    except MissingExtraError as error:
        return f"In GGUF it answers too, but {error.message}. {error.remedy} (llama.cpp is compiled: some minutes)"
    return ""


def _artifact(out: Path, scheme: str) -> Path:
    return out / f"generator-{scheme}"


def _checked(out: Path, show: Progress) -> Iterator[CheckResult]:
    """Each scheme exported and held against the reference."""
    baseline = out / "generator-baseline"
    capture(GENERATOR, BUILT_IN, baseline, count=PROMPTS, replace=True, progress=lambda i, n: show("chat", i, n))
    for scheme in SCHEMES:
        folder = _artifact(out, scheme)
        export(Request(Checkpoint.open(GENERATOR), "gguf", load(scheme), folder, replace=True, on_progress=show))
        yield check(folder, baseline, progress=lambda i, n: show("check chat", i, n))


def _answers(by: str, generator: Generator, image: Path) -> list[str]:
    """Who answers, and the answer to each of QUESTIONS."""
    try:
        options = GenerateOptions(max_tokens=_TOKENS)
        replies = [complete(generator, [Message("user", (question, image))], options) for question in QUESTIONS]
    finally:
        generator.close()
    return [by, *(reply.text for reply in replies)]


def _verdict(answers: list[str], label: str) -> str:
    """Whether each names the kind of image."""
    return "right" if all(named(answer) == label for answer in answers) else "wrong"


def _verdicts(checks: tuple[CheckResult, ...]) -> Table:
    reference = checks[0].reference
    title = f"Against {reference.runtime}, {reference.prompts} prompts, {reference.places} places"
    return Table(title, ["gguf", "size", *_METRICS.values(), "verdict"], [_row(one) for one in checks])


def _row(one: CheckResult) -> list[str]:
    values = {verdict.metric: number(verdict.value, verdict.metric) for verdict in one.verdicts}
    shown = [values.get(metric, "–") for metric in _METRICS]
    return [one.artifact.scheme, size(one.artifact.bytes), *shown, one.overall]
