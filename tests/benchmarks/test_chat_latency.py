"""What is timed and how it is put together, with a generator that takes the time it is told to."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from medge.benchmarks import bandwidth, chat_latency
from medge.benchmarks.chat_latency import (
    LEAST_TOKENS,
    MAX_REPEATS,
    TOKENS,
    ChatBenchOptions,
    bench,
    filled,
    row,
    vision_seconds,
)
from medge.benchmarks.records import Report, RunRecord
from medge.benchmarks.report import page
from medge.errors import CorruptError, UsageError
from medge.manifest import MANIFEST, Manifest, PartFiles, Source, describe, write_json
from medge.runtimes.generate import GenerateOptions, Generator, Message, Prompt, Reply, Tally, Token
from medge.spec import ChatFormat, ImageSpec

BYTES = 1000
"""Of the decoder."""


@dataclass
class Metronome:
    """A word is a token; 100 tokens a second read, 10 written, 2 seconds an image."""

    answers: int = 10_000
    """Tokens before its turn ends."""
    restless: int = 0
    """Tokens at least, where it does not choose greedily."""
    forgot: int = 0
    image: ImageSpec | None = None

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        return Prompt(tuple(range(5 + sum(len(p.split()) for m in messages for p in m.content if isinstance(p, str)))))

    def generate(self, messages: Sequence[Message], options: GenerateOptions | None = None) -> Reply:
        assert options is not None
        count = min(max(self.answers, self.restless if options.temperature else 0), options.max_tokens)
        tokens = len(self.prompt(messages).ids)
        images = sum(not isinstance(part, str) for message in messages for part in message.content)
        seconds = {"vision": 2.0 * images, "prefill": tokens / 100, "decode": max(0, count - 1) / 10}
        tally = Tally(prompt_tokens=tokens, seconds=seconds)
        return Reply(self._tokens(count), tally)

    def forget(self) -> None:
        self.forgot += 1

    @staticmethod
    def _tokens(count: int) -> Iterator[Token]:
        yield from (Token(i, "x") for i in range(count))


def metronome(**fields: Any) -> Generator:
    return cast(Generator, Metronome(**fields))


@pytest.mark.parametrize("context", [1, 40, 41, 60, 500])
def test_a_prompt_is_as_long_as_asked_or_a_sentence_more(context: int) -> None:
    length = len(metronome().prompt(filled(metronome(), context)).ids)
    shortest = len(metronome().prompt(filled(metronome(), 1)).ids)
    assert max(shortest, context) <= length <= max(shortest, context) + 12


def test_rates_are_tokens_over_their_own_seconds() -> None:
    generator = Metronome()
    found = row(cast(Generator, generator), 100, seconds=0)
    assert found["prefill_rate"] == pytest.approx([100])
    assert found["decode_rate"] == pytest.approx([10])  # the first token comes with the prompt, and counts in neither
    assert found["context"] >= 100
    assert generator.forgot == 2  # for warming up and for the sample: or another repetition would read nothing


def test_an_answer_that_ends_early_is_no_sample_of_decoding() -> None:
    for answers in (0, 1, LEAST_TOKENS - 1):
        found = row(metronome(answers=answers), 50, seconds=0)
        assert found["decode_rate"] == []
        assert len(found["first_token_seconds"]) == MAX_REPEATS  # it was asked to choose more freely
    assert len(row(metronome(answers=LEAST_TOKENS), 50, seconds=0)["decode_rate"]) == 1


def test_a_model_that_ends_its_turn_is_asked_to_choose_more_freely() -> None:
    found = row(metronome(answers=3, restless=20), 50, seconds=0)
    assert found["decode_rate"] == pytest.approx([10])
    assert len(found["first_token_seconds"]) == 2


def test_an_image_is_timed_alone() -> None:
    assert vision_seconds(metronome(image=ImageSpec(size=8))) == 2


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    root = tmp_path / "chat"
    root.mkdir()
    (root / "decoder.gguf").write_bytes(b"w" * BYTES)
    manifest = Manifest(
        schema_version=1,
        source=Source(model="medgemma-4b-it", hub_id="", revision="main", weights_sha256="0" * 64),
        licence="HAI-DEF",
        task="generate",
        format="gguf",
        scheme="int8",
        parts={"decoder": PartFiles(files=(describe(root, "decoder.gguf"),), inputs=(), outputs=())},
        chat=ChatFormat(context=2048),
    )
    write_json(root / MANIFEST, manifest.model_dump(mode="json"))
    return root


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Requests that processes got; each answers with rates of its threads, the second pair slower."""
    asked: list[dict[str, Any]] = []

    def answer(module: str, artifact: Path, request: Mapping[str, Any]) -> dict[str, Any]:
        asked.append(dict(request))
        slow = 0.5 if len(asked) > 2 else 1.0
        rows = [
            {
                "context": context,
                "first_token_seconds": [context / 100],
                "prefill_rate": [100.0],
                "decode_rate": [10.0 * request["threads"] * slow],
            }
            for context in request["contexts"]
        ]
        vision = 2.0 if request["image"] else None
        return {
            "runtime": "fake",
            "load_seconds": 0.5,
            "rows": rows,
            "vision_seconds": vision,
            "peak_rss_bytes": 7.0,
        }

    monkeypatch.setattr(chat_latency, "in_process", answer)
    monkeypatch.setattr(chat_latency, "read_bandwidth", lambda threads: 40_000.0 * threads)
    return asked


