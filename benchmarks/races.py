"""Who races whom at full size, and what the project promises of the outcome: data, and the arithmetic on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medge.benchmarks import peers
from medge.runtimes.base import normalize

REFERENCE = "torch fp32"
OPTIMUM = "optimum-cli, both towers"


@dataclass(frozen=True)
class Contender:
    """One way to run the image tower."""

    name: str
    path: str
    """Below the working folder."""
    run: Callable[[Path, int], peers.Run]
    peer: str = ""
    """The function of peers.py that makes it."""
    export: tuple[str, str] | None = None
    """The format and scheme in which medge makes it."""


def of_medge(format: str, scheme: str) -> Contender:
    """An artifact of medge's."""
    return Contender(f"{format} {scheme}", f"{format}-{scheme}", peers.run_medge, export=(format, scheme))


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


@dataclass(frozen=True)
class Usage:
    """What a finished process took, by the operating system's account."""

    wall: float
    cpu: float
    rss: int
    """Peak resident bytes of the largest process."""


@dataclass(frozen=True)
class Measured:
    """A race's samples: for each contender one record a round."""

    folder: Path
    contenders: Sequence[Contender]
    rounds: Mapping[str, list[dict[str, Any]]]
    usage: Mapping[str, Usage]
    """What making each took, by job."""

    def ratio(self, slow: str, fast: str) -> float:
        """How many times faster: the median over rounds of the ratio within a round, so that drift cancels."""
        pairs = zip(self.rounds[slow], self.rounds[fast], strict=True)
        return float(np.median([np.median(a["times"]) / np.median(b["times"]) for a, b in pairs]))

    def seconds(self, name: str) -> float:
        """Median over rounds of each process's own median."""
        return float(np.median([np.median(one["times"]) for one in self.rounds[name]]))

    def rss(self, name: str) -> int:
        """Peak resident bytes over the rounds."""
        return int(max(one["rss"] for one in self.rounds[name]))

    def load(self, name: str) -> float:
        """Seconds to load, the median over rounds."""
        return float(np.median([one["load"] for one in self.rounds[name]]))

    def fidelity(self, name: str) -> tuple[float, float]:
        """(least cosine, least centred cosine) to torch fp32 over the images."""
        from medge.export.parity import centred_cosine

        ours, reference = (normalize(np.load(embeds(self.folder, one))) for one in (name, REFERENCE))
        return float((ours * reference).sum(1).min()), float(centred_cosine(ours, reference).min())

    def size(self, name: str) -> int:
        """Bytes of the image tower's files."""
        path = self.folder / next(one.path for one in self.contenders if one.name == name)
        files = path.parent.iterdir() if path.is_file() else path.rglob("*")
        wanted = (file for file in files if file.is_file())
        return sum(file.stat().st_size for file in wanted if path.is_file() or "image_encoder" in str(file))


def embeds(folder: Path, name: str) -> Path:
    """Where a contender's embeddings are kept."""
    return folder / f"embeds-{name.replace(' ', '-').replace(',', '')}.npy"


def export_job(format: str, scheme: str) -> str:
    """The name of the job that makes an artifact."""
    return f"medge export {format} {scheme}, both towers"


@dataclass(frozen=True)
class Race:
    """Contenders, what is made beside them, and the promises."""

    contenders: tuple[Contender, ...]
    base: str
    """The contender that the others' times are stated against."""
    goals: Callable[[Measured], Iterator[Goal]]
    exports: tuple[tuple[str, str], ...] = ()
    """Formats and schemes that are made for their cost alone: none of them runs here at speed."""
    optimum: bool = False
    """Whether optimum's own export is made, to compare its cost."""


