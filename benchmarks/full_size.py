"""`just bench-full DIR`: full-size seeded MedSigLIP against its peers, as ratios within one run.

Contenders run in fresh processes, interleaved over several rounds, since two processes on one machine may
differ by 25 % and one process repeats within 3 %. Random weights prove speed and memory; the cosines say how
much of the fp32 answer a format keeps, on the real images that ship with medge.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medge.benchmarks import peers
from medge.benchmarks.host import fingerprint
from medge.benchmarks.latency import peak_rss
from medge.spec import FloatArray

ROUNDS, REPEATS, WARM = 5, 5, 2
IMAGES = 8
MODEL = "medsiglip-448"
OPTIMUM = "optimum-cli, both towers"


@dataclass(frozen=True)
class Contender:
    """One way to run the image tower."""

    name: str
    path: str
    """Below the working folder."""
    make: str
    """A shell-free recipe: a function of peers.py, or a medge scheme."""
    run: Callable[[Path, int], peers.Run]


CONTENDERS = (
    Contender("plain fp32 ONNX", "plain/model.onnx", "make_plain_onnx", peers.run_plain_onnx),
    Contender("OpenVINO int8 weights, bf16", "openvino/model.xml", "make_openvino", peers.run_openvino),
    Contender("torch fp32", "checkpoint", "", peers.run_torch),
    Contender("medge fp32", "fp32", "fp32", peers.run_medge),
    Contender("medge int8", "int8", "int8", peers.run_medge),
    Contender("medge int8-static", "int8-static", "int8-static", peers.run_medge),
    Contender("medge int4-mixed", "int4-mixed", "int4-mixed", peers.run_medge),
    Contender("medge int4", "int4", "int4", peers.run_medge),
)


@dataclass(frozen=True)
class Usage:
    """What a finished process took, by the operating system's account."""

    wall: float
    cpu: float
    rss: int
    """Peak resident bytes of the largest process."""


def spend(command: Sequence[str]) -> Usage:
    """Run a command to its end in a process of its own, so that the account is its own."""
    meter = (
        "import json,resource,subprocess,sys,time\nt=time.perf_counter()\nc=subprocess.run(sys.argv[1:],stdout=2)\n"
        "u=resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(json.dumps([c.returncode,time.perf_counter()-t,u.ru_utime+u.ru_stime,u.ru_maxrss*1024]))"
    )
    done = subprocess.run([sys.executable, "-c", meter, *command], stdout=subprocess.PIPE, text=True, check=True)
    code, wall, cpu, rss = json.loads(done.stdout)
    if code:
        raise SystemExit(f"{' '.join(command)} failed with {code}")
    return Usage(wall, cpu, rss)


def medge(*arguments: str) -> list[str]:
    """A medge command of this installation."""
    return [sys.executable, "-m", "medge.cli", *arguments]


def prepare(folder: Path) -> dict[str, Usage]:
    """Make whatever is missing, one job at a time; what each took is kept beside it in usage.json."""
    folder.mkdir(parents=True, exist_ok=True)
    notes = folder / "usage.json"
    found = {name: Usage(**one) for name, one in json.loads(notes.read_text()).items()} if notes.exists() else {}
    for name, path, command in _jobs(folder):
        if not path.exists():
            found[name] = spend(command)
            notes.write_text(json.dumps({name: asdict(one) for name, one in found.items()}, indent=2))
    return found


def _jobs(folder: Path) -> Iterator[tuple[str, Path, list[str]]]:
    checkpoint = folder / "checkpoint"
    yield "synth full", checkpoint, medge("synth", MODEL, "--size", "full", "-o", str(checkpoint))
    yield OPTIMUM, folder / "optimum", _peer("make_optimum", checkpoint, folder / "optimum")
    for one in CONTENDERS:
        path = folder / one.path
        if one.make.startswith("make_"):
            yield one.name, path, _peer(one.make, checkpoint, path)
        elif one.make:
            command = medge("export", str(checkpoint), "--scheme", one.make, "-o", str(path))
            yield f"medge export {one.make}, both towers", path, command


def _peer(make: str, checkpoint: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "medge.benchmarks.full_size", "--make", make, str(checkpoint), str(out)]


