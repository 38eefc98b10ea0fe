"""Core ML's sessions: names and batches as in the manifest, and every damaged package one line."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medge.checkpoint import Checkpoint
from medge.errors import CorruptError, UsageError
from medge.export.pipeline import export
from medge.export.request import Request
from medge.manifest import Artifact
from medge.quantize.scheme import load
from medge.runtimes.base import RunOptions
from medge.runtimes.coreml_backend import CoremlBackend
from medge.runtimes.mil_package import Package, TensorType, Weights
from medge.runtimes.mil_reference import Interpreter

PIXELS = np.random.default_rng(0).uniform(-1, 1, (2, 3, 56, 56)).astype(np.float32)
DATA = "Data/com.apple.CoreML"


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """int4, which has 4-bit integers, 8-bit ones and floats."""
    out = tmp_path_factory.mktemp("coreml") / "out"
    return export(Request(Checkpoint.open(checkpoint), "coreml", load("int4"), out, {"parity": "off"}))


@pytest.fixture
def package(artifact: Artifact, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(artifact.part_path("image_encoder").parent, tmp_path / "x.mlpackage"))


def run(package: Path) -> np.ndarray:
    return Interpreter(Package(package)).run({"pixel_values": PIXELS[:1]})["image_embeds"]


def test_outputs_carry_the_manifest_s_names_and_the_batch(artifact: Artifact) -> None:
    for name, part in artifact.manifest.parts.items():
        session = CoremlBackend().open(artifact, name, RunOptions())
        shape = [3 if isinstance(n, str) else n for n in part.inputs[0].shape]
        found = session.run({part.inputs[0].name: np.ones(shape, part.inputs[0].dtype)})
        assert list(found) == [output.name for output in part.outputs]
        assert found[part.outputs[0].name].shape == (3, part.outputs[0].shape[1])
        assert found[part.outputs[0].name].dtype == np.float32


def test_a_batch_is_its_members(artifact: Artifact) -> None:
    session = CoremlBackend().open(artifact, "image_encoder", RunOptions())
    both = session.run({"pixel_values": PIXELS})["image_embeds"]
    each = [session.run({"pixel_values": PIXELS[i : i + 1]})["image_embeds"] for i in range(2)]
    np.testing.assert_array_equal(both, np.concatenate(each))


def test_the_backend_says_that_it_is_not_apple_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert CoremlBackend().name == f"Core ML reference interpreter (numpy {np.__version__}), not Apple's runtime"


@pytest.mark.parametrize("inputs", [{}, {"pixel_values": PIXELS[:0]}, {"pixel_values": PIXELS, "other": PIXELS[:1]}])
def test_batches_that_differ_are_refused(inputs: dict[str, np.ndarray], artifact: Artifact) -> None:
    with pytest.raises(UsageError, match="batches"):
        CoremlBackend().open(artifact, "image_encoder", RunOptions()).run(inputs)


def test_inputs_of_another_shape_are_refused(artifact: Artifact) -> None:
    session = CoremlBackend().open(artifact, "image_encoder", RunOptions())
    with pytest.raises(UsageError, match=r"has shape \(1, 3, 8, 8\)"):
        session.run({"pixel_values": np.zeros((1, 3, 8, 8), np.float32)})


@pytest.mark.parametrize("keep", [0, 1, 63, 64, 200, 0.5, -1])
def test_a_truncated_weight_file_is_corrupt(keep: float, package: Path) -> None:
    path = package / DATA / "weights" / "weight.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)] if isinstance(keep, float) else whole[:keep])
    with pytest.raises(CorruptError, match=r"weight\.bin") as caught:
        Package(package).check_weights()
    assert "Export the artifact again" in str(caught.value)


def test_a_missing_weight_file_is_corrupt(package: Path) -> None:
    (package / DATA / "weights" / "weight.bin").unlink()
    with pytest.raises(CorruptError, match=r"weight\.bin cannot be read"):
        run(package)


@pytest.mark.parametrize(("field", "value"), [(0, 7), (4, 99), (8, 1 << 60), (16, 1 << 62), (16, 5)])
def test_absurd_sizes_and_offsets_are_found_before_they_are_used(field: int, value: int, package: Path) -> None:
    """The metadata of the first tensor: sentinel, type, bytes, offset."""
    path = package / DATA / "weights" / "weight.bin"
    data = bytearray(path.read_bytes())
    width = 4 if field < 8 else 8
    data[64 + field : 64 + field + width] = value.to_bytes(width, "little")
    path.write_bytes(data)
    if (field, value) == (16, 5):  # inside the file, so only the hash in the manifest can tell
        run(package)
        return
    with pytest.raises(CorruptError, match=r"weight\.bin"):
        run(package)


@pytest.mark.parametrize("offset", [0, 32, 1 << 50, 128])
def test_a_tensor_is_only_read_where_one_is(offset: int, package: Path) -> None:
    with pytest.raises(CorruptError, match=r"tensor|altered"):
        Weights(package / DATA / "weights" / "weight.bin").read(offset, TensorType("fp16", (1 << 40,)))


def _drop_root(manifest: dict) -> object:
    manifest["rootModelIdentifier"] = "another"
    return manifest


def _lead_out(manifest: dict) -> object:
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = "../../../etc/hostname"
    return manifest


def _number(manifest: dict) -> object:
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = 7
    return manifest


@pytest.mark.parametrize("change", [_drop_root, _lead_out, _number, lambda m: [], lambda m: {}])
def test_an_altered_manifest_is_corrupt(change: Callable[[dict], object], package: Path) -> None:
    path = package / "Manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(CorruptError, match=r"Manifest\.json names"):
        Package(package)


def test_a_missing_manifest_is_corrupt(package: Path) -> None:
    (package / "Manifest.json").unlink()
    with pytest.raises(CorruptError, match=r"Manifest\.json names no model"):
        Package(package)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08\x09\x12", b"\xff" * 40])
def test_a_specification_that_is_none_is_corrupt(content: bytes, package: Path) -> None:
    (package / DATA / "model.mlmodel").write_bytes(content)
    with pytest.raises(CorruptError, match="is no Core ML program") as caught:
        Package(package)
    assert "\n" not in str(caught.value)


def test_an_output_that_the_program_lacks_is_corrupt(artifact: Artifact, tmp_path: Path) -> None:
    root = shutil.copytree(artifact.root, tmp_path / "artifact")
    path = root / "manifest.json"
    path.write_text(path.read_text().replace('"image_embeds"', '"another"'))
    session = CoremlBackend().open(Artifact.open(root), "image_encoder", RunOptions())
    with pytest.raises(CorruptError, match="gives no 'another'"):
        session.run({"pixel_values": PIXELS})


@pytest.mark.apple
def test_core_ml_itself_agrees_with_the_interpreter(artifact: Artifact) -> None:
    apple = CoremlBackend().open(artifact, "image_encoder", RunOptions()).run({"pixel_values": PIXELS[:1]})
    package = Package(artifact.part_path("image_encoder").parent)
    ours = Interpreter(package).run({"pixel_values": PIXELS[:1]})["image_embeds"]
    found = apple["image_embeds"]
    assert float((found * ours).sum() / np.linalg.norm(found) / np.linalg.norm(ours)) > 0.999
