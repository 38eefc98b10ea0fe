"""Core ML packages made here: what is in them, what Apple's own tools read, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from medge.benchmarks.full_size import spend
from medge.checkpoint import Checkpoint
from medge.demo import IMAGES, MODEL, labels
from medge.errors import UnsupportedError
from medge.export.coreml import CoremlExporter
from medge.export.pipeline import export
from medge.export.request import Request
from medge.export.synth import synthesize
from medge.manifest import Artifact
from medge.quantize.scheme import Scheme, load
from medge.runtimes import open_embedder
from medge.runtimes.coreml_backend import quiet_coremltools
from medge.runtimes.mil_package import Package
from medge.spec import FloatArray
from medge.tensorfile import write

Build = Callable[..., Artifact]
PARTS = ("image_encoder", "text_encoder")


@pytest.fixture(scope="session")
def build(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """`build("int8", target="ios17")` -> the artifact, made once a session."""
    made: dict[str, Artifact] = {}

    def run(scheme: str, *, root: Path = checkpoint, format: str = "coreml", **settings: str) -> Artifact:
        key = json.dumps([scheme, str(root), format, settings])
        if key not in made:
            out = tmp_path_factory.mktemp("coreml") / "out"
            asked = {"parity": "off", **settings}
            made[key] = export(Request(Checkpoint.open(root), format, load(scheme), out, asked))
        return made[key]

    return run


class Answers(NamedTuple):
    """Embeddings of the demo model's held-out images and classes, and each image's best class."""

    images: FloatArray
    classes: FloatArray
    top: np.ndarray


def answers(root: Path) -> Answers:
    model = open_embedder(root)
    images = model.embed_images(sorted(IMAGES.glob("*/*.jpg")))
    classes = model.class_embeddings(labels())
    return Answers(images, classes, (images @ classes.T).argmax(1))


@pytest.fixture(scope="session")
def demo(build: Build) -> Answers:
    """ONNX Runtime's answers in fp32."""
    return answers(build("fp32", root=MODEL, format="onnx").root)


def package(artifact: Artifact, part: str = "image_encoder") -> Package:
    return Package(artifact.part_path(part).parent)


def operations(artifact: Artifact, part: str = "image_encoder") -> list[str]:
    return [one.type for one in package(artifact, part).program.operations]


def test_fp32_is_transformers_own_answer(build: Build, reference: Any) -> None:
    """Exact enough to tell the tanh GELU from the erf form."""
    model = open_embedder(build("fp32").root)
    np.testing.assert_allclose(model.embed_images(reference.images), reference.image_embeddings, atol=1e-5)
    np.testing.assert_allclose(model.embed_texts(reference.texts), reference.text_embeddings, atol=1e-5)
    assert "not Apple's runtime" in model.name


@pytest.mark.parametrize(
    ("scheme", "settings", "facts"),
    [
        ("fp32", {}, {"compute": "fp32", "target": "ios18", "input": "array"}),
        ("fp16", {"target": "ios17"}, {"compute": "fp16", "target": "ios17", "input": "array"}),
        ("int4", {"input": "image"}, {"compute": "fp16", "target": "ios18", "input": "image"}),
    ],
)
def test_facts_are_what_the_file_says(
    scheme: str, settings: dict[str, str], facts: dict[str, str], build: Build
) -> None:
    part = build(scheme, **settings).manifest.parts["image_encoder"]
    assert part.facts == {"gelu": "tanh", **facts}
    assert [file.path for file in part.files] == [
        "image_encoder.mlpackage/Manifest.json",
        "image_encoder.mlpackage/Data/com.apple.CoreML/model.mlmodel",
        "image_encoder.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
    ]


@pytest.mark.parametrize(
    ("scheme", "settings", "operation", "count"),
    [
        ("int8", {}, "constexpr_blockwise_shift_scale", 15),  # 2 blocks of 6, pooling's out_proj, fc1 and fc2
        ("int8", {"target": "ios17"}, "constexpr_affine_dequantize", 15),
        ("int4", {}, "constexpr_blockwise_shift_scale", 15),
        ("int4-affine", {}, "constexpr_blockwise_shift_scale", 15),
        ("palette4", {}, "constexpr_lut_to_dense", 15),
        ("palette6", {}, "constexpr_lut_to_dense", 15),
        ("int8-static", {}, "quantize", 10),  # 11 distinct inputs, less the tenth that is left in floats
        ("fp16", {}, "scaled_dot_product_attention", 2),
        ("fp16", {"target": "ios17"}, "softmax", 3),
    ],
)
def test_every_linear_layer_is_stored_as_asked(
    scheme: str, settings: dict[str, str], operation: str, count: int, build: Build
) -> None:
    assert operations(build(scheme, **settings)).count(operation) == count


