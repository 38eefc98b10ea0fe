"""A MIL program to a .mlpackage folder: what Xcode shows of it, the same bytes every time, and what is in it."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

from medge import __version__
from medge.errors import UnsupportedError
from medge.export.base import PartJob
from medge.export.coreml_program import Target, Toolkit
from medge.registry import licence_of
from medge.runtimes.mil_package import Package
from medge.spec import ImageSpec

_DATA = "com.apple.CoreML"
_TARGETS = {8: "ios17", 9: "ios18"}
"""Core ML's specification version -> the oldest iOS that reads it."""
_DESCRIPTIONS = {
    "image_encoder": "Image tower: one RGB image to its embedding, for zero-shot classification and retrieval.",
    "text_encoder": "Text tower: one tokenized prompt to its embedding.",
    "pixel_values": "Pixels (1, 3, {size}, {size}), RGB, each (level / 255 - mean) / std; preprocessing '{variant}'.",
    "pixel_values image": "RGB image of {size} by {size} pixels; preprocessing '{variant}'. Scaled in the model.",
    "input_ids": "SentencePiece ids, always padded to the full length with {pad}; no attention mask.",
    "image_embeds": "Image embedding, not normalized: divide by its length.",
    "text_embeds": "Text embedding, not normalized: divide by its length.",
}


def write_package(job: PartJob, target: Target, tools: Toolkit, function: Any, folder: Path) -> list[Path]:
    """Save, describe and normalize; returns the package's files, Manifest.json first."""
    path = folder / "Data" / _DATA / "model.mlmodel"
    weights = path.with_name("weights")
    shutil.rmtree(folder, ignore_errors=True)  # what a run left that was cut here
    weights.mkdir(parents=True)
    specification = tools.specification(function, target, weights, _image_inputs(job, target, tools.coremltools))
    _describe(specification.description, job, target)
    path.write_bytes(specification.SerializeToString(deterministic=True))
    return [_manifest(folder, job.part.name), path, weights / "weight.bin"]


def facts(folder: Path) -> dict[str, str]:
    """What the saved package holds, read back from its bytes.

    Raises:
        CorruptError: weights are missing: coremltools' writer says nothing when a disk is full.
    """
    package = Package(folder)
    package.check_weights()
    operations = package.program.operations
    computed = {found.dtype for one in operations if one.type == "linear" for _, found in one.outputs}
    modes = {str(package.program.constant_of(one, "mode").value) for one in operations if one.type == "gelu"}
    gelu = {"TANH_APPROXIMATION": "tanh", "EXACT": "erf"}
    return {
        "gelu": ", ".join(sorted(gelu.get(mode, mode) for mode in modes)),
        "compute": ", ".join(sorted(computed)),
        "target": _TARGETS.get(package.version, f"specification {package.version}"),
        "input": "image" if package.image_inputs else "array",
    }


def _image_inputs(job: PartJob, target: Target, ct: Any) -> list[Any] | None:
    """Core ML's own scaling of RGB levels to what the tower takes; None leaves arrays."""
    pixels = next((spec for spec in job.part.inputs if spec.name == "pixel_values"), None)
    if target.input != "image" or pixels is None:
        return None
    image = job.checkpoint.spec.image
    if len(set(image.std)) > 1:
        raise UnsupportedError("Core ML scales all channels of an image alike", "Use --set input=array")
    shape = (1, *pixels.shape[1:])
    bias = [-mean / std for mean, std in zip(image.mean, image.std, strict=True)]
    return [
        ct.ImageType(
            name=pixels.name,
            shape=shape,
            scale=1 / (255 * image.std[0]),
            bias=bias,
            color_layout=ct.colorlayout.RGB,
        )
    ]


def _describe(description: Any, job: PartJob, target: Target) -> None:
    """Fill in what Xcode shows: licence, purpose, each input and output, preprocessing."""
    spec = job.checkpoint.spec
    image = spec.image.model_copy(update={"variant": job.settings.get("variant", spec.image.variant)})
    words = {"size": image.size, "variant": image.variant, "pad": spec.tokenizer.pad_id}
    for feature in (*description.input, *description.output):
        key = f"{feature.name} image" if feature.type.HasField("imageType") else feature.name
        feature.shortDescription = _DESCRIPTIONS.get(key, "Output of a block, for tracing.").format(**words)
    purpose = _DESCRIPTIONS.get(job.part.name, job.part.name)
    metadata = description.metadata
    metadata.shortDescription = f"{spec.id}, {job.scheme.name}. {purpose} Not a medical device."
    metadata.license = licence_of(spec)
    metadata.author = f"{spec.hub_id or spec.id}, exported by medge {__version__}"
    metadata.versionString = spec.revision
    metadata.userDefined["medge.scheme"] = job.scheme.name
    metadata.userDefined["medge.part"] = job.part.name
    if "pixel_values" in {one.name for one in job.part.inputs}:
        metadata.userDefined["com.apple.coreml.model.preview.parameters"] = _preview(image, target)


def _preview(image: ImageSpec, target: Target) -> str:
    """The image contract. Xcode has no preview type that shows an embedding, so only parameters are stated."""
    return json.dumps({"input": target.input, **image.model_dump(mode="json")}, sort_keys=True)


def _manifest(folder: Path, part: str) -> Path:
    """Manifest.json with identifiers that depend on the content's place, not on when it was written."""
    items = {"model.mlmodel": "CoreML Model Specification", "weights": "CoreML Model Weights"}
    entries = {
        str(uuid.uuid5(uuid.NAMESPACE_URL, f"medge/{part}/{name}")): {
            "author": _DATA,
            "description": description,
            "name": name,
            "path": f"{_DATA}/{name}",
        }
        for name, description in items.items()
    }
    path = folder / "Manifest.json"
    document = {"fileFormatVersion": "1.0.0", "itemInfoEntries": entries, "rootModelIdentifier": next(iter(entries))}
    path.write_text(json.dumps(document, indent=4) + "\n", encoding="utf-8")
    return path
