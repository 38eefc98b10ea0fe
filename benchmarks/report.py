"""One HTML page of checks and benchmarks: no network, no script, light and dark, wide and narrow, printable.

Charts are inline SVG in the page's own colours. This module places them (pure geometry); the template draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medge.benchmarks.chat_metrics import CHAT_BY_NAME
from medge.benchmarks.metrics import BY_NAME, Metric
from medge.benchmarks.records import (
    Case,
    CheckResult,
    Curve,
    Dots,
    Outcome,
    ParityMatrix,
    ParityRow,
    Report,
    RunRecord,
    Speed,
    Verdict,
    worst,
)
from medge.errors import UsageError

TEMPLATES = Path(__file__).with_name("templates")
WORST_CASES = 10
SHOWN_CURVES = 6
WORDS: dict[Outcome, str] = {"ok": "✓ ok", "inconclusive": "? inconclusive", "regressed": "✕ regressed"}
_NAMED_TEMPLATES = 3
_OF_ENCODERS = {"top1_agreement": "Top-1 agreement", "auc_delta": "AUC, change", "image_cosine_min": "Least cosine"}
_OF_GENERATORS = {
    "kl_mean": "KL, mean",
    "token_top1_agreement": "Top-1 token agreement",
    "perplexity_ratio": "Perplexity",
}
_LONGEST_REPLY = 300
"""Characters of an answer that a table shows."""
_METRICS: Mapping[str, Metric] = {**BY_NAME, **CHAT_BY_NAME}

Point = tuple[float, float]


def render(report: Report, out: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        UsageError: there is nothing to show, or `out` cannot be written.
    """
    if not report.checks and not report.runs and report.parity is None:
        raise UsageError("There is nothing to report", "Pass at least one check or benchmark")
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.write_text(page(report), encoding="utf-8")
        partial.replace(out)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UsageError(f"{out} cannot be written: {error.strerror}") from error


def page(report: Report) -> str:
    """The page's HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from medge import __version__

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(size=size, rate=rate, seconds=seconds, number=number, path=svg_path, short=short)
    html: str = environment.get_template("report.html").render(
        report=report,
        checks=[CheckView(check) for check in report.checks],
        runs=[RunView(run, report.runs) for run in report.runs],
        parity=ParityView(report.parity) if report.parity else None,
        overall=worst(tuple(check.overall for check in report.checks)),
        words=WORDS,
        summary=summary(report.checks),
        version=__version__,
    )
    return html.lstrip()


def summary(checks: Sequence[CheckResult]) -> dict[str, str]:
    """Metric -> title of what stands for the whole, where several artifacts are compared."""
    kinds = {bool(check.reference.prompts) for check in checks}
    return (_OF_ENCODERS if False in kinds else {}) | (_OF_GENERATORS if True in kinds else {})


def size(count: float | None) -> str:
    """Bytes for people, in powers of ten as disks are sold."""
    if count is None:
        return "–"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * factor:
            value = count / factor
            return f"{value:.0f} {unit}" if value >= 99.95 else f"{value:#.3g} {unit}"
    return f"{count:.0f} B"


def rate(value: float | None) -> str:
    """Images a second."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def seconds(value: float | None) -> str:
    """A duration in ms or s."""
    if value is None:
        return "–"
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def number(value: float | None, metric: str) -> str:
    """A metric's value at the precision that its limits need; changes carry their sign."""
    if value is None:
        return "undefined"
    text = {
        "cosine": f"{value:.5f}",
        "AUC": f"{value:+.4f}",
        "ratio": f"{value:.3f}×" if metric in CHAT_BY_NAME else f"{value:.2f}×",
        "nats": f"{value:.2g} nats" if value >= 1e-4 else f"{value:.0e} nats",
        "share": f"{100 * value:+.1f} points" if metric.endswith("_delta") else f"{100 * value:.1f} %",
    }[_METRICS[metric].unit]
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")  # zero has no sign
    return text.replace("-", "−")


def short(text: str) -> str:
    """An answer as a table shows it."""
    return text if len(text) <= _LONGEST_REPLY else f"{text[:_LONGEST_REPLY]}…"


def svg_path(points: Sequence[Point]) -> str:
    """Points as an SVG path."""
    return "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)


@dataclass(frozen=True)
class Scale:
    """A data interval on a line of pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Where a value lies; outside the interval, at its end."""
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return round(self.start + min(1.0, max(0.0, share)) * (self.end - self.start), 2)


class VerdictView:
    """A row of the verdict table with its interval bar, 180 pixels wide."""

    width = 180

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        self.meaning = _METRICS[verdict.metric].meaning
        self.kind = _METRICS[verdict.metric].kind
        self.sign = "≥" if verdict.direction == "at_least" else "≤"
        ends = [v for v in (verdict.limit, verdict.value, verdict.low, verdict.high) if v is not None]
        pad = 0.2 * (max(ends) - min(ends)) or 0.5 * abs(verdict.limit) or 1.0
        self.x = Scale(min(ends) - pad, max(ends) + pad, 4, self.width - 4)
        limit = self.x(verdict.limit)
        self.zone = (limit, self.width - limit) if verdict.direction == "at_least" else (0.0, limit)
        """Where the metric is within its limit: (x, width)."""