@pytest.mark.parametrize("scheme", ["fp32", "int8-static", "int4", "palette6"])
@pytest.mark.parametrize("part", PARTS)
def test_coremltools_reads_the_package(scheme: str, part: str, build: Build) -> None:
    """Its loader builds the program again, and so checks every operation's types and shapes."""
    ct = quiet_coremltools()
    root = build(scheme).part_path(part).parent
    spec = ct.utils.load_spec(str(root))
    loader = import_module("coremltools.converters.mil.frontend.milproto.load")
    program = loader.load(spec, spec.specificationVersion, str(root / "Data/com.apple.CoreML/weights"))
    theirs = [one.op_type for one in program.functions["main"].operations if one.op_type != "const"]
    assert theirs == [one for one in operations(build(scheme), part) if one != "const"]
    model = ct.models.MLModel(str(root), skip_model_load=True)
    assert [one.name for one in model.get_spec().description.output] == [
        build(scheme).manifest.parts[part].outputs[0].name
    ]


@pytest.mark.parametrize("scheme", ["fp16", "int4", "palette4"])
def test_two_exports_are_the_same_bytes(scheme: str, build: Build, checkpoint: Path, tmp_path: Path) -> None:
    again = export(Request(Checkpoint.open(checkpoint), "coreml", load(scheme), tmp_path / "b", {"parity": "off"}))
    assert again.digest == build(scheme).digest


def test_an_image_input_gives_what_an_array_gives(build: Build, reference: Any) -> None:
    arrays, images = (open_embedder(build("fp16", **s).root) for s in ({}, {"input": "image"}))
    found = images.embed_images(reference.images)
    np.testing.assert_allclose(found, arrays.embed_images(reference.images), atol=2e-3)
    taken = package(build("fp16", input="image"))
    assert taken.image_inputs == {"pixel_values"}
    assert [one.type for one in taken.program.operations if one.type != "const"][:3] == ["mul", "add", "cast"]
    assert build("fp16", input="image").manifest.parts["image_encoder"].inputs[0].dtype == "float32"


def test_ios_17_gives_what_ios_18_gives(build: Build, reference: Any) -> None:
    new, old = (open_embedder(build("int8", **s).root) for s in ({}, {"target": "ios17"}))
    assert np.sum(new.embed_images(reference.images) * old.embed_images(reference.images), axis=1).min() > 0.9999
    assert package(build("int8", target="ios17")).version == 8


def test_xcode_shows_what_the_model_is(build: Build) -> None:
    ct = quiet_coremltools()
    description = ct.utils.load_spec(str(build("fp16").part_path("image_encoder").parent)).description
    assert "Not a medical device." in description.metadata.shortDescription
    assert description.metadata.license == build("fp16").manifest.licence
    assert "56" in description.input[0].shortDescription
    assert "not normalized" in description.output[0].shortDescription
    assert description.output[0].type.multiArrayType.dataType == 65568  # FLOAT32
    assert list(description.output[0].type.multiArrayType.shape) == [1, 64]
    preview = json.loads(description.metadata.userDefined["com.apple.coreml.model.preview.parameters"])
    assert preview["size"] == 56
    assert package(build("fp16")).metadata["medge.scheme"] == "fp16"


def test_the_preprocessing_that_was_asked_for_is_described(build: Build) -> None:
    assert (
        "'hf'"
        in quiet_coremltools()
        .utils.load_spec(str(build("fp16", variant="hf").part_path("image_encoder").parent))
        .description.input[0]
        .shortDescription
    )


