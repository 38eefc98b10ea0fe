"""What every exporter is given, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from medge.checkpoint import Checkpoint
from medge.manifest import Format
from medge.quantize.calibrate import Range
from medge.quantize.scheme import Scheme
from medge.spec import FloatArray, ModelSpec, Part, Weight


@dataclass(frozen=True)
class Support:
    """Whether a cell of model x format x scheme can be built; if not, the reason, which is all a user sees."""

    ok: bool
    reason: str = ""


@dataclass(frozen=True)
class PartJob:
    """One part to write in one scheme."""

    checkpoint: Checkpoint
    part: Part
    scheme: Scheme
    ranges: Mapping[str, Range] = field(default_factory=dict)
    """Calibrated activation ranges by layer, for static schemes."""
    on_tensor: Callable[[int], None] = lambda count: None
    """Called with the number of weights after each tensor is read, for progress."""

    def read(self, name: str) -> Weight:
        """The checkpoint's tensor, reporting when it is read."""

        def counted() -> FloatArray:
            value = self.checkpoint.read(name)
            self.on_tensor(value.size)
            return value

        return Weight(name, counted)


class Exporter(Protocol):
    """One file format."""

    format: Format
    extra: str
    """The optional dependency set that it needs."""

    def supports(self, spec: ModelSpec, part: Part, scheme: Scheme) -> Support:
        """Whether this part can be built in this scheme."""
        ...

    def write(self, job: PartJob, folder: Path) -> list[str]:
        """Write the part's files; returns their names, the one to open first."""
        ...

    def session(self, scheme: Scheme) -> dict[str, str]:
        """Session settings that the runtime needs for this scheme."""
        ...

    def tools(self) -> dict[str, str]:
        """Versions of what wrote the files."""
        ...
