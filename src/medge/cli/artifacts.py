"""Verbs that make and check artifacts: targets, synth, fetch, export, verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medge.cli.console import Force, Json, Settings, parse_settings, print_json, print_table, progress, say
from medge.errors import UsageError, require

if TYPE_CHECKING:
    from medge.export.formats import Row

Out = Annotated[Path, typer.Option("-o", "--out", help="The folder to write.")]


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    for verb in (targets, synth, fetch, export, verify):
        app.command()(verb)


def targets(json: Json = False) -> None:
    """Show what can be exported: model x format x scheme, each with the reason where it cannot."""
    from medge.export.formats import rows
    from medge.export.formats import targets as cells

    if json:
        print_json([{"model": t.model, "format": t.format, "scheme": t.scheme, "ok": t.support.ok,
                     "reason": t.support.reason} for t in cells()])  # fmt: skip
        return
    merged = rows()
    marks = [[*_named(row), *("yes" if cell.ok else "–" for cell in row.cells.values())] for row in merged]
    print_table("", ["models", "format", *merged[0].cells], marks)
    reasons = [[*_named(row), ", ".join(schemes), why] for row in merged for why, schemes in row.reasons.items()]
    print_table("Why not", ["models", "format", "schemes", "reason"], reasons)


def _named(row: Row) -> tuple[str, str]:
    return "\n".join(row.models), row.format


def synth(
    model: Annotated[str, typer.Argument(help="A model id, for example medsiglip-448.")],
    out: Out,
    size: Annotated[str, typer.Option(help="tiny or full.")] = "tiny",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    lazy: Annotated[
        bool, typer.Option("--lazy", help="Make each shard when an export reads it, and delete it then.")
    ] = False,
    force: Force = False,
) -> None:
    """Write a seeded random checkpoint: for plumbing, speed and memory, never accuracy."""
    from medge.export.synth import parameters, synthesize
    from medge.progress import counter

    with progress() as report:
        on_tensor = counter(report, "write weights", parameters(model, size))
        spec = synthesize(model, size, out, seed=seed, replace=force, lazy=lazy, on_tensor=on_tensor)
    say(f"{out}: {spec.parameters / 1e6:.1f} M random parameters in {len(spec.tensors)} tensors")


def fetch(
    model: Annotated[str, typer.Argument(help="A model id.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    lazy: Annotated[
        Path | None,
        typer.Option(help="Write this folder, without weights: an export downloads each shard, and deletes it then."),
    ] = None,
    force: Force = False,
) -> None:
    """Download a gated checkpoint with your own accepted licence; prints its folder."""
    from medge.export.hub import fetch as download
    from medge.export.hub import fetch_lazily

    if force and lazy is None:
        raise UsageError("--force replaces the folder of --lazy", "Leave it out: the hub's cache is kept up to date")
    typer.echo(download(model, revision) if lazy is None else fetch_lazily(model, lazy, revision, replace=force))


def export(
    model: Annotated[str, typer.Argument(help="A model id, or a checkpoint folder in Hugging Face layout.")],
    out: Out,
    format: Annotated[str, typer.Option(help="onnx, executorch, coreml or gguf.")] = "onnx",
    scheme: Annotated[str, typer.Option(help="A scheme's name, or your own TOML file.")] = "int8",
    set_: Settings = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Turn a checkpoint into an artifact folder. Cut short, the same command resumes."""
    require("onnx", "export")
    from medge.export.hub import resolve
    from medge.export.pipeline import export as run
    from medge.export.request import Request
    from medge.quantize.scheme import load

    with progress() as report:
        settings = parse_settings(set_)
        request = Request(resolve(model), format, load(scheme), out, settings, replace=force, on_progress=report)
        artifact = run(request)
    manifest = artifact.manifest.model_dump(mode="json")
    if json:
        print_json({"artifact": str(out), "digest": artifact.digest, "bytes": artifact.bytes, "manifest": manifest})
        return
    cosines = ["cosine mean", "cosine min", "centred min"] if manifest["parity"] else []
    print_table(f"{out}", ["part", "MB", *cosines], _part_rows(manifest), numeric=1)
    for name, part in manifest["parts"].items():
        say(f"{name}: " + "; ".join(f"{fact} {value}" for fact, value in part["facts"].items()))


def _part_rows(manifest: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, part in manifest["parts"].items():
        megabytes = sum(file["bytes"] for file in part["files"]) / 1e6
        found = manifest["parity"].get(name, {})
        cosines = (found.get(key) for key in ("cosine_mean", "cosine_min", "centred_cosine_min"))
        shown = ["–" if c is None else f"{c:.6f}" for c in cosines] if manifest["parity"] else []
        rows.append([name, f"{megabytes:.1f}", *shown])
    return rows


def verify(artifact: Annotated[Path, typer.Argument(help="An artifact folder.")], json: Json = False) -> None:
    """Re-hash every file of an artifact against its manifest."""
    from medge.manifest import Artifact

    opened = Artifact.open(artifact)
    files = [file.path for file in opened.verify()]
    if json:
        print_json({"artifact": str(artifact), "ok": True, "files": files, "digest": opened.digest})
    else:
        say(f"{artifact}: {len(files)} files, {opened.bytes / 1e6:.1f} MB, all as the manifest says")