def test_blocks_can_be_tapped(checkpoint: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(checkpoint)
    made = export(Request(opened, "coreml", load("fp16"), tmp_path / "out", {"parity": "off"}, tapped=True))
    names = [output.name for output in made.manifest.parts["image_encoder"].outputs]
    assert names[1:] == [f"tap_{i}" for i in range(len(opened.spec.part("image_encoder").blocks))]
    session = open_embedder(made.root).session("image_encoder")
    found = session.run({"pixel_values": np.zeros((2, 3, 56, 56), np.float32)})
    assert list(found) == names
    assert found["tap_0"].shape == (2, 16, 64)


def test_progress_reaches_the_end(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    request = Request(
        Checkpoint.open(checkpoint),
        "coreml",
        load("int4"),
        tmp_path / "out",
        {"parity": "off"},
        on_progress=lambda *step: seen.append(step),
    )
    export(request)
    weights = [step for step in seen if step[0] == "write weights"]
    assert 0.98 < weights[-1][1] / weights[-1][2] < 1.01  # the pooling head reads its projection twice
    assert ("save image_encoder.mlpackage", 0, 0) in seen


def test_what_a_cut_run_left_is_written_again(build: Build, checkpoint: Path, tmp_path: Path) -> None:
    request = Request(Checkpoint.open(checkpoint), "coreml", load("fp16"), tmp_path / "out", {"parity": "off"})
    folder = tmp_path / ".out.partial"
    weights = folder / "image_encoder.mlpackage" / "Data" / "com.apple.CoreML" / "weights"
    weights.mkdir(parents=True)
    (weights / "weight.bin").write_bytes(b"cut")
    (folder / ".resume-key").write_text(request.key)
    assert export(request).digest == build("fp16").digest


def test_nothing_is_printed(checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export(Request(Checkpoint.open(checkpoint), "coreml", load("palette4"), tmp_path / "out", {"parity": "off"}))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("scheme", ["int4", "int4-affine", "palette4"])
def test_ios_17_refuses_what_it_cannot_store(scheme: str, checkpoint: Path, tmp_path: Path) -> None:
    request = Request(Checkpoint.open(checkpoint), "coreml", load(scheme), tmp_path / "out", {"target": "ios17"})
    with pytest.raises(UnsupportedError, match=f"'{scheme}' needs iOS 18") as caught:
        export(request)
    assert "--scheme int8" in caught.value.remedy


def test_a_palette_a_tensor_runs_on_ios_17(checkpoint: Path, tmp_path: Path, reference: Any) -> None:
    rules = [{"match": r".*(embedding)", "bits": 16}, {"match": ".*", "bits": 6, "method": "kmeans"}]
    scheme = Scheme.model_validate({"name": "p", "title": "p", "activations": "none", "rules": rules})
    found = [
        open_embedder(
            export(
                Request(Checkpoint.open(checkpoint), "coreml", scheme, tmp_path / t, {"parity": "off", "target": t})
            ).root
        )
        for t in ("ios17", "ios18")
    ]
    old, new = (model.embed_images(reference.images) for model in found)
    assert np.sum(old * new, axis=1).min() > 0.9999
    assert np.sum(old * reference.image_embeddings, axis=1).min() > 0.98


@pytest.mark.parametrize(("scheme", "nearest"), [("int5", "palette6"), ("int4-nl", "palette4")])
def test_what_core_ml_cannot_store_is_refused_with_the_nearest(scheme: str, nearest: str, checkpoint: Path) -> None:
    spec = Checkpoint.open(checkpoint).spec
    support = CoremlExporter().supports(spec, spec.part("image_encoder"), load(scheme))
    assert (support.ok, support.nearest) == (False, nearest)
    assert support.reason
    assert CoremlExporter().supports(spec, spec.part("image_encoder"), load(nearest)).ok


def test_asking_what_is_supported_loads_no_coremltools() -> None:
    code = "from medge.export.formats import targets; import sys; list(targets())"
    code += "; print([m for m in ('coremltools', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("scheme", ["fp16", "int8", "int4", "palette4"])
def test_weights_beyond_float16_are_refused_by_name(scheme: str, own_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(own_checkpoint)
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    values = {one: checkpoint.read(one) for one in checkpoint.spec.tensors}
    values[name] = values[name] + np.float32(70000) * (np.arange(values[name].size) == 7).reshape(values[name].shape)
    write(own_checkpoint / "model.safetensors", checkpoint.spec.tensors, lambda one: values[one])
    request = Request(Checkpoint.open(own_checkpoint), "coreml", load(scheme), tmp_path / "out", {"parity": "off"})
    with pytest.raises(UnsupportedError, match=f"'{name}' holds weights beyond 65504"):
        export(request)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_full_size_exports_stay_below_5_gb(tmp_path: Path) -> None:
    synthesize("medsiglip-448", "full", tmp_path / "full")
    command = [sys.executable, "-m", "medge.cli", "export", str(tmp_path / "full"), "--format", "coreml"]
    for scheme in ("fp32", "palette4"):
        out = tmp_path / scheme
        usage = spend([*command, "--scheme", scheme, "--set", "parity=off", "-o", str(out)])
        assert usage.rss < 5e9
        assert usage.cpu < 300  # coremltools' own k-means takes 19 minutes
        shutil.rmtree(out)


@pytest.mark.parametrize(
    ("scheme", "least_cosine", "least_agreement"),
    [
        ("fp32", 0.9999, 1),
        ("fp16", 0.9999, 1),
        ("int8", 0.999, 0.99),
        ("int4", 0.97, 0.97),
        ("palette4", 0.97, 0.97),
    ],
)
def test_the_trained_demo_model_keeps_its_answers(
    scheme: str, least_cosine: float, least_agreement: float, build: Build, demo: Answers
) -> None:
    found = answers(build(scheme, root=MODEL).root)
    assert np.sum(found.images * demo.images, axis=1).min() >= least_cosine
    assert np.sum(found.classes * demo.classes, axis=1).min() >= least_cosine
    assert (found.top == demo.top).mean() >= least_agreement
