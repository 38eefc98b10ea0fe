"""`medge demo`: the whole road on the demo models: export, parity, baseline, check, classify, ask, report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medge.benchmarks.baseline import Baseline, capture
from medge.benchmarks.latency import BenchOptions, bench
from medge.benchmarks.records import CheckResult, Report, RunRecord
from medge.benchmarks.regress import check
from medge.benchmarks.report import number, render, seconds, size
from medge.checkpoint import Checkpoint
from medge.demo import IMAGES, MODEL
from medge.demo.asking import ask
from medge.demo.table import Table
from medge.export.pipeline import export
from medge.export.request import Request
from medge.progress import Progress
from medge.quantize.scheme import load
from medge.runtimes import open_embedder as open_artifact

SCHEMES = ("fp32", "int8")
SHOWN = "chest x-ray"
"""The class of the image that the demo classifies and asks about."""
_METRICS = {
    "image_cosine_min": "cosine",
    "centred_cosine_min": "centred",
    "top1_agreement": "top-1",
    "auc_delta": "ΔAUC",
}
"""What is shown of a check, and its short name."""


@dataclass(frozen=True)
class Demo:
    """What there is to show."""

    report: Path
    tables: tuple[Table, ...]
    image: Path
    """What was classified and asked about."""
    artifacts: tuple[Path, ...]
    """Chat artifacts that can be asked more; none where their runtime is missing."""
    missing: str
    """Why there are none."""


def run(out: Path, show: Progress) -> Demo:
    """Run the demo into `out`; a second run replaces what the first wrote."""
    out.mkdir(parents=True, exist_ok=True)
    baseline = _baseline(out / "baseline", show)
    checks, runs = [], []
    for scheme in SCHEMES:
        folder = out / scheme
        export(Request(Checkpoint.open(MODEL), "onnx", load(scheme), folder, replace=True, on_progress=show))
        checks.append(check(folder, out / "baseline", progress=lambda done, total: show("check", done, total)))
        show("bench", 0, 0)
        runs.append(bench(folder, BenchOptions(processes=1, seconds=1.0, allow_noise=True)))
    image = min(IMAGES.joinpath(SHOWN).iterdir())
    tables = (_verdicts(baseline, checks, runs), _scores(out / SCHEMES[-1], baseline, image))
    answers = ask(image, SHOWN, out, show)
    report = out / "report.html"
    render(Report(checks=(*checks, *answers.checks), runs=tuple(runs)), report)
    return Demo(report, (*tables, *answers.tables), image, answers.artifacts, answers.missing)


def _baseline(out: Path, show: Progress) -> Baseline:
    return capture(MODEL, IMAGES, out, replace=True, progress=lambda done, total: show("reference", done, total))


def _verdicts(baseline: Baseline, checks: list[CheckResult], runs: list[RunRecord]) -> Table:
    title = f"Against {baseline.manifest.reference}, {len(baseline.manifest.images)} held-out images"
    columns = ["onnx", "size", *_METRICS.values(), "image", "verdict"]
    return Table(title, columns, [_row(one, timed) for one, timed in zip(checks, runs, strict=True)])


def _row(one: CheckResult, timed: RunRecord) -> list[str]:
    values = {verdict.metric: number(verdict.value, verdict.metric) for verdict in one.verdicts}
    encode = seconds(timed.quantile("image_encoder_seconds", 0.5))
    return [
        one.artifact.scheme,
        size(one.artifact.bytes),
        *(values.get(m, "–") for m in _METRICS),
        encode,
        one.overall,
    ]


def _scores(artifact: Path, baseline: Baseline, image: Path) -> Table:
    labels = baseline.manifest.labels
    (row,) = open_artifact(artifact).classify([image], labels, baseline.manifest.templates)
    rows = [[labels[i], f"{row[i]:.4f}", "█" * round(float(row[i]) * 30)] for i in row.argsort()[::-1][:5]]
    return Table(f"{SHOWN}/{image.name}, by the int8 artifact", ["label", "score", ""], rows)
