"""How fast an artifact is: load time, latency of each part, peak memory, all of fresh processes of its own.

The same process repeats within a few per cent, two processes differ by up to a quarter (memory placement,
turbo): so several processes run one after the other, each until its median is known, and all samples count.
`python -m medge.benchmarks.latency` is such a process: it prints one JSON line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medge import errors
from medge.benchmarks import host as host_facts
from medge.benchmarks import stats
from medge.benchmarks.records import Conditions, RunRecord, Subject
from medge.errors import CorruptError, MedgeError, UsageError
from medge.manifest import Artifact
from medge.spec import TensorSpec

MIN_REPEATS = 5
MAX_REPEATS = 200
WARM_UP = 2
TOKENS = 32
"""Ids drawn for a text part: they are in every vocabulary, and time does not depend on them."""

Progress = Callable[[int, int], None]
"""Called with (done, total) processes."""


@dataclass(frozen=True)
class BenchOptions:
    """How long and how hard to measure."""

    threads: int | None = None
    """None: one a physical core that this process may use."""
    batch: int = 1
    processes: int = 3
    seconds: float = 20.0
    """At most this long a part and process, `MIN_REPEATS` runs excepted."""
    tolerance: float = 0.03
    """A process stops when its median is known to this relative half-width, at 95 %."""
    allow_noise: bool = False


def bench(
    artifact: Path,
    options: BenchOptions = BenchOptions(),
    progress: Progress = lambda done, total: None,
) -> RunRecord:
    """Measure an artifact on this host.

    Raises:
        UsageError: no artifact there, the host is noisy, or the artifact takes another batch.
        CorruptError: the artifact contradicts itself, or its process crashed.
    """
    opened, host = Artifact.open(artifact), host_facts.fingerprint()
    for part in opened.manifest.parts.values():
        _inputs(part.inputs, options.batch)  # refuse a wrong batch before minutes of work
    threads = options.threads or min(host.physical_cores, host.usable_cores)
    runs, notes = [], []
    for done in range(options.processes):
        notes += quiet_or_refuse(options.allow_noise)
        runs.append(_measure_in_process(artifact, threads, options))
        progress(done + 1, options.processes)
    samples = _pool([run["samples"] for run in runs])
    return RunRecord(
        artifact=Subject.of(opened),
        host=host,
        conditions=Conditions(
            runtime=runs[0]["runtime"],
            threads=threads,
            batch=options.batch,
            variant=opened.manifest.image.variant if opened.manifest.image else "",
        ),
        samples=samples,
        notes=tuple(dict.fromkeys([*notes, *_stability(runs, options.tolerance)])),
    )


def quiet_or_refuse(allow_noise: bool) -> list[str]:
    """A note where the host is noisy and that is allowed.

    Raises:
        UsageError: it is noisy.
    """
    reason = host_facts.noise().reason
    if reason and not allow_noise:
        raise UsageError(f"The host is too noisy to time on: {reason}", "Close other programs, or pass --allow-noise")
    return [f"Measured on a noisy host: {reason}."] if reason else []


def _measure_in_process(artifact: Path, threads: int, options: BenchOptions) -> dict[str, Any]:
    return in_process("medge.benchmarks.latency", artifact, {**asdict(options), "threads": threads})


def in_process(module: str, artifact: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """What a fresh `python -m module ARTIFACT REQUEST` answers; see `answer`.

    Raises:
        CorruptError: it crashed.
        MedgeError: whatever it raised.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, str(artifact), json.dumps(request)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        killed = ", killed: out of memory?" if done.returncode < 0 else ""
        raise CorruptError(f"{artifact} crashed its process (status {done.returncode}{killed}): {last}")
    document: dict[str, Any] = json.loads(lines[-1])
    if "error" in document:
        kind, message, remedy = document["error"]
        raise getattr(errors, kind, MedgeError)(message, remedy)
    return document


def _pool(runs: Sequence[dict[str, list[float]]]) -> dict[str, tuple[float, ...]]:
    return {metric: tuple(value for run in runs for value in run[metric]) for metric in runs[0]}


