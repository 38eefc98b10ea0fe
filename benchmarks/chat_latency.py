"""How fast a generator is: load, image, prefill, decode, first token, peak memory, all of fresh processes.

Every number of threads has processes of its own, in turns, so that a slow minute of the host meets all of them
(benchmarks/latency.py says why one process is not enough). Before each, the memory bandwidth with as many threads is
measured here, and what decoding reached is stated as a share of it. `python -m medge.benchmarks.chat_latency` is such
a process: it prints one JSON line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from medge.benchmarks import host as host_facts
from medge.benchmarks.bandwidth import read_bandwidth
from medge.benchmarks.host import Host
from medge.benchmarks.latency import answer, in_process, peak_rss, quiet_or_refuse
from medge.benchmarks.records import Conditions, RunRecord, Speed, Subject
from medge.errors import UsageError
from medge.manifest import Artifact, Manifest
from medge.runtimes.generate import ChatRunOptions, GenerateOptions, Generator, Message, Tally

DECODER = "decoder"
TOKENS = 32
"""Tokens of an answer; decoding one is the sample."""
LEAST_TOKENS = 8
"""An answer that ends before gives no sample of decoding."""
MAX_REPEATS = 5
_RESTLESS = 2.0
"""A temperature at which an answer seldom ends."""
SPREAD = 0.06
"""Processes whose medians differ by more are reported."""
_FILLER = "The lungs are clear and the heart is of normal size. "
_TASK = "Continue this text for as long as you can.\n"

Progress = Callable[[int, int], None]
"""Called with (done, total) processes."""


@dataclass(frozen=True)
class ChatBenchOptions:
    """How long and how hard to measure."""

    threads: tuple[int, ...] | None = None
    """None: one, and one a physical core that this process may use."""
    contexts: tuple[int, ...] = (128, 1024)
    """Tokens of the prompts, to the sentence; longer ones than the model takes are left out."""
    processes: int = 2
    """For each number of threads."""
    seconds: float = 20.0
    """A process repeats a prompt so long, `MAX_REPEATS` times at most and once at least."""
    allow_noise: bool = False


def bench(
    artifact: Path,
    options: ChatBenchOptions = ChatBenchOptions(),
    progress: Progress = lambda done, total: None,
) -> RunRecord:
    """Measure a chat artifact on this host.

    Raises:
        UsageError: no artifact there, the host is noisy, or the model takes none of the prompts' lengths.
        CorruptError: the artifact contradicts itself, or its process crashed.
    """
    opened, host = Artifact.open(artifact), host_facts.fingerprint()
    counts = options.threads or tuple(sorted({1, min(host.physical_cores, host.usable_cores)}))
    contexts = _contexts(opened.manifest, options.contexts)
    turns = [threads for _ in range(options.processes) for threads in counts]
    runs, notes = [], []
    for done, threads in enumerate(turns, start=1):
        notes += quiet_or_refuse(options.allow_noise)
        # an image takes seconds to minutes, and gains from threads as prefill does: once is enough
        request = {
            "threads": threads,
            "contexts": contexts,
            "seconds": options.seconds,
            "image": threads == max(counts),
        }
        runs.append(_run(artifact, request))
        progress(done, len(turns))
    return _record(opened, host, runs, notes)


def _run(artifact: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """What a process measured, beside its threads and the bandwidth at that time."""
    bandwidth = read_bandwidth(request["threads"])
    found = in_process("medge.benchmarks.chat_latency", artifact, request)
    return {**found, "threads": request["threads"], "bandwidth": bandwidth}


def _record(opened: Artifact, host: Host, runs: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> RunRecord:
    manifest, most = opened.manifest, max(run["threads"] for run in runs)
    speeds = _speeds(runs, sum(file.bytes for file in manifest.parts[DECODER].files))
    variant = manifest.image.variant if manifest.image else ""
    return RunRecord(
        artifact=Subject.of(opened),
        host=host,
        conditions=Conditions(runtime=runs[0]["runtime"], threads=most, batch=1, variant=variant),
        samples=_samples(runs, most),
        generation=tuple(speeds),
        notes=tuple(dict.fromkeys([*notes, *_stability(runs), *_short(speeds)])),
    )


def _contexts(manifest: Manifest, asked: Sequence[int]) -> list[int]:
    if manifest.chat is None or DECODER not in manifest.parts:
        raise UsageError("This is no chat model", "Use: medge bench, on a chat artifact")
    most = manifest.chat.context - TOKENS - _room()
    fitting = [context for context in asked if context <= most]
    if not fitting:
        raise UsageError(f"The model takes prompts of at most {most:,} tokens", "Ask for shorter ones")
    return fitting


def _room() -> int:
    """A prompt is as long as asked to the sentence: tokens that a sentence has at most."""
    return len(_FILLER)


def _speeds(runs: Sequence[Mapping[str, Any]], bytes_read: int) -> list[Speed]:
    keys = dict.fromkeys((run["threads"], row["context"]) for run in runs for row in run["rows"])
    return [_speed(threads, context, runs, bytes_read) for threads, context in sorted(keys)]


def _speed(threads: int, context: int, runs: Sequence[Mapping[str, Any]], bytes_read: int) -> Speed:
    rows = [(run, row) for run in runs if run["threads"] == threads for row in run["rows"] if row["context"] == context]
    return Speed(
        threads=threads,
        context=context,
        first_token_seconds=tuple(value for _, row in rows for value in row["first_token_seconds"]),
        prefill_rate=tuple(value for _, row in rows for value in row["prefill_rate"]),
        decode_rate=tuple(value for _, row in rows for value in row["decode_rate"]),
        bandwidth_share=tuple(rate * bytes_read / run["bandwidth"] for run, row in rows for rate in row["decode_rate"]),
    )


def _samples(runs: Sequence[Mapping[str, Any]], most: int) -> dict[str, tuple[float, ...]]:
    """What belongs to a process and not to a prompt; memory and image with the most threads."""
    chosen = [run for run in runs if run["threads"] == most]
    samples = {
        "load_seconds": tuple(run["load_seconds"] for run in runs),
        "vision_seconds": tuple(run["vision_seconds"] for run in chosen if run["vision_seconds"] is not None),
        "peak_rss_bytes": tuple(run["peak_rss_bytes"] for run in chosen),
        "memory_read_a_second_bytes": tuple(run["bandwidth"] for run in chosen),
    }
    return {name: values for name, values in samples.items() if values}


def _stability(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader must know before he compares: processes that disagree."""
    medians: dict[tuple[int, int], list[float]] = {}
    for run in runs:
        for row in run["rows"]:
            if row["decode_rate"]:
                medians.setdefault((run["threads"], row["context"]), []).append(float(np.median(row["decode_rate"])))
    spreads = {key: max(values) / min(values) - 1 for key, values in medians.items()}
    return [
        f"Decoding in {len(medians[key])} processes differs by {spread:.0%}: {key[0]} threads, {key[1]} tokens."
        for key, spread in spreads.items()
        if spread > SPREAD
    ]


