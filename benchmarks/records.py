"""What the gate writes down: runs, verdicts, results. Laptop, GPU and phone write the same records."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field, model_validator

from medge.benchmarks.host import Host
from medge.errors import CorruptError, UsageError
from medge.manifest import Artifact, Parity, Sha256, write_json
from medge.spec import Frozen

SCHEMA_VERSION = 1

Outcome = Literal["ok", "inconclusive", "regressed"]
Direction = Literal["at_least", "at_most"]

_SEVERITY: dict[Outcome, int] = {"ok": 0, "inconclusive": 1, "regressed": 2}


def now() -> datetime:
    """UTC, to the second."""
    return datetime.now(UTC).replace(microsecond=0)


class Record(BaseModel):
    """A JSON file with a schema version."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    schema_version: int = SCHEMA_VERSION
    created: datetime = Field(default_factory=now)

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all.

        Raises:
            UsageError: it cannot be written there.
        """
        try:
            write_json(path, self.model_dump(mode="json"))
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check it.

        Raises:
            UsageError: no such file.
            CorruptError: no JSON, a newer schema, or a field that contradicts it.
        """
        try:
            raw = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise UsageError(f"{path} is not there") from None
        except ValueError as error:
            raise CorruptError(f"{path} is no JSON: {error}", "Make it again") from None
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise CorruptError(f"{path} has schema version {version}, newer than {SCHEMA_VERSION}", "Update medge")
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise CorruptError(f"{path} is invalid at '{where}': {first['msg']}", "Make it again") from None


class Subject(Frozen):
    """The artifact that a record is about."""

    name: str
    """The folder's name."""
    digest: Sha256
    model: str
    format: str
    scheme: str
    settings: dict[str, str]
    licence: str
    bytes: int
    parity: dict[str, Parity]

    @classmethod
    def of(cls, artifact: Artifact) -> Self:
        """The subject that an opened artifact is."""
        manifest = artifact.manifest
        return cls(
            name=artifact.root.resolve().name,
            digest=artifact.digest,
            model=manifest.source.model,
            format=manifest.format,
            scheme=manifest.scheme,
            settings=manifest.settings,
            licence=manifest.licence,
            bytes=artifact.bytes,
            parity=manifest.parity,
        )


class Conditions(Frozen):
    """How it was run."""

    runtime: str
    """Engine, version and device."""
    threads: int
    batch: int = Field(gt=0)
    variant: str
    """The preprocessing variant."""


class Speed(Frozen):
    """How fast a generator reads and writes with so many threads at so long a prompt; samples of all processes."""

    threads: int = Field(gt=0)
    context: int = Field(gt=0)
    """Tokens of the prompt."""
    first_token_seconds: tuple[float, ...]
    """From the question to the answer's first token."""
    prefill_rate: tuple[float, ...]
    """Tokens of the prompt read a second."""
    decode_rate: tuple[float, ...]
    """Tokens of the answer written a second, the first excepted."""
    bandwidth_share: tuple[float, ...]
    """Bytes of weights that decoding reads a second over what this host can read with these threads."""


class RunRecord(Record):
    """One benchmark of one artifact on one host."""

    artifact: Subject
    host: Host
    conditions: Conditions
    samples: dict[str, tuple[float, ...]]
    """Metric with its unit as suffix ("image_encoder_seconds", "peak_rss_bytes") -> every sample taken."""
    generation: tuple[Speed, ...] = ()
    """Of a generator: a row for each number of threads and length of prompt."""
    notes: tuple[str, ...] = ()

    def quantile(self, metric: str, q: float) -> float | None:
        """A quantile of a metric's samples; None when it was not measured."""
        samples = self.samples.get(metric, ())
        return float(np.quantile(samples, q)) if samples else None

    @property
    def images_per_second(self) -> float | None:
        """Images through the image encoder alone, at the median."""
        median = self.quantile("image_encoder_seconds", 0.5)
        return self.conditions.batch / median if median else None


class Verdict(Frozen):
    """One metric held against its limit."""

    metric: str
    title: str
    unit: str
    direction: Direction
    value: float | None
    """None: undefined, and the detail says why."""
    low: float | None = None
    high: float | None = None
    limit: float
    reason: str
    """Why the limit is where it is."""
    outcome: Outcome
    detail: str = ""


def worst(outcomes: tuple[Outcome, ...]) -> Outcome:
    """The outcome of a whole: its worst part's. Nothing measured is inconclusive."""
    return max(outcomes, key=_SEVERITY.__getitem__, default="inconclusive")


class Case(Frozen):
    """One image, both answers."""

    name: str
    labels: tuple[str, ...]
    cosine: float
    """Between the two embeddings."""
    baseline_label: str
    candidate_label: str


class Reply(Frozen):
    """One prompt, both answers."""

    name: str
    kind: str
    right: str
    """The right answer."""
    reference: str
    artifact: str
    diverges: int | None
    """The first token at which two free answers differ; None where they are the same, and for choices."""


class Curve(Frozen):
    """One label against the rest."""

    label: str
    positives: int
    baseline_auc: float | None
    candidate_auc: float | None
    baseline_roc: tuple[tuple[float, float], ...] = ()
    """(false, true) positive rates."""
    candidate_roc: tuple[tuple[float, float], ...] = ()


class Dots(Frozen):
    """Zero-shot scores of baseline and candidate, thinned for the report."""

    of: int
    """How many there are."""
    points: tuple[tuple[float, float], ...]


class Reference(Frozen):
    """What the artifact was held against."""

    runtime: str
    host: Host
    dataset_digest: Sha256
    images: int
    labels: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    variant: str
    """Of the preprocessing; empty for a model that reads no images."""
    captured: datetime
    prompts: int = 0
    """Of a generator: prompts answered."""
    places: int = 0
    """Of a generator: next-token distributions compared."""


class CheckResult(Record):
    """One artifact held against one baseline."""

    artifact: Subject
    runtime: str
    host: Host
    reference: Reference
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...] = ()
    cases: tuple[Case, ...] = ()
    replies: tuple[Reply, ...] = ()
    curves: tuple[Curve, ...] = ()
    dots: Dots | None = None

    @model_validator(mode="before")
    @classmethod
    def _recompute(cls, raw: Any) -> Any:
        """A file's `overall` is for its readers; here the verdicts decide."""
        return {key: value for key, value in raw.items() if key != "overall"} if isinstance(raw, dict) else raw

    @computed_field  # type: ignore[prop-decorator]
    @property
    def overall(self) -> Outcome:
        """The worst verdict. Inconclusive is no pass."""
        return worst(tuple(verdict.outcome for verdict in self.verdicts))


class ParityRow(Frozen):
    """One artifact, or the reference under one preprocessing, beside the reference."""

    name: str
    runtime: str
    format: str = ""
    scheme: str = ""
    bytes: int | None = None
    values: dict[str, float | None]
    """Metrics by their names in the gate; None where undefined."""
    auc: float | None
    """Macro one-vs-rest zero-shot AUC."""


class ParityMatrix(Record):
    """Every artifact of one checkpoint against its fp32 reference, on the same images and texts."""

    model: str
    reference: str
    variant: str
    images: int
    labels: tuple[str, ...]
    dataset_digest: Sha256
    rows: tuple[ParityRow, ...]


class Report(Record):
    """Everything that one HTML page shows."""

    parity: ParityMatrix | None = None
    checks: tuple[CheckResult, ...] = ()
    runs: tuple[RunRecord, ...] = ()