def _stability(runs: Sequence[dict[str, Any]], tolerance: float) -> list[str]:
    """What a reader must know before he compares: medians not settled, processes that disagree."""
    notes = [f"Not settled to ±{tolerance:.0%}: {part}." for run in runs for part in run["unsettled"]]
    for metric in (name for name in runs[0]["samples"] if name.endswith("_encoder_seconds")):
        medians = [float(np.median(run["samples"][metric])) for run in runs]
        spread = max(medians) / min(medians) - 1
        if spread > 2 * tolerance:
            notes.append(f"Medians of {len(medians)} processes differ by {spread:.0%}: {metric}.")
    return notes


def measure(artifact: Path, options: BenchOptions) -> dict[str, Any]:
    """Load and run every part in this process; what `_measure_in_process` gets back.

    The load time holds the runtime's import and its graph optimization: what an application waits for.
    """
    from medge import runtimes
    from medge.runtimes import RunOptions

    start = time.perf_counter()
    embedder = runtimes.open_embedder(artifact, RunOptions(threads=options.threads))
    parts = Artifact.open(artifact).manifest.parts
    sessions = {name: embedder.session(name) for name in parts}
    samples: dict[str, list[float]] = {"load_seconds": [time.perf_counter() - start]}
    for name, session in sessions.items():
        inputs = _inputs(parts[name].inputs, options.batch)
        samples[f"{name}_seconds"] = repeat(
            lambda session=session, inputs=inputs: session.run(inputs),  # type: ignore[misc]
            options,
        )
    unsettled = [name for name in parts if not settled(samples[f"{name}_seconds"], options.tolerance)]
    samples["peak_rss_bytes"] = [peak_rss()]
    return {"runtime": embedder.name, "samples": samples, "unsettled": unsettled}


def repeat(run: Callable[[], object], options: BenchOptions) -> list[float]:
    """Wall seconds of repeated runs, until the median is settled or the time is spent."""
    for _ in range(WARM_UP):
        run()
    samples: list[float] = []
    end = time.perf_counter() + options.seconds
    while len(samples) < MIN_REPEATS or (
        len(samples) < MAX_REPEATS and time.perf_counter() < end and not settled(samples, options.tolerance)
    ):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return samples


def settled(samples: Sequence[float], tolerance: float) -> bool:
    """Whether the median's interval is within ±tolerance of it."""
    low, high = stats.median_interval(np.asarray(samples))
    return (high - low) / 2 <= tolerance * float(np.median(samples))


def _inputs(specs: Sequence[TensorSpec], batch: int) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    inputs: dict[str, NDArray[Any]] = {}
    for spec in specs:
        if isinstance(spec.shape[0], int) and spec.shape[0] != batch:
            raise UsageError(f"'{spec.name}' takes batches of {spec.shape[0]}, not of {batch}", "Pass that --batch")
        shape = [n if isinstance(n, int) else batch for n in spec.shape]
        drawn = rng.uniform(-1, 1, shape) if spec.dtype == "float32" else rng.integers(0, TOKENS, shape)
        inputs[spec.name] = drawn.astype(spec.dtype)
    return inputs


def peak_rss() -> float:
    """The most memory that this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the parent's peak too: Linux keeps it over fork and exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return float(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset)
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on macOS


def answer(arguments: Sequence[str], run: Callable[[Path, Any], Mapping[str, Any]]) -> None:
    """Run ARTIFACT REQUEST-AS-JSON in this process and print one JSON line, an expected failure included."""
    artifact, request = arguments
    try:
        document = run(Path(artifact), json.loads(request))
    except MedgeError as error:
        document = {"error": [type(error).__name__, error.message, error.remedy]}
    sys.stdout.write(json.dumps(document) + "\n")


def main(arguments: Sequence[str]) -> None:
    """Measure in this process: ARTIFACT OPTIONS-AS-JSON."""
    answer(arguments, lambda artifact, request: measure(artifact, BenchOptions(**request)))


if __name__ == "__main__":
    main(sys.argv[1:])
