"""`just bench-full DIR`: full-size seeded MedSigLIP against its peers, or format against format, as ratios of one run.

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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from medge.benchmarks import peers
from medge.benchmarks.host import fingerprint
from medge.benchmarks.latency import peak_rss
from medge.benchmarks.races import OPTIMUM, RACES, Goal, Measured, Race, Usage, embeds, export_job
from medge.spec import FloatArray

ROUNDS, REPEATS, WARM = 5, 5, 2
IMAGES = 8
MODEL = "medsiglip-448"


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


def prepare(folder: Path, race: Race) -> dict[str, Usage]:
    """Make whatever is missing, one job at a time; what each took is kept beside it in usage.json."""
    folder.mkdir(parents=True, exist_ok=True)
    notes = folder / "usage.json"
    found = {name: Usage(**one) for name, one in json.loads(notes.read_text()).items()} if notes.exists() else {}
    jobs = list(_jobs(folder, race))
    for name, path, command in jobs:
        if not path.exists():
            found[name] = spend(command)
            notes.write_text(json.dumps({name: asdict(one) for name, one in found.items()}, indent=2))
    return {name: found[name] for name, _, _ in jobs if name in found}


def _jobs(folder: Path, race: Race) -> Iterator[tuple[str, Path, list[str]]]:
    checkpoint = folder / "checkpoint"
    yield "synth full", checkpoint, medge("synth", MODEL, "--size", "full", "-o", str(checkpoint))
    if race.optimum:
        yield OPTIMUM, folder / "optimum", _peer("make_optimum", checkpoint, folder / "optimum")
    for one in race.contenders:
        if one.peer:
            yield one.name, folder / one.path, _peer(one.peer, checkpoint, folder / one.path)
    exports = [one.export for one in race.contenders if one.export is not None]
    for format, scheme in (*exports, *race.exports):
        path = folder / f"{format}-{scheme}"
        command = medge("export", str(checkpoint), "--format", format, "--scheme", scheme, "-o", str(path))
        if (format, scheme) in race.exports:
            command += ["--set", "parity=off"]  # their interpreter takes a minute an image: not the export's cost
        yield export_job(format, scheme), path, command


def _peer(make: str, checkpoint: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "medge.benchmarks.full_size", "--make", make, str(checkpoint), str(out)]


def child(race: Race, name: str, folder: Path, threads: int) -> None:
    """In a fresh process: load, warm up, time, and print one JSON line."""
    contender = next(one for one in race.contenders if one.name == name)
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
    if not embeds(folder, name).exists():  # the same in every round
        np.save(embeds(folder, name), np.concatenate([run(np.array(images[i : i + 1])) for i in range(len(images))]))
    sys.stdout.write(json.dumps({"times": times, "rss": rss, "load": load}) + "\n")


def _timed(run: peers.Run, pixels: FloatArray) -> float:
    start = time.perf_counter()
    run(pixels)
    return time.perf_counter() - start


def run_race(
    folder: Path, name: str, threads: int, rounds: int, report: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """Every contender once a round, in turn."""
    from medge.samples import list_images, sample_root

    for stale in folder.glob("embeds-*.npy"):
        stale.unlink()
    _save_pixels(folder, list_images(sample_root(), IMAGES))
    contenders = RACES[name].contenders
    found: dict[str, list[dict[str, Any]]] = {one.name: [] for one in contenders}
    for turn in range(rounds):
        for one in contenders:
            module = [sys.executable, "-m", "medge.benchmarks.full_size", "--child"]
            command = [*module, name, one.name, str(folder), str(threads)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
            found[one.name].append(json.loads(done.stdout.splitlines()[-1]))
            report(f"round {turn + 1}: {one.name} {np.median(found[one.name][-1]['times']):.3f} s")
    return found


def _save_pixels(folder: Path, images: Sequence[Path]) -> None:
    from medge.runtimes.images import load_image
    from medge.runtimes.preprocess import preprocess
    from medge.spec import ImageSpec

    np.save(folder / "pixels.npy", np.stack([preprocess(load_image(image), ImageSpec(size=448)) for image in images]))


def show(race: Race, measured: Measured, threads: int) -> None:
    """Tables for people, then one JSON line."""
    console = Console(width=140)
    heads = ("contender", "s an image", f"x {race.base}", "peak MB", "load s", "file MB", "cosine", "centred")
    table = Table(*heads, title=f"image tower, batch 1, {threads} threads, {fingerprint().cpu}")
    for one in race.contenders:
        cosine, centred = measured.fidelity(one.name)
        table.add_row(
            one.name,
            f"{measured.seconds(one.name):.3f}",
            f"{measured.ratio(race.base, one.name):.2f}",
            f"{measured.rss(one.name) / 1e6:.0f}",
            f"{measured.load(one.name):.1f}",
            f"{measured.size(one.name) / 1e6:.0f}",
            f"{cosine:.5f}",
            f"{centred:.4f}",
        )
    console.print(table)
    costs = Table("job", "wall s", "CPU s", "peak GB", title="what making them took")
    for name, cost in measured.usage.items():
        costs.add_row(name, f"{cost.wall:.1f}", f"{cost.cpu:.1f}", f"{cost.rss / 1e9:.2f}")
    console.print(costs)
    show_goals(console, list(race.goals(measured)))


def show_goals(console: Console, goals: Sequence[Goal]) -> None:
    """What was promised and whether it holds, then one JSON line."""
    promises = Table("goal", "measured", "bound", "met")
    for goal in goals:
        bound = f"{'≥' if goal.at_least else '≤'} {goal.bound:g}"
        promises.add_row(goal.what, f"{goal.value:.4g}", bound, "yes" if goal.met else "NO")
    console.print(promises)
    sys.stdout.write(json.dumps({goal.what: goal.value for goal in goals}) + "\n")


def main(arguments: Sequence[str]) -> None:
    """RACE DIR [ROUNDS], or what the parent asks of its children."""
    if arguments[0] == "--make":
        getattr(peers, arguments[1])(Path(arguments[2]), Path(arguments[3]))
    elif arguments[0] == "--child":
        child(RACES[arguments[1]], arguments[2], Path(arguments[3]), int(arguments[4]))
    else:
        name, folder, threads = arguments[0], Path(arguments[1]).absolute(), fingerprint().usable_cores
        usage = prepare(folder, RACES[name])
        rounds = int(arguments[2]) if len(arguments) > 2 else ROUNDS
        found = run_race(folder, name, threads, rounds, lambda line: print(line, file=sys.stderr, flush=True))  # noqa: T201
        show(RACES[name], Measured(folder, RACES[name].contenders, found, usage), threads)


if __name__ == "__main__":
    main(sys.argv[1:])
