"""`--set layout=optimum`: the joint graph of optimum's own exporter, for tools built on optimum.

One graph of both towers and the logits, which `ORTModelForZeroShotImageClassification` loads. It is fp32, and
it is optimum's: medge's runtime opens the split layout.
"""

from __future__ import annotations

import warnings
from importlib.metadata import version
from pathlib import Path

from medge import __version__
from medge.errors import UnsupportedError, require
from medge.export.card import model_card, notice
from medge.export.request import Request
from medge.manifest import MANIFEST, SCHEMA_VERSION, Artifact, Manifest, PartFiles, Source, describe, write_json
from medge.registry import licence_of
from medge.spec import TensorSpec
from medge.staging import staged

TASK = "zero-shot-image-classification"
PART = "joint"


def export_joint(request: Request) -> Artifact:
    """Write optimum's joint graph with a manifest beside it.

    Raises:
        UnsupportedError: a scheme other than fp32, or a format other than onnx.
    """
    if request.scheme.name != "fp32" or request.format != "onnx":
        raise UnsupportedError(
            f"layout=optimum is optimum's own fp32 ONNX export, not {request.format} {request.scheme.name}",
            "Use --format onnx --scheme fp32, or leave the layout out",
        )
    with staged(request.out, replace=request.replace) as folder:
        request.on_progress("optimum's exporter", 0, 0)
        _run_optimum(request.checkpoint.root, folder)
        manifest = _manifest(request, folder)
        write_json(folder / MANIFEST, manifest.model_dump(mode="json"))
    return Artifact.open(request.out)


def _run_optimum(checkpoint: Path, folder: Path) -> None:
    exporter = require("optimum.exporters.onnx", "export")
    require("transformers", "export").logging.set_verbosity_error()
    with warnings.catch_warnings():  # tracer warnings about constants; the numbers are checked in the tests
        warnings.simplefilter("ignore")
        exporter.main_export(str(checkpoint), folder, task=TASK, local_files_only=True, do_validation=False)


def _manifest(request: Request, folder: Path) -> Manifest:
    spec = request.checkpoint.spec
    (folder / "NOTICE").write_text(notice(licence_of(spec)), encoding="utf-8")
    names = sorted(path.name for path in folder.iterdir())
    graph = [name for name in names if name.startswith("model.onnx")]
    image, text = (part.inputs[0] for part in spec.parts)
    logits = TensorSpec(name="logits_per_image", dtype="float32", shape=("batch", "texts"))
    embeds = tuple(part.outputs[0] for part in spec.parts)
    part = PartFiles(
        files=tuple(describe(folder, name) for name in graph), inputs=(text, image), outputs=(logits, *embeds)
    )
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        source=Source(
            model=spec.id, hub_id=spec.hub_id, revision=spec.revision, weights_sha256=request.checkpoint.sha256
        ),
        licence=licence_of(spec),
        task=spec.task,
        format="onnx",
        scheme="fp32",
        settings=request.recorded,
        parts={PART: part},
        image=spec.image.model_copy(update={"variant": request.variant}),
        tokenizer=spec.tokenizer,
        scalars=request.checkpoint.scalars(),
        tools={"medge": __version__, "optimum-onnx": version("optimum-onnx")},
    )
    (folder / "README.md").write_text(model_card(manifest, "optimum's joint graph"), encoding="utf-8")
    others = [describe(folder, name) for name in [*names, "README.md"] if name not in graph]
    return manifest.model_copy(update={"files": tuple(others)})
