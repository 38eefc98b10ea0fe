"""Verbs that hold artifacts to their baseline: baseline capture, check, bench, report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medge.cli.console import Force, Json, Threads, print_json, print_table, progress, say
from medge.cli.inference import ArtifactPath, Templates

if TYPE_CHECKING:
    from medge.benchmarks.records import CheckResult, ParityMatrix, RunRecord

DataPath = Annotated[
    Path | None,
    typer.Option(
        help="A folder per class, or a CSV with path and label; for a chat model, prompts as JSONL. "
        "Default: what ships with medge."
    ),
]
_OVERALL = {
    "ok": "OK: within every limit",
    "inconclusive": "INCONCLUSIVE: not a pass. More images narrow the intervals",
    "regressed": "REGRESSED",
}

ReportPath = Annotated[Path | None, typer.Option("--report", help="Also write an HTML report.")]


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    baseline = typer.Typer(help="Record what the reference answers.", no_args_is_help=True)
    baseline.command()(capture)
    baseline.callback()(lambda: None)  # keeps `capture` a sub-command while it is the only one
    app.add_typer(baseline, name="baseline")
    for verb in (check, parity, bench, report):
        app.command()(verb)


def capture(
    model: Annotated[str, typer.Argument(help="A model id, or a checkpoint folder.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The baseline folder to write.")],
    data: DataPath = None,
    template: Templates = None,
    variant: Annotated[str | None, typer.Option(help="Preprocessing; default: the model's own.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Of a chat model: use that many of the prompts.")] = None,
    force: Force = False,
) -> None:
    """Run the torch reference over a dataset; it is named in the baseline with its device and precision."""
    from medge.benchmarks.baseline import TEMPLATES
    from medge.benchmarks.baseline import capture as run
    from medge.errors import UsageError
    from medge.export.hub import resolve
    from medge.samples import sample_root
    from medge.spec import variant as as_variant

    checkpoint = resolve(model)
    if checkpoint.any_spec.task == "generate":
        if template or variant:
            raise UsageError("--template and --variant are for encoders", "Leave them out: this is a chat model")
        _capture_chat(checkpoint.root, data, out, count, replace=force)
        return
    if count is not None:
        raise UsageError("--count is for chat models", "Leave it out, and name a smaller folder with --data")
    with progress() as show:
        baseline = run(
            checkpoint.root,
            data or sample_root(),
            out,
            templates=template or TEMPLATES,
            variant=None if variant is None else as_variant(variant),
            replace=force,
            progress=lambda done, total: show("reference", done, total),
        )
    manifest = baseline.manifest
    say(f"{out}: {len(manifest.images)} images, {len(manifest.labels)} labels, by {manifest.reference}")


def _capture_chat(checkpoint: Path, data: Path | None, out: Path, count: int | None, *, replace: bool) -> None:
    from medge.benchmarks.chat_baseline import capture as run
    from medge.benchmarks.chat_data import BUILT_IN
    from medge.checkpoint import Checkpoint
    from medge.export.image_marks import image_mark_flaw

    if flaw := image_mark_flaw(Checkpoint.open(checkpoint)):
        say(f"warning: {flaw}.")
    with progress() as show:
        baseline = run(
            checkpoint,
            data or BUILT_IN,
            out,
            count=count,
            replace=replace,
            progress=lambda done, total: show("reference", done, total),
        )
    manifest = baseline.manifest
    say(f"{out}: {len(manifest.asked)} prompts, {len(baseline.kept)} places, by {manifest.reference}")


def check(
    artifact: ArtifactPath,
    against: Annotated[Path, typer.Option(help="A baseline folder.")],
    data: Annotated[Path | None, typer.Option(help="Where the baseline's images or prompts lie now.")] = None,
    report: ReportPath = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Keep the result as JSON, for medge report.")] = None,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Judge an artifact: ok, regressed (exit 1) or inconclusive, metric by metric with its interval."""
    from medge.benchmarks import chat_check, regress
    from medge.benchmarks.chat_baseline import task_of
    from medge.benchmarks.records import Report
    from medge.benchmarks.report import render
    from medge.errors import UsageError
    from medge.manifest import Artifact
    from medge.runtimes import RunOptions

    chat = Artifact.open(artifact).manifest.task == "generate"
    if not chat and task_of(against) == "generate":
        raise UsageError(f"{against} is the baseline of a chat model, not of an encoder", "Name another --against")
    run = chat_check.check if chat else regress.check
    with progress() as show:
        result = run(
            artifact,
            against,
            data=data,
            options=RunOptions(threads=threads),
            progress=lambda done, total: show("artifact", done, total),
        )
    if out is not None:
        result.save(out)
    if report is not None:
        render(Report(checks=(result,)), report)
    print_json(result.model_dump(mode="json")) if json else print_check(result)
    if report is not None:
        say(f"Report: {report.resolve()}")
    if result.overall == "regressed":
        raise typer.Exit(1)


