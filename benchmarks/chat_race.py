"""`just bench-llama DIR`: medge's GGUF exports and decoding against llama.cpp's own programs, as ratios of one run.

A seeded full-size MedGemma 4B. In each round every job runs once, in turn, in a process of its own: a slow minute of
the host then meets both sides. Both write the text model and the image tower's file.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from medge.benchmarks.bandwidth import read_bandwidth
from medge.benchmarks.full_size import medge, show_goals, spend
from medge.benchmarks.host import fingerprint
from medge.benchmarks.latency import in_process
from medge.benchmarks.llama_tools import LlamaTools, build, with_sentencepiece
from medge.benchmarks.races import Goal, Usage

MODEL = "medgemma-4b-it"
ROUNDS = 3
CONTEXT, TOKENS, PROMPT = 128, 32, 512
"""Decoding starts after so many tokens, and gives so many; prefill is of a prompt alone."""
SCHEMES = {"int8": "Q8_0", "int4": "Q4_0", "int4-k": "Q4_K_M"}
"""medge's scheme -> llama.cpp's type."""
CONVERT_Q8, CONVERT_BF16 = "convert_hf_to_gguf q8_0", "convert_hf_to_gguf bf16"
Report = Callable[[str], None]


def of_medge(scheme: str) -> str:
    """The name of the job that makes an artifact."""
    return f"medge export {scheme}"


def of_llama(kind: str) -> str:
    """The name of llama-quantize's job."""
    return f"llama-quantize {kind}"


@dataclass(frozen=True)
class Rates:
    """One file run by both sides: median tokens a second."""

    prefill: float
    decode: float
    llama_prefill: float
    llama_decode: float
    bandwidth_share: float
    """Of the memory bandwidth that was measured in between, what medge's decoding reads."""


@dataclass(frozen=True)
class Round:
    """What one round measured."""

    usage: dict[str, Usage]
    """By job."""
    rates: dict[str, Rates] = field(default_factory=dict)
    """By llama.cpp's type."""

    def ratio(self, job: str, peers: Sequence[str], field: str) -> float:
        """What a job took over what the peers' jobs took together: wall, cpu; or rss, over the largest."""
        ours, theirs = getattr(self.usage[job], field), [getattr(self.usage[peer], field) for peer in peers]
        return float(ours / (max(theirs) if field == "rss" else sum(theirs)))


@dataclass(frozen=True)
class Job:
    """Commands that run one after another, and what is removed when they have: a round makes 30 GB in all."""

    name: str
    commands: list[list[str]]
    drop: tuple[Path, ...]


def run_round(folder: Path, tools: LlamaTools, threads: int, report: Report) -> Round:
    """Every export once, then decoding."""
    usage = {}
    temporary = folder / "round"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for job in _jobs(folder, temporary, tools, threads):
        usage[job.name] = one = _together([spend(command) for command in job.commands])
        for path in job.drop:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        report(f"{job.name}: {one.wall:.1f} s, {one.cpu:.1f} CPU s, {one.rss / 1e9:.2f} GB")
    shutil.rmtree(temporary)
    rates = {kind: _rates(_artifact(folder, scheme), tools, threads) for scheme, kind in SCHEMES.items()}
    report("\n".join(f"{kind}: {one}" for kind, one in rates.items()))
    return Round(usage, rates)


def _together(taken: Sequence[Usage]) -> Usage:
    return Usage(sum(one.wall for one in taken), sum(one.cpu for one in taken), max(one.rss for one in taken))


def _jobs(folder: Path, temporary: Path, tools: LlamaTools, threads: int) -> Iterator[Job]:
    checkpoint = folder / "checkpoint"
    peer = with_sentencepiece(checkpoint, folder / "checkpoint-spm")
    text, image, quantized = (temporary / name for name in ("text", "image", "quantized"))
    yield Job(of_medge("int8"), [_export(checkpoint, "int8", _artifact(folder, "int8"))], ())
    yield Job(CONVERT_Q8, _conversions(tools, peer, "q8_0", text, image), (text, image))
    yield Job(of_medge("int4"), [_export(checkpoint, "int4", _artifact(folder, "int4"))], ())
    yield Job(CONVERT_BF16, _conversions(tools, peer, "bf16", text, image), (image,))
    yield Job(of_llama("Q4_0"), [tools.quantize(text, quantized, "Q4_0", threads)], (quantized,))
    yield Job(of_medge("int4-k"), [_export(checkpoint, "int4-k", _artifact(folder, "int4-k"))], ())
    yield Job(of_llama("Q4_K_M"), [tools.quantize(text, quantized, "Q4_K_M", threads)], (quantized, text))


def _artifact(folder: Path, scheme: str) -> Path:
    return folder / f"gguf-{scheme}"


def _export(checkpoint: Path, scheme: str, out: Path) -> list[str]:
    return medge("export", str(checkpoint), "--format", "gguf", "--scheme", scheme, "--force", "-o", str(out))