def child(name: str, folder: Path, threads: int) -> None:
    """In a fresh process: load, warm up, time, and print one JSON line."""
    contender = next(one for one in CONTENDERS if one.name == name)
    images = np.load(folder / "pixels.npy", mmap_mode="r")
    pixels = np.array(images[:1])
    start = time.perf_counter()
    run = contender.run(folder / contender.path, threads)
    run(pixels)
    load = time.perf_counter() - start
    for _ in range(WARM - 1):
        run(pixels)
    times = [_timed(run, pixels) for _ in range(REPEATS)]
    rss = peak_rss()
    embeds = folder / f"embeds-{CONTENDERS.index(contender)}.npy"
    if not embeds.exists():  # the same in every round
        np.save(embeds, np.concatenate([run(np.array(images[i : i + 1])) for i in range(len(images))]))
    sys.stdout.write(json.dumps({"times": times, "rss": rss, "load": load}) + "\n")


def _timed(run: peers.Run, pixels: FloatArray) -> float:
    start = time.perf_counter()
    run(pixels)
    return time.perf_counter() - start


def race(folder: Path, threads: int, rounds: int, report: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
    """Every contender once a round, in turn."""
    from medge.samples import list_images, sample_root

    for stale in folder.glob("embeds-*.npy"):
        stale.unlink()
    _save_pixels(folder, list_images(sample_root(), IMAGES))
    found: dict[str, list[dict[str, Any]]] = {one.name: [] for one in CONTENDERS}
    for turn in range(rounds):
        for one in CONTENDERS:
            command = [
                sys.executable,
                "-m",
                "medge.benchmarks.full_size",
                "--child",
                one.name,
                str(folder),
                str(threads),
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
            found[one.name].append(json.loads(done.stdout.splitlines()[-1]))
            report(f"round {turn + 1}: {one.name} {np.median(found[one.name][-1]['times']):.3f} s")
    return found


def _save_pixels(folder: Path, images: Sequence[Path]) -> None:
    from medge.runtimes.images import load_image
    from medge.runtimes.preprocess import preprocess
    from medge.spec import ImageSpec

    np.save(folder / "pixels.npy", np.stack([preprocess(load_image(image), ImageSpec(size=448)) for image in images]))


@dataclass(frozen=True)
class Goal:
    """A figure that the project promises."""

    what: str
    value: float
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        """Whether the promise holds in this run."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def ratio(found: dict[str, list[dict[str, Any]]], slow: str, fast: str) -> float:
    """How many times faster: the median over rounds of the ratio within a round, so that drift cancels."""
    pairs = zip(found[slow], found[fast], strict=True)
    return float(np.median([np.median(a["times"]) / np.median(b["times"]) for a, b in pairs]))


def seconds(found: dict[str, list[dict[str, Any]]], name: str) -> float:
    """Median over rounds of each process's own median."""
    return float(np.median([np.median(one["times"]) for one in found[name]]))


def fidelity(folder: Path, name: str) -> tuple[float, float]:
    """(least cosine, least centred cosine) to torch fp32 over the images."""
    from medge.export.parity import centred_cosine
    from medge.runtimes.base import normalize

    index = {one.name: i for i, one in enumerate(CONTENDERS)}
    ours, reference = (normalize(np.load(folder / f"embeds-{index[n]}.npy")) for n in (name, "torch fp32"))
    return float((ours * reference).sum(1).min()), float(centred_cosine(ours, reference).min())


def _size(folder: Path, one: Contender) -> int:
    path = folder / one.path
    files = path.parent.iterdir() if path.is_file() else path.glob("image_encoder*")
    return sum(file.stat().st_size for file in files)


def goals(folder: Path, found: dict[str, list[dict[str, Any]]], usage: dict[str, Usage]) -> list[Goal]:
    """The issue's figures, in this run."""
    rss = {name: max(one["rss"] for one in runs) for name, runs in found.items()}
    cosine, centred = fidelity(folder, "medge int8")
    int4 = next(one for one in CONTENDERS if one.name == "medge int4")
    listed = [
        Goal("int8: times faster than plain fp32 ONNX", ratio(found, "plain fp32 ONNX", "medge int8"), 3.0, True),
        Goal(
            "int8: times faster than OpenVINO int8 weights, bf16",
            ratio(found, "OpenVINO int8 weights, bf16", "medge int8"),
            1.1,
            True,
        ),
        Goal("int8: least cosine to fp32", cosine, 0.9995, True),
        Goal("int8: least centred cosine to fp32", centred, 0.985, True),
        Goal("int8: peak memory over torch's", rss["medge int8"] / rss["torch fp32"], 0.25, False),
        Goal("int4: image tower, MB", _size(folder, int4) / 1e6, 280, False),
        Goal("int4: time over int8's", ratio(found, "medge int4", "medge int8"), 1.1, False),
    ]
    exports = {name: one for name, one in usage.items() if name.startswith("medge export")}
    for name, one in exports.items():
        listed.append(Goal(f"{name}: peak memory, GB", one.rss / 1e9, 3.0, False))
    if exports and OPTIMUM in usage:
        slowest = max(usage[name].cpu for name in exports if name.split()[2].rstrip(",") in ("fp32", "fp16", "int8"))
        share = slowest / usage[OPTIMUM].cpu
        listed.append(Goal("export: CPU time of the slowest of fp32, fp16, int8 over optimum-cli's", share, 0.5, False))
    if "synth full" in usage:
        listed.append(Goal("synth full: seconds", usage["synth full"].wall, 60, False))
        listed.append(Goal("synth full: peak memory, GB", usage["synth full"].rss / 1e9, 1.5, False))
    return listed


def show(folder: Path, found: dict[str, list[dict[str, Any]]], usage: dict[str, Usage], threads: int) -> None:
    """Tables for people, then one JSON line."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=140)
    table = Table(
        "contender",
        "s an image",
        "x plain fp32",
        "peak MB",
        "load s",
        "file MB",
        "cosine",
        "centred",
        title=f"image tower, batch 1, {threads} threads, {fingerprint().cpu}",
    )
    for one in CONTENDERS:
        runs, time_ = found[one.name], seconds(found, one.name)
        cosine, centred = fidelity(folder, one.name)
        cells = (
            ratio(found, "plain fp32 ONNX", one.name),
            max(run["rss"] for run in runs) / 1e6,
            np.median([run["load"] for run in runs]),
            _size(folder, one) / 1e6,
        )
        table.add_row(
            one.name,
            f"{time_:.3f}",
            f"{cells[0]:.2f}",
            f"{cells[1]:.0f}",
            f"{cells[2]:.1f}",
            f"{cells[3]:.0f}",
            f"{cosine:.5f}",
            f"{centred:.4f}",
        )
    console.print(table)
    costs = Table("job", "wall s", "CPU s", "peak GB", title="made in this run")
    for name, cost in usage.items():
        costs.add_row(name, f"{cost.wall:.1f}", f"{cost.cpu:.1f}", f"{cost.rss / 1e9:.2f}")
    console.print(costs)
    listed = goals(folder, found, usage)
    promises = Table("goal", "measured", "bound", "met")
    for goal in listed:
        promises.add_row(
            goal.what,
            f"{goal.value:.4g}",
            f"{'≥' if goal.at_least else '≤'} {goal.bound:g}",
            "yes" if goal.met else "NO",
        )
    console.print(promises)
    sys.stdout.write(json.dumps({goal.what: goal.value for goal in listed}) + "\n")


def main(arguments: Sequence[str]) -> None:
    """DIR [ROUNDS], or what the parent asks of its children."""
    if arguments[0] == "--make":
        getattr(peers, arguments[1])(Path(arguments[2]), Path(arguments[3]))
    elif arguments[0] == "--child":
        child(arguments[1], Path(arguments[2]), int(arguments[3]))
    else:
        folder, threads = Path(arguments[0]).absolute(), fingerprint().usable_cores
        usage = prepare(folder)
        rounds = int(arguments[1]) if len(arguments) > 1 else ROUNDS
        found = race(folder, threads, rounds, lambda line: print(line, file=sys.stderr, flush=True))  # noqa: T201
        show(folder, found, usage, threads)


if __name__ == "__main__":
    main(sys.argv[1:])
