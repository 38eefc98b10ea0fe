"""What every exporter is given, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from medge.checkpoint import Checkpoint
from medge.manifest import Format
from medge.progress import Progress
from medge.quantize.calibrate import Range
from medge.quantize.importance import ImportanceMatrix
from medge.quantize.scheme import Rule, Scheme
from medge.runtimes.base import Tensors
from medge.spec import AnySpec, BuildOptions, FloatArray, Ops, Part, TensorSpec, Weight


@dataclass(frozen=True)
class Support:
    """Whether a cell of model x format x scheme can be built; if not, the reason, which is all a user sees."""

    ok: bool
    reason: str = ""
    nearest: str = ""
    """The scheme closest to the one asked for that the format can build."""


@dataclass(frozen=True)
class PartJob:
    """One part to write in one scheme."""

    checkpoint: Checkpoint
    part: Part
    scheme: Scheme
    ranges: Mapping[str, Range] = field(default_factory=dict)
    """Calibrated activation ranges by layer, for static schemes."""
    importance: ImportanceMatrix | None = None
    """What an error of each weight column costs, for formats that round by it."""
    on_tensor: Callable[[int], None] = lambda count: None
    """Called with the number of weights after each tensor is read, for progress."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """What the user set, validated (request.SETTINGS)."""
    tapped: bool = False
    """Also write the output of each of the part's blocks, for tracing."""
    on_step: Progress = lambda stage, done, total: None
    """Progress of long steps that read no weights."""
    samples: Callable[[int], Iterator[Tensors]] = lambda count: iter(())
    """Real inputs, a batch of one each, for exporters that calibrate on a graph of their own."""
    context: int = 0
    """Tokens that a decoder's cache may hold, at most."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The tensors that the file gives."""
        return self.part.signature(tapped=self.tapped)

    def graph(self, ops: Ops[Any], inputs: Mapping[str, Any], options: BuildOptions) -> list[tuple[str, Any]]:
        """The file's outputs by name, built with a format's operations."""
        return self.part.graph(ops, inputs, self.read, options, tapped=self.tapped)

    def read(self, name: str) -> Weight:
        """The checkpoint's tensor, reporting when it is read."""

        def counted() -> FloatArray:
            value = self.checkpoint.read(name)
            self.on_tensor(value.size)
            return value

        def counted_rows(step: int) -> Iterator[NDArray[Any]]:
            for rows in self.checkpoint.raw_rows(name, step):
                self.on_tensor(rows.size)
                yield rows

        return Weight(name, counted, counted_rows)


@dataclass(frozen=True)
class Written:
    """A part on the disk."""

    files: list[str]
    """Paths below the artifact's folder, the one to open first first."""
    facts: dict[str, str] = field(default_factory=dict)
    """What was seen in the file and a user should know: method name, share delegated, which GELU."""


class Exporter(Protocol):
    """One file format."""

    format: Format
    extra: str
    """The optional dependency set that it needs."""
    operators: tuple[type[Any], ...]
    """The protocols (medge.spec) whose operations it can write: which parts it can build."""

    def parts(self, spec: AnySpec) -> tuple[Part, ...]:
        """The parts that become files of their own."""
        ...

    def supports(self, spec: AnySpec, part: Part, scheme: Scheme) -> Support:
        """Whether this part can be built in this scheme."""
        ...

    def stored_bits(self, rule: Rule) -> float:
        """Bits that a weight of a linear layer takes in the file under a rule, scales counted."""
        ...

    def write(self, job: PartJob, folder: Path) -> Written:
        """Write the part's files.

        Raises:
            UnsupportedError: a weight that the scheme cannot hold in this format.
        """
        ...

    def session(self, scheme: Scheme) -> dict[str, str]:
        """Session settings that the runtime needs for this scheme."""
        ...

    def tools(self) -> dict[str, str]:
        """Versions of what wrote the files."""
        ...