def test_threads_take_turns_and_fill_rows(artifact: Path, processes: list[dict[str, Any]]) -> None:
    done: list[tuple[int, int]] = []
    options = ChatBenchOptions(threads=(1, 2), contexts=(128, 512))
    record = bench(artifact, options, lambda i, n: done.append((i, n)))
    assert [request["threads"] for request in processes] == [1, 2, 1, 2]
    assert [request["image"] for request in processes] == [False, True, False, True]
    assert done[-1] == (4, 4)
    assert [(row.threads, row.context) for row in record.generation] == [(1, 128), (1, 512), (2, 128), (2, 512)]
    assert record.generation[0].decode_rate == (10.0, 5.0)
    assert record.samples["load_seconds"] == (0.5,) * 4
    assert record.samples["vision_seconds"] == (2.0, 2.0)
    assert record.conditions.threads == 2


def test_the_share_of_bandwidth_is_bytes_read_over_bytes_readable(
    artifact: Path, processes: list[dict[str, Any]]
) -> None:
    record = bench(artifact, ChatBenchOptions(threads=(2,), contexts=(128,), processes=1))
    (row,) = record.generation
    assert row.bandwidth_share == pytest.approx((20 * BYTES / 80_000,))
    assert record.samples["memory_read_a_second_bytes"] == (80_000,)


def test_processes_that_disagree_are_noted(artifact: Path, processes: list[dict[str, Any]]) -> None:
    record = bench(artifact, ChatBenchOptions(threads=(1, 2), contexts=(128,)))
    assert [note for note in record.notes if "differs by 100%" in note]


def test_prompts_that_the_model_cannot_take_are_left_out_or_refused(
    artifact: Path, processes: list[dict[str, Any]]
) -> None:
    bench(artifact, ChatBenchOptions(threads=(1,), contexts=(128, 4096)))
    assert processes[0]["contexts"] == [128]
    with pytest.raises(UsageError, match="prompts of at most"):
        bench(artifact, ChatBenchOptions(threads=(1,), contexts=(2048 - TOKENS,)))


def test_an_encoder_is_none(make_artifact: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="no chat model"):
        bench(make_artifact())


def test_a_process_that_cannot_run_says_why(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No fake: the decoder is none, and the child says so."""
    pytest.importorskip("llama_cpp")
    monkeypatch.setattr(chat_latency, "read_bandwidth", lambda threads: 1.0)
    with pytest.raises(CorruptError):
        bench(artifact, ChatBenchOptions(threads=(1,), processes=1))


def test_the_process_prints_one_json_line(artifact: Path) -> None:
    request = json.dumps({"threads": 1, "contexts": [8], "seconds": 0, "image": False})
    done = subprocess.run(
        [sys.executable, "-m", "medge.benchmarks.chat_latency", str(artifact.parent), request],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(path for path in sys.path if path)},
    )
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["error"][0] == "UsageError"


def test_the_page_shows_speeds_and_the_record_survives_a_file(
    artifact: Path, processes: list[dict[str, Any]], tmp_path: Path
) -> None:
    bench(artifact, ChatBenchOptions(threads=(1, 2), contexts=(128,))).save(tmp_path / "run.json")
    html = page(Report(runs=(RunRecord.load(tmp_path / "run.json"),)))
    assert "Decode, tokens/s" in html
    assert "Images/s" not in html  # no encoder was measured


def test_bandwidth_counts_bytes_and_takes_the_best_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([2.0, 0.5, 1.0])
    monkeypatch.setattr(bandwidth, "_seconds", lambda pool, parts: next(times))
    assert bandwidth.read_bandwidth(2, size=4096, passes=3) == 4096 / 0.5


def test_bandwidth_reads_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def seconds(pool: Any, parts: Sequence[Any]) -> float:
        seen.append(sum(part.nbytes for part in parts))
        return 1.0

    monkeypatch.setattr(bandwidth, "_seconds", seconds)
    bandwidth.read_bandwidth(3, size=40_000, passes=1)
    assert seen == [40_000]
    monkeypatch.undo()
    assert bandwidth.read_bandwidth(2, size=2**22, passes=2) > 1e8