def print_check(result: CheckResult) -> None:
    """The verdicts as a table, the overall one loud."""
    from medge.benchmarks.report import number

    title = (
        f"{result.artifact.model} {result.artifact.format} {result.artifact.scheme} against {result.reference.runtime}"
    )
    rows = []
    for v in result.verdicts:
        interval = "" if v.low is None or v.high is None else f"{number(v.low, v.metric)} … {number(v.high, v.metric)}"
        rows.append([v.metric, number(v.value, v.metric), interval, number(v.limit, v.metric), v.outcome])
    print_table(title, ["metric", "value", "95 % interval", "limit", "verdict"], rows)
    say(_OVERALL[result.overall])


def parity(
    model: Annotated[str, typer.Argument(help="A model id, or a checkpoint folder.")],
    artifacts: Annotated[list[Path] | None, typer.Argument(metavar="[ARTIFACT…]", help="Artifacts of it.")] = None,
    data: Annotated[Path | None, typer.Option(help="Labelled images; default: those that ship with medge.")] = None,
    count: Annotated[int | None, typer.Option(min=2, help="Use that many images, the labels in turn.")] = None,
    variants: Annotated[bool, typer.Option("--variants", help="Also compare the four preprocessings.")] = False,
    trace: Annotated[bool, typer.Option("--trace", help="Find the first block that diverges, instead.")] = False,
    report: ReportPath = None,
    json: Json = False,
) -> None:
    """Every artifact of one checkpoint beside its fp32 reference: cosines, agreement, AUC."""
    from medge.benchmarks.parity_matrix import parity_matrix
    from medge.benchmarks.records import Report
    from medge.benchmarks.report import render
    from medge.export.hub import resolve
    from medge.samples import sample_root

    if trace:
        _trace(model, artifacts or [], json=json)
        return
    with progress() as show:
        found = parity_matrix(
            resolve(model).root,
            artifacts or [],
            data or sample_root(),
            count=count,
            variants=variants,
            progress=show,
        )
    if report is not None:
        render(Report(parity=found), report)
    print_json(found.model_dump(mode="json")) if json else print_parity(found)
    if report is not None:
        say(f"Report: {report.resolve()}")


def print_parity(found: ParityMatrix) -> None:
    """The matrix as a table."""
    from medge.benchmarks.report import number, size

    metrics = list(found.rows[0].values)
    rows = []
    for row in found.rows:
        auc = "–" if row.auc is None else f"{row.auc:.4f}"
        rows.append([row.name, size(row.bytes), *(number(row.values[m], m) for m in metrics), auc])
    title = f"{found.model} against {found.reference}: {found.images} images, {len(found.labels)} labels"
    print_table(title, ["", "size", *(name.replace("_", " ") for name in metrics), "auc"], rows, numeric=1)
    for runtime in dict.fromkeys(row.runtime for row in found.rows):
        say(f"{', '.join(row.name for row in found.rows if row.runtime == runtime)}: {runtime}")


def _trace(model: str, artifacts: list[Path], *, json: bool) -> None:
    from dataclasses import asdict

    from medge.errors import UsageError
    from medge.export.hub import resolve
    from medge.export.trace import first_divergence
    from medge.export.trace import trace as run
    from medge.manifest import Artifact

    if len(artifacts) != 1:
        raise UsageError("--trace looks into one artifact", "Name exactly one")
    with progress() as show:
        blocks = run(resolve(model), Artifact.open(artifacts[0]), progress=show)
    first = first_divergence(blocks)
    if json:
        print_json({"blocks": [asdict(block) for block in blocks], "first": asdict(first) if first else None})
        return
    most = max(block.error for block in blocks) or 1.0
    rows = []
    for block in blocks:
        bar = "█" * round(20 * block.error / most)
        rows.append(
            [block.module, f"{block.cosine:.6f}", f"{block.error:.2e}", bar, "diverges" if block.diverges else ""]
        )
    print_table(f"{artifacts[0]}, block by block", ["output of", "cosine", "relative error", "", ""], rows)
    say(f"First to diverge: {first.module}" if first else "No block diverges beyond what the scheme may cost")


