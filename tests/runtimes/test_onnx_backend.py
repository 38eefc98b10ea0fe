"""ONNX Runtime's failures become one line; threads are what was asked for."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from medge.errors import CorruptError
from medge.manifest import Artifact
from medge.runtimes.base import RunOptions, physical_cores
from medge.runtimes.onnx_backend import OnnxBackend, OnnxSession, session_options


def test_outputs_carry_the_manifest_s_names(artifact: Path) -> None:
    opened = Artifact.open(artifact)
    for name, part in opened.manifest.parts.items():
        session = OnnxBackend().open(opened, name, RunOptions())
        shape = [2 if isinstance(n, str) else n for n in part.inputs[0].shape]
        found = session.run({part.inputs[0].name: np.zeros(shape, part.inputs[0].dtype)})
        assert list(found) == [output.name for output in part.outputs]
        assert found[part.outputs[0].name].shape == (2, part.outputs[0].shape[1])


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x08\x0a" * 50])
def test_a_file_that_is_no_graph_is_corrupt(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(CorruptError, match="cannot open") as caught:
        OnnxSession(str(path), {}, RunOptions())
    assert "\n" not in str(caught.value)


def test_a_graph_without_its_data_is_corrupt(own_artifact: Path) -> None:
    (own_artifact / "image_encoder.onnx.data").unlink()
    with pytest.raises(CorruptError, match="cannot open"):
        OnnxSession(str(own_artifact / "image_encoder.onnx"), {}, RunOptions())


@pytest.mark.parametrize("shape", [(1, 3, 7, 7), (1, 64), (0,)])
def test_inputs_that_the_graph_does_not_take_are_one_line(shape: tuple[int, ...], artifact: Path) -> None:
    session = OnnxSession(str(artifact / "image_encoder.onnx"), {}, RunOptions())
    with pytest.raises(CorruptError, match="cannot run") as caught:
        session.run({"pixel_values": np.zeros(shape, np.float32)})
    assert "\n" not in str(caught.value)
    with pytest.raises(CorruptError, match="cannot run"):
        session.run({"wrong_name": np.zeros((1, 3, 56, 56), np.float32)})


@pytest.mark.parametrize("depth", ["../", "deeper/../../"])
def test_external_data_does_not_lead_out_of_the_folder(depth: str, own_artifact: Path) -> None:
    onnx = pytest.importorskip("onnx")
    path = own_artifact / "image_encoder.onnx"
    model = onnx.load(path, load_external_data=False)
    (own_artifact / "image_encoder.onnx.data").rename(own_artifact.parent / "secret")
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"{depth}secret"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CorruptError):
        OnnxSession(str(path), {}, RunOptions())


def test_threads_are_those_asked_for() -> None:
    assert session_options({}, RunOptions(threads=3)).intra_op_num_threads == 3
    assert session_options({}, RunOptions()).intra_op_num_threads == physical_cores()
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)


def test_the_artifact_s_session_settings_are_applied() -> None:
    options = session_options({"session.disable_quant_qdq": "1"}, RunOptions())
    assert options.get_session_config_entry("session.disable_quant_qdq") == "1"


def test_a_setting_that_onnx_runtime_refuses_is_corrupt(artifact: Path) -> None:
    with pytest.raises(CorruptError):
        OnnxSession(str(artifact / "image_encoder.onnx"), {"k" * 5000: "1"}, RunOptions())
