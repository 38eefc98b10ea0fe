"""What each scheme stores, read from the files that an export wrote; parity is tests/export/test_matrix.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from medge.checkpoint import Checkpoint
from medge.export.pipeline import export
from medge.export.request import Request
from medge.manifest import Artifact
from medge.quantize.scheme import load
from medge.runtimes.base import RunOptions
from medge.runtimes.onnx_backend import session_options

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
INT8, INT4 = onnx.TensorProto.INT8, onnx.TensorProto.INT4
KINDS = [("fp32", FLOAT), ("fp16", HALF), ("int8", INT8), ("int8-static", INT8), ("int4", INT4)]
BLOCK_WEIGHTS = 2 * (4 * 64 * 64 + 2 * 64 * 240)
"""Weights of the linear layers of one tower's blocks."""


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Artifact]:
    found: dict[str, Artifact] = {}

    def get(scheme: str) -> Artifact:
        if scheme not in found:
            out = tmp_path_factory.mktemp("schemes") / scheme
            found[scheme] = export(Request(Checkpoint.open(checkpoint), "onnx", load(scheme), out, {"parity": "off"}))
        return found[scheme]

    return get


def weights(artifact: Artifact, part: str) -> Counter[int]:
    """How many values of each type the matrices of a part have."""
    graph = onnx.load(artifact.root / f"{part}.onnx", load_external_data=False).graph
    counts: Counter[int] = Counter()
    for tensor in graph.initializer:
        if len(tensor.dims) >= 2:
            counts[tensor.data_type] += int(np.prod(tensor.dims))
    return counts


@pytest.mark.parametrize("part", ["image_encoder", "text_encoder"])
@pytest.mark.parametrize(("scheme", "kind"), KINDS)
def test_the_layers_have_the_type_that_the_scheme_says(
    scheme: str, kind: int, part: str, exported: Callable[[str], Artifact]
) -> None:
    counts = weights(exported(scheme), part)
    assert counts[kind] >= BLOCK_WEIGHTS
    if scheme != "fp32":
        assert counts[FLOAT] < BLOCK_WEIGHTS / 2


def test_a_mixed_scheme_has_both_widths(exported: Callable[[str], Artifact]) -> None:
    counts = sum((weights(exported("int4-mixed"), part) for part in ("image_encoder", "text_encoder")), Counter[int]())
    assert counts[INT4] > BLOCK_WEIGHTS
    assert counts[INT8] > 32000 * 64  # the token table, and what sensitivity chose


@pytest.mark.parametrize("scheme", ["fp32", "fp16", "int8", "int8-static", "int4-mixed", "int4"])
def test_every_operator_is_one_of_onnx_runtime_s(scheme: str, exported: Callable[[str], Artifact]) -> None:
    artifact = exported(scheme)
    for part in artifact.manifest.parts:
        model = onnx.load(artifact.root / f"{part}.onnx", load_external_data=False)
        assert {entry.domain for entry in model.opset_import} <= {"", "com.microsoft"}
        assert {node.domain for node in model.graph.node} <= {"", "com.microsoft"}
        names = [node.name for node in model.graph.node]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("scheme", ["fp32", "int4"])
def test_external_data_stays_beside_its_graph(scheme: str, exported: Callable[[str], Artifact]) -> None:
    artifact = exported(scheme)
    for part, files in artifact.manifest.parts.items():
        model = onnx.load(artifact.root / f"{part}.onnx", load_external_data=False)
        places = {entry.value for tensor in model.graph.initializer for entry in tensor.external_data
                  if entry.key == "location"}  # fmt: skip
        assert places == {file.path for file in files.files[1:]}


def test_only_4_bit_files_ask_for_their_weights_to_be_unfolded(exported: Callable[[str], Artifact]) -> None:
    schemes = ("fp32", "int8", "int4", "int4-mixed")
    asks = {scheme: "session.disable_quant_qdq" in exported(scheme).manifest.session for scheme in schemes}
    assert asks == {"fp32": False, "int8": False, "int4": True, "int4-mixed": True}


def test_no_artifact_runs_the_slow_fused_layer_norm(exported: Callable[[str], Artifact], tmp_path: Path) -> None:
    artifact = exported("int8-static")
    options = session_options(artifact.manifest.session, RunOptions(threads=1))
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(artifact.part_path("image_encoder")), options)
    optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    assert "SkipLayerNormalization" not in {node.op_type for node in optimized.graph.node}
