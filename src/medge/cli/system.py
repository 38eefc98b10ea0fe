"""Verbs about this installation: doctor, demo."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from medge.cli.console import Json, print_json, print_table, progress, say

_EXTRAS = {
    "export": ("torch", "transformers", "onnx", "optimum"),
    "executorch": ("executorch",),
    "coreml": ("coremltools",),
    "gguf": ("gguf", "llama_cpp"),
    "chat": ("llguidance", "tokenizers"),
    "eval": ("sklearn", "scipy"),
    "dicom": ("pydicom",),
    "device": ("adbutils",),
    "serve": ("starlette", "uvicorn", "prometheus_client"),
}


def register(app: typer.Typer) -> None:
    """Add this module's verbs."""
    app.command()(doctor)
    app.command()(demo)


def doctor(json: Json = False) -> None:
    """Show which extras, runtimes and CPU features are here, how much memory, and what fits."""
    from medge.benchmarks.host import fingerprint

    host = fingerprint()
    facts: dict[str, Any] = {
        "host": host.model_dump(mode="json"),
        "extras": {extra: _missing(modules) for extra, modules in _EXTRAS.items()},
        "cuda": _cuda(),
        "fits": _fits(host.ram_gib),
    }
    if json:
        print_json(facts)
        return
    machine = {
        "processor": f"{host.cpu}, {host.physical_cores} cores ({host.usable_cores} threads usable)",
        "vector extensions": ", ".join(host.isa) or "none that matter",
        "memory": f"{host.ram_gib} GiB",
        "system": host.os,
        "python": host.python,
        "cuda": facts["cuda"] or "none",
        **host.versions,
    }
    print_table("This machine", ["", ""], [[*row] for row in machine.items()])
    extras = [[name, "yes" if not missing else _install(name)] for name, missing in facts["extras"].items()]
    print_table("Extras", ["extra", "installed"], extras)
    print_table("What fits in memory", ["model", "job", "needs", "fits"], [[*map(str, row)] for row in facts["fits"]])


def _install(extra: str) -> str:
    return f"no: pip install 'medge[{extra}]'"


def _missing(modules: tuple[str, ...]) -> list[str]:
    return [module for module in modules if importlib.util.find_spec(module) is None]


def _cuda() -> str:
    """The GPU's name without importing torch, which takes seconds."""
    import shutil
    import subprocess

    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout.strip()


def _fits(ram_gib: float) -> list[tuple[str, str, str, str]]:
    """Jobs by the memory that their weights take: measured factors, docs/performance.md."""
    from medge.registry import MODELS

    rows = []
    for model in MODELS.values():
        billions = model.spec().parameters / 1e9
        for job, factor in (("reference, fp32", 4.6), ("export", 1.0), ("run fp32", 5.0), ("run int8", 1.4)):
            need = billions * factor * 1e9 / 2**30
            rows.append((model.id, job, f"{need:.1f} GiB", "yes" if need < ram_gib * 0.8 else "no"))
    return rows


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="The folder to write.")] = Path("medge-demo"),
) -> None:
    """Export the demo models, check them against their references, classify a real image and ask about it."""
    from medge.demo.run import run

    with progress() as show:
        result = run(out, show)
    for table in result.tables:
        print_table(table.title, table.columns, table.rows)
    if result.missing:
        say(f"{result.missing}.")
    for artifact in result.artifacts[:1]:
        say(f"Ask it more: {_asking(artifact, result.image)}")
    say("The demo models are tiny and their images few: this shows the tool, and is no medical claim.")
    say(f"Report: {result.report.resolve()}")


def _asking(artifact: Path, image: Path) -> str:
    import shlex

    from medge.demo.findings import TOPICS

    return shlex.join(
        ["medge", "generate", str(artifact), "--prompt", TOPICS["look"][0], "--image", str(image), "--stream"]
    )