def _conversions(tools: LlamaTools, checkpoint: Path, outtype: str, text: Path, image: Path) -> list[list[str]]:
    return [tools.convert(checkpoint, outtype, text), tools.convert(checkpoint, outtype, image, mmproj=True)]


def _rates(artifact: Path, tools: LlamaTools, threads: int) -> Rates:
    decoder = artifact / "decoder.gguf"
    theirs = tools.rates(decoder, threads, prompt=PROMPT, tokens=TOKENS, depth=CONTEXT)
    bandwidth = read_bandwidth(threads)
    request = {"threads": threads, "contexts": [CONTEXT, PROMPT], "seconds": 20, "image": False}
    rows = in_process("medge.benchmarks.chat_latency", artifact, request)["rows"]
    decode = float(np.median(rows[0]["decode_rate"]))
    return Rates(
        prefill=float(np.median(rows[1]["prefill_rate"])),
        decode=decode,
        llama_prefill=float(np.median(theirs["prefill"])),
        llama_decode=float(np.median(theirs["decode"])),
        bandwidth_share=decode * decoder.stat().st_size / bandwidth,
    )


def goals(rounds: Sequence[Round]) -> Iterator[Goal]:
    """The promises; each figure is the median over rounds of the ratio within a round."""

    def median(of: Callable[[Round], float]) -> float:
        return float(np.median([of(one) for one in rounds]))

    def ratio(scheme: str, peers: Sequence[str], field: str) -> float:
        return median(lambda one: one.ratio(of_medge(scheme), peers, field))

    q4_0, q4_k_m = of_llama("Q4_0"), of_llama("Q4_K_M")
    yield Goal("Q8_0: time over convert_hf_to_gguf's", ratio("int8", [CONVERT_Q8], "wall"), 0.45, at_least=False)
    yield Goal("Q8_0: peak memory over convert_hf_to_gguf's", ratio("int8", [CONVERT_Q8], "rss"), 1 / 3, at_least=False)
    both = ratio("int4", [CONVERT_BF16, q4_0], "cpu")
    yield Goal("Q4_0: CPU over convert_hf_to_gguf's and llama-quantize's", both, 0.3, at_least=False)
    yield Goal("Q4_K_M: CPU over llama-quantize's alone", ratio("int4-k", [q4_k_m], "cpu"), 0.5, at_least=False)
    for scheme, kind in SCHEMES.items():
        rss = max(one.usage[of_medge(scheme)].rss for one in rounds)
        yield Goal(f"{kind}: peak memory, GB", rss / 1e9, 1.5, at_least=False)
    for kind in rounds[0].rates:
        rates = [one.rates[kind] for one in rounds]
        decode = float(np.median([one.decode / one.llama_decode for one in rates]))
        yield Goal(f"{kind}: decoding over llama-bench's", decode, 0.97, at_least=True)
        share = float(np.median([one.bandwidth_share for one in rates]))
        yield Goal(f"{kind}: decoding's share of the read bandwidth", share, 0.7, at_least=True)


def show(rounds: Sequence[Round], threads: int) -> None:
    """Tables for people, then one JSON line."""
    console = Console(width=110)
    costs = Table(
        "job", "wall s", "CPU s", "peak GB", title=f"{MODEL}, {threads} threads, {fingerprint().cpu}, medians"
    )
    for name in rounds[0].usage:
        taken = [one.usage[name] for one in rounds]
        wall, cpu, rss = (np.median([getattr(one, f) for one in taken]) for f in ("wall", "cpu", "rss"))
        costs.add_row(name, f"{wall:.1f}", f"{cpu:.1f}", f"{rss / 1e9:.2f}")
    console.print(costs)
    speeds = Table("tokens a second", "prefill", "llama-bench", "decode", "llama-bench", "of read bandwidth")
    for kind in rounds[0].rates:
        measured = [one.rates[kind] for one in rounds]
        fields = ("prefill", "llama_prefill", "decode", "llama_decode")
        rates = [f"{np.median([getattr(one, field) for one in measured]):.2f}" for field in fields]
        speeds.add_row(kind, *rates, f"{np.median([one.bandwidth_share for one in measured]):.1%}")
    console.print(speeds)
    show_goals(console, list(goals(rounds)))


def main(arguments: Sequence[str]) -> None:
    """DIR [ROUNDS]"""
    folder, threads = Path(arguments[0]).absolute(), fingerprint().usable_cores
    rounds = int(arguments[1]) if len(arguments) > 1 else ROUNDS
    folder.mkdir(parents=True, exist_ok=True)
    tools = build(folder)
    if not (folder / "checkpoint").is_dir():
        spend(medge("synth", MODEL, "--size", "full", "-o", str(folder / "checkpoint")))

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)  # noqa: T201

    show([run_round(folder, tools, threads, report) for _ in range(rounds)], threads)


if __name__ == "__main__":
    main(sys.argv[1:])