class Histogram:
    """Cosines of all images in bars, 560 x 216."""

    bins = 24

    def __init__(self, cases: Sequence[Case]) -> None:
        cosines = np.array([case.cosine for case in cases])
        low, high = float(cosines.min()), max(1.0, float(cosines.max()))
        low = min(low, high - 1e-6)
        counts, edges = np.histogram(cosines, bins=self.bins, range=(low, high))
        self.low, self.high, self.most = low, high, int(counts.max())
        x, y = Scale(low, high, 34, 554), Scale(0, self.most, 186, 10)
        self.bars = [
            (x(left) + 0.5, y(count), x(right) - x(left) - 1, 186 - y(count))
            for count, left, right in zip(counts.tolist(), edges[:-1], edges[1:], strict=True)
        ]


class Scatter:
    """Reference score (x) against artifact score (y), 260 x 260, on one scale."""

    def __init__(self, dots: Dots) -> None:
        values = [value for point in dots.points for value in point]
        self.low, self.high = min(values), max(values)
        x, y = Scale(self.low, self.high, 40, 252), Scale(self.low, self.high, 226, 10)
        self.points = [(x(a), y(b)) for a, b in dots.points]
        self.of = dots.of


class Roc:
    """One label's two ROC curves, 150 x 150."""

    def __init__(self, curve: Curve) -> None:
        self.curve = curve
        self.baseline = _roc_path(curve.baseline_roc)
        self.candidate = _roc_path(curve.candidate_roc)


def _roc_path(points: Sequence[Point]) -> list[Point]:
    x, y = Scale(0, 1, 6, 144), Scale(0, 1, 144, 6)
    return [(x(a), y(b)) for a, b in points]


class CheckView:
    """A check as the page shows it."""

    def __init__(self, check: CheckResult) -> None:
        self.check = check
        self.verdicts = [VerdictView(verdict) for verdict in check.verdicts]
        self.histogram = Histogram(check.cases) if check.cases else None
        self.scatter = Scatter(check.dots) if check.dots and check.dots.points else None
        self.rocs = [Roc(curve) for curve in check.curves if curve.baseline_roc][:SHOWN_CURVES]
        self.worst = check.cases[:WORST_CASES]
        self.replies = [reply for reply in check.replies if reply.artifact != reply.reference]
        """Those that changed."""
        self.changed = [case for case in check.cases if case.baseline_label != case.candidate_label]
        self.labels = _listed(check.reference.labels, 12)
        self.templates = _listed([f"“{t}”" for t in check.reference.templates], _NAMED_TEMPLATES)

    @property
    def sentence(self) -> str:
        """The outcome in words."""
        verdicts = self.check.verdicts
        count = sum(verdict.outcome == self.check.overall for verdict in verdicts)
        of = f"{count} of {len(verdicts)} metrics"
        data = "prompts" if self.check.reference.prompts else "images"
        return {
            "ok": f"All {len(verdicts)} metrics lie within their limits on these {data}.",
            "inconclusive": f"Not a pass: {of} cannot be told from their limits with these {data}.",
            "regressed": f"{of} {'lies' if count == 1 else 'lie'} beyond the limit.",
        }[self.check.overall]

    def verdict(self, metric: str) -> Verdict | None:
        """One metric's verdict, if it was judged."""
        return next((verdict for verdict in self.check.verdicts if verdict.metric == metric), None)


class SpeedView:
    """A generator's speed at one number of threads and length of prompt, medians."""

    def __init__(self, speed: Speed) -> None:
        self.speed = speed
        names = ("first_token_seconds", "prefill_rate", "decode_rate", "bandwidth_share")
        medians = (float(np.median(samples)) if (samples := getattr(speed, name)) else None for name in names)
        self.first_token, self.prefill, self.decode, self.bandwidth = medians


class RunView:
    """A benchmark as a row, with bars relative to the slowest and largest row."""

    def __init__(self, run: RunRecord, runs: Sequence[RunRecord]) -> None:
        self.run = run
        self.speeds = [SpeedView(speed) for speed in run.generation]
        self.median = run.quantile("image_encoder_seconds", 0.5)
        medians = [m for m in (r.quantile("image_encoder_seconds", 0.5) for r in runs) if m is not None]
        self.time_share = 100 * (self.median or 0) / max(medians, default=1.0)
        self.size_share = 100 * run.artifact.bytes / max(1, *(r.artifact.bytes for r in runs))


class ParityView:
    """The parity matrix with a bar for each row's distance from the reference, on a logarithmic scale."""

    def __init__(self, matrix: ParityMatrix) -> None:
        self.matrix = matrix
        self.metrics = [BY_NAME[name] for name in matrix.rows[0].values]
        self.labels = _listed(matrix.labels, 12)
        self.rows = [(row, self._bar(row)) for row in matrix.rows]

    def _bar(self, row: ParityRow) -> float:
        """Percent of the width for 1 - cosine between 1e-7 and 1."""
        distance = 1 - (row.values["image_cosine_mean"] or 0.0)
        return Scale(-7, 0, 0, 100)(float(np.log10(max(1e-7, distance))))


def _listed(names: Sequence[str], most: int) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