def _peers_goals(m: Measured) -> Iterator[Goal]:
    int8, int4 = "onnx int8", "onnx int4"
    yield Goal("int8: times faster than plain fp32 ONNX", m.ratio("plain fp32 ONNX", int8), 3.0, True)
    openvino = "OpenVINO int8 weights, bf16"
    yield Goal(f"int8: times faster than {openvino}", m.ratio(openvino, int8), 1.1, True)
    cosine, centred = m.fidelity(int8)
    yield Goal("int8: least cosine to fp32", cosine, 0.9995, True)
    yield Goal("int8: least centred cosine to fp32", centred, 0.985, True)
    yield Goal("int8: peak memory over torch's", m.rss(int8) / m.rss(REFERENCE), 0.25, False)
    yield Goal("int4: image tower, MB", m.size(int4) / 1e6, 280, False)
    yield Goal("int4: time over int8's", m.ratio(int4, int8), 1.1, False)
    yield from _memory_goals(m, {"onnx": 3.0})
    floats = [m.usage[job] for s in ("fp32", "fp16", "int8") if (job := export_job("onnx", s)) in m.usage]
    if floats and OPTIMUM in m.usage:
        share = max(one.cpu for one in floats) / m.usage[OPTIMUM].cpu
        yield Goal("export: CPU time of the slowest of fp32, fp16, int8 over optimum-cli's", share, 0.5, False)
    if "synth full" in m.usage:
        yield Goal("synth full: seconds", m.usage["synth full"].wall, 60, False)
        yield Goal("synth full: peak memory, GB", m.usage["synth full"].rss / 1e9, 1.5, False)


def _memory_goals(m: Measured, bounds: Mapping[str, float]) -> Iterator[Goal]:
    for job, one in m.usage.items():
        bound = next((gb for format, gb in bounds.items() if job.startswith(f"medge export {format} ")), None)
        if bound is not None:
            yield Goal(f"{job}: peak memory, GB", one.rss / 1e9, bound, False)


def _formats_goals(m: Measured) -> Iterator[Goal]:
    yield Goal("ExecuTorch int8: times faster than its fp32", m.ratio("executorch fp32", "executorch int8"), 2.2, True)
    yield Goal("ExecuTorch int8: time over ONNX int8's", m.ratio("executorch int8", "onnx int8"), 1.25, False)
    yield Goal("GGUF int8 (Q8_0): time over ONNX int8's", m.ratio("gguf int8", "onnx int8"), 2.5, False)
    for one in m.contenders:
        if one.export is not None and one.export[1] in ("fp32", "fp16", "int8"):
            bound = 0.9995 if one.export[1] == "int8" else 0.9999
            yield Goal(f"{one.name}: least cosine to fp32", m.fidelity(one.name)[0], bound, True)
    yield from _memory_goals(m, {"executorch": 6.0, "gguf": 6.0, "coreml": 5.0})
    for job, usage in m.usage.items():
        if job.startswith("medge export executorch "):
            yield Goal(f"{job}: CPU minutes", usage.cpu / 60, 5.0, False)


_PEERS = (
    Contender("plain fp32 ONNX", "plain/model.onnx", peers.run_plain_onnx, "make_plain_onnx"),
    Contender("OpenVINO int8 weights, bf16", "openvino/model.xml", peers.run_openvino, "make_openvino"),
    Contender(REFERENCE, "checkpoint", peers.run_torch),
    *(of_medge("onnx", scheme) for scheme in ("fp32", "int8", "int8-static", "int4-mixed", "int4")),
)
_FORMATS = (
    Contender(REFERENCE, "checkpoint", peers.run_torch),
    *(of_medge("onnx", scheme) for scheme in ("fp32", "int8")),
    *(of_medge("executorch", scheme) for scheme in ("fp32", "int8", "int8-static", "int4")),
    *(of_medge("gguf", scheme) for scheme in ("fp16", "int8", "int4")),
)
RACES = {
    "peers": Race(_PEERS, "plain fp32 ONNX", _peers_goals, optimum=True),
    "formats": Race(
        _FORMATS,
        "onnx fp32",
        _formats_goals,
        exports=tuple(("coreml", s) for s in ("fp16", "int8", "int8-static", "int4", "palette6", "palette4")),
    ),
}
