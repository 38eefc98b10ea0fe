"""What a number was measured on, and whether the machine was quiet enough to measure at all."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from medge.spec import Frozen

_CPUINFO = Path("/proc/cpuinfo")
_PACKAGES = ("onnxruntime", "llama-cpp-python", "torch", "transformers", "numpy")
_FEATURES = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx512_vnni": "avx512-vnni",
    "avx_vnni": "avx-vnni",
    "avx512_bf16": "avx512-bf16",
    "amx_int8": "amx-int8",
    "amx_bf16": "amx-bf16",
    "asimd": "neon",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "asimdhp": "fp16",
    "sve": "sve",
    # macOS sysctl names
    "hw.optional.neon": "neon",
    "hw.optional.arm.FEAT_DotProd": "dotprod",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_FP16": "fp16",
}
"""What the system calls a vector extension that matters to a kernel -> what reports call it."""

BUSY = 0.10
"""What other programs may take of the machine, and a fixed loop's relative spread, before timings lie."""


class Host(Frozen):
    """A machine and what ran on it. It holds no host name and no user name."""

    cpu: str
    physical_cores: int
    logical_cores: int
    usable_cores: int
    """Logical cores that this process may run on."""
    isa: tuple[str, ...]
    ram_gib: float
    os: str
    python: str
    versions: dict[str, str]

    def times_compare(self, other: Host) -> bool:
        """Whether a time measured here may be held against one measured there.

        The processor, its cores and the operating system must be equal. Versions of libraries may differ: a
        slower new version is what a latency gate is there to find.
        """
        return self._machine() == other._machine()

    def _machine(self) -> tuple[object, ...]:
        return self.cpu, self.physical_cores, self.logical_cores, self.usable_cores, self.isa, self.os


def fingerprint() -> Host:
    """This machine, now."""
    import psutil

    logical = psutil.cpu_count() or 1
    affinity = getattr(os, "sched_getaffinity", None)
    facts = _cpu_facts()
    return Host(
        cpu=_cpu_name(facts),
        physical_cores=psutil.cpu_count(logical=False) or logical,
        logical_cores=logical,
        usable_cores=len(affinity(0)) if affinity else logical,
        isa=tuple(sorted({_FEATURES[flag] for flag in _flags(facts) if flag in _FEATURES})),
        ram_gib=round(psutil.virtual_memory().total / 2**30, 1),
        os=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions={"kernel": platform.release(), **dict(_versions())},
    )


def _versions() -> Iterable[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _cpu_facts() -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo, or the same facts from macOS's sysctl."""
    if _CPUINFO.exists():
        return _pairs(_CPUINFO.read_text(errors="replace").split("\n\n", 1)[0])
    if platform.system() == "Darwin":
        listed = subprocess.run(["sysctl", "machdep.cpu", "hw.optional"], capture_output=True, text=True, check=False)
        return _pairs(listed.stdout)
    return {}


def _pairs(text: str) -> dict[str, str]:
    lines = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def _cpu_name(facts: dict[str, str]) -> str:
    name = facts.get("model name") or facts.get("machdep.cpu.brand_string") or platform.processor() or "unknown"
    if "cpu family" in facts:  # virtual machines say "AMD EPYC": the numbers tell which
        return f"{name} (family {facts['cpu family']}, model {facts.get('model', '?')})"
    if "CPU part" in facts:
        return f"ARM part {facts['CPU part']} variant {facts.get('CPU variant', '?')}"
    return name


def _flags(facts: dict[str, str]) -> list[str]:
    listed = facts.get("flags") or facts.get("Features") or ""
    return listed.split() + [key for key, value in facts.items() if value == "1"]


@dataclass(frozen=True)
class Noise:
    """How much a timing would be disturbed: two shares in 0..1."""

    others: float
    """Share of all cores that other programs (and, in a virtual machine, other guests) took."""
    spread: float
    """Interquartile range of a fixed loop's times over their median."""

    @property
    def reason(self) -> str:
        """Why the host is too noisy to time on; empty when it is quiet."""
        if self.others > BUSY:
            return f"other programs take {self.others:.0%} of the processor (limit {BUSY:.0%})"
        if self.spread > BUSY:
            return f"a fixed loop's times spread by {self.spread:.0%} (limit {BUSY:.0%})"
        return ""


def noise(seconds: float = 0.5) -> Noise:
    """Run a fixed loop for a while and watch what else runs."""
    machine, own, start = _busy_seconds(), time.process_time(), time.perf_counter()
    times = _calibrate(seconds)
    wall = time.perf_counter() - start
    others = (_busy_seconds() - machine) - (time.process_time() - own)
    low, median, high = np.quantile(times, [0.25, 0.5, 0.75])
    share = others / (wall * (os.cpu_count() or 1))
    return Noise(others=float(min(1.0, max(0.0, share))), spread=float((high - low) / median))


def _busy_seconds() -> float:
    """CPU seconds of the whole machine so far, those stolen by other guests included."""
    import psutil

    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    return float(sum(times) - idle - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0))


def _calibrate(seconds: float) -> list[float]:
    values = np.linspace(0.0, 1.0, 50_000)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 20:
        start = time.perf_counter()
        np.sin(values).sum()
        times.append(time.perf_counter() - start)
    return times