def bench(
    artifact: ArtifactPath,
    threads: Threads = None,
    batch: Annotated[int, typer.Option(min=1, help="Images a run; an encoder's.")] = 1,
    context: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of a chat model's prompt; several are measured.")
    ] = None,
    allow_noise: Annotated[bool, typer.Option("--allow-noise", help="Measure on a busy host, and say so.")] = False,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Keep the record as JSON, for medge report.")] = None,
    json: Json = False,
) -> None:
    """Load time, latency, throughput, memory and size, in fresh processes, repeated until stable.

    Of a chat model: image, prefill, decode and first token, with one thread and with all unless --threads says.
    """
    from medge.benchmarks.chat_latency import ChatBenchOptions
    from medge.benchmarks.chat_latency import bench as bench_chat
    from medge.benchmarks.latency import BenchOptions
    from medge.benchmarks.latency import bench as bench_encoder
    from medge.manifest import Artifact

    chat = Artifact.open(artifact).manifest.task == "generate"
    with progress() as show:
        if chat:
            options = ChatBenchOptions(
                threads=(threads,) if threads else None,
                contexts=tuple(context or ChatBenchOptions.contexts),
                allow_noise=allow_noise,
            )
            record = bench_chat(artifact, options, lambda done, total: show("bench", done, total))
        else:
            encoder = BenchOptions(threads=threads, batch=batch, allow_noise=allow_noise)
            record = bench_encoder(artifact, encoder, lambda done, total: show("bench", done, total))
    if out is not None:
        record.save(out)
    print_json(record.model_dump(mode="json")) if json else print_bench(record)


def print_bench(record: RunRecord) -> None:
    """The record as a table, a generator's speed as another."""
    from medge.benchmarks.report import SpeedView, seconds, size
    from medge.benchmarks.report import rate as shown_rate

    rows = []
    for metric, samples in record.samples.items():
        show = seconds if metric.endswith("_seconds") else size
        quantiles = [show(record.quantile(metric, q)) for q in (0.5, 0.9, 0.95)]
        rows.append([metric.rpartition("_")[0].replace("_", " "), *quantiles, str(len(samples))])
    subject, conditions = record.artifact, record.conditions
    title = f"{subject.name}: {conditions.runtime}, {conditions.threads} threads, batch {conditions.batch}"
    print_table(title, ["measure", "p50", "p90", "p95", "runs"], rows, numeric=1)
    speeds = []
    for view in map(SpeedView, record.generation):
        share = "–" if view.bandwidth is None else f"{view.bandwidth:.0%}"
        rates = [seconds(view.first_token), shown_rate(view.prefill), shown_rate(view.decode), share]
        speeds.append([str(view.speed.threads), str(view.speed.context), *rates])
    if speeds:
        columns = ["threads", "prompt", "first token", "prefill tokens/s", "decode tokens/s", "of read bandwidth"]
        print_table("", columns, speeds, numeric=0)
    rate = record.images_per_second
    say(f"{size(subject.bytes)}; " + (f"{rate:.2f} images/s; " if rate else "") + record.host.cpu)
    for note in record.notes:
        say(note)


def report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT.json…", help="What check and bench kept with -o.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The HTML file to write.")] = Path("report.html"),
) -> None:
    """Put checks and benchmarks side by side in one self-contained HTML page."""
    from medge.benchmarks.records import CheckResult, Report, RunRecord
    from medge.benchmarks.report import render

    kinds = [(path, _kind(path)) for path in results]
    checks = tuple(CheckResult.load(path) for path, kind in kinds if kind == "check")
    runs = tuple(RunRecord.load(path) for path, kind in kinds if kind == "bench")
    render(Report(checks=checks, runs=runs), out)
    say(f"Report: {out.resolve()}")


def _kind(path: Path) -> str:
    """Which record a JSON file holds, by the field that only it has."""
    import json

    from medge.errors import CorruptError, UsageError

    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CorruptError(f"{path} is no JSON: {error}", "Make it with medge check -o or medge bench -o") from None
    found = [kind for field, kind in (("verdicts", "check"), ("samples", "bench")) if field in document]
    if not found:
        raise UsageError(f"{path} is neither a check nor a benchmark", "Make it with medge check -o or medge bench -o")
    return found[0]