def _short(speeds: Sequence[Speed]) -> list[str]:
    return [
        f"Decoding not measured: answers ended before {LEAST_TOKENS} tokens ({speed.threads} threads, "
        f"{speed.context} tokens)."
        for speed in speeds
        if not speed.decode_rate
    ]


def measure(artifact: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """Load and run in this process; what `bench` gets back. The load time holds the runtime's import."""
    from medge import runtimes

    start = time.perf_counter()
    context = max(request["contexts"]) + _room() + TOKENS
    manifest = Artifact.open(artifact).manifest
    if request["image"] and manifest.image and manifest.chat:
        context = max(context, manifest.chat.image_tokens + 2 * _room() + TOKENS)
    generator = runtimes.open_generator(artifact, ChatRunOptions(threads=request["threads"], context=context))
    load = time.perf_counter() - start
    try:
        found = {
            "runtime": generator.name,
            "load_seconds": load,
            "rows": [row(generator, context, request["seconds"]) for context in request["contexts"]],
            "vision_seconds": vision_seconds(generator) if request["image"] and generator.image else None,
        }
    finally:
        generator.close()
    return {**found, "peak_rss_bytes": peak_rss()}


@dataclass(frozen=True)
class Timed:
    """One reply."""

    first_token: float
    """Seconds from the question to it, or to the end of a turn without tokens."""
    tokens: int
    tally: Tally


def row(generator: Generator, context: int, seconds: float) -> dict[str, Any]:
    """First token, prefill and decode at one length of prompt, repeated for so many seconds.

    Answers are greedy; a model that then ends its turn at once is asked to choose more freely.
    """
    messages, replies = filled(generator, context), list[Timed]()
    _timed(generator, filled(generator, 1), GenerateOptions(max_tokens=2))  # pages come in, threads start
    end = time.perf_counter() + seconds
    while len(replies) < MAX_REPEATS and (not _long(replies) or time.perf_counter() < end):
        temperature = _RESTLESS if replies and not _long(replies) else 0.0
        options = GenerateOptions(max_tokens=TOKENS, temperature=temperature, seed=len(replies))
        replies.append(_timed(generator, messages, options))
    return {
        "context": replies[0].tally.prompt_tokens,
        "first_token_seconds": [reply.first_token for reply in replies],
        "prefill_rate": [reply.tally.prompt_tokens / reply.tally.seconds["prefill"] for reply in replies],
        "decode_rate": [(reply.tokens - 1) / reply.tally.seconds["decode"] for reply in _long(replies)],
    }


def _long(replies: Sequence[Timed]) -> list[Timed]:
    return [reply for reply in replies if reply.tokens >= LEAST_TOKENS]


def _timed(generator: Generator, messages: Sequence[Message], options: GenerateOptions) -> Timed:
    generator.forget()
    start = time.perf_counter()
    reply = generator.generate(messages, options)
    tokens = sum(1 for _ in islice(reply, 1))
    first_token = time.perf_counter() - start
    return Timed(first_token, tokens + sum(1 for _ in reply), reply.tally)


def filled(generator: Generator, context: int) -> list[Message]:
    """A message whose prompt has `context` tokens or up to a sentence more."""

    def message(count: int) -> list[Message]:
        return [Message("user", (_TASK + _FILLER * count,))]

    one, two = (len(generator.prompt(message(count)).ids) for count in (1, 2))
    return message(1 + max(0, -((one - context) // (two - one))))


def vision_seconds(generator: Generator) -> float:
    """Seconds that the tower takes for an image."""
    assert generator.image is not None  # noqa: S101 - the caller looked
    size = generator.image.size
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    generator.forget()
    reply = generator.generate([Message("user", (pixels, "What is this?"))], GenerateOptions(max_tokens=1))
    list(reply)
    return reply.tally.seconds["vision"]


if __name__ == "__main__":
    answer(sys.argv[1:], measure)
