"""Attention in integers against attention in float64: flat rows, sharp rows, batches, odd head counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from medge.checkpoint import Checkpoint
from medge.export.onnx_graph import Graph
from medge.export.pipeline import export
from medge.export.request import Request
from medge.quantize.onnx_attention import IntegerAttention
from medge.quantize.scheme import load
from medge.spec import FloatArray, TensorSpec


def attention(q: FloatArray, k: FloatArray, v: FloatArray, heads: int) -> FloatArray:
    """(N, D) softmax attention in float64."""
    parts = [np.split(x.astype(np.float64), heads, axis=1) for x in (q, k, v)]
    outs = []
    for a, b, c in zip(*parts, strict=True):
        scores = a @ b.T / np.sqrt(a.shape[1])
        e = np.exp(scores - scores.max(1, keepdims=True))
        outs.append(e / e.sum(1, keepdims=True) @ c)
    return np.concatenate(outs, axis=1).astype(np.float32)


def integer_attention(folder: Path, heads: int, tokens: int, width: int) -> onnxruntime.InferenceSession:
    path = folder / "attention.onnx"
    spec = {name: TensorSpec(name=name, dtype="float32", shape=("batch", tokens, width)) for name in "qkvy"}
    with Graph(path) as graph:
        out = IntegerAttention(graph, heads, tokens, "a").emit("q", "k", "v", width // heads)
        graph.node("Identity", [out], "y")
        graph.save("attention", [spec[name] for name in "qkv"], [spec["y"]])
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("heads", [1, 3, 4])
@pytest.mark.parametrize(("sharpness", "bound"), [(0.01, 0.002), (1.0, 0.006), (8.0, 0.05)])
def test_integer_attention_keeps_flat_and_sharp_rows(
    heads: int, sharpness: float, bound: float, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 64, 8 * heads)).astype(np.float32) for _ in range(3))
    q *= np.float32(sharpness)
    v += np.float32(5)  # a common part, which rows whose small probabilities vanish must not lose
    session = integer_attention(tmp_path, heads, 64, 8 * heads)
    for one in range(2):
        (y,) = session.run(None, {"q": q[one : one + 1], "k": k[one : one + 1], "v": v[one : one + 1]})
        exact = attention(q[one], k[one], v[one], heads)
        error = np.linalg.norm(y[0] - exact) / np.linalg.norm(v[one] - v[one].mean(0))
        assert error < bound, error
    (both,) = session.run(None, {"q": q, "k": k, "v": v})  # a batch shares its scales: near, not equal
    assert np.linalg.norm(both[1] - y[0]) / np.linalg.norm(v[1] - v[1].mean(0)) < 2 * bound


def test_integer_attention_of_nothing_is_nothing(tmp_path: Path) -> None:
    zeros = np.zeros((1, 16, 8), np.float32)
    (y,) = integer_attention(tmp_path, 2, 16, 8).run(None, {"q": zeros, "k": zeros, "v": zeros})
    assert np.array_equal(y, zeros)


def test_long_sequences_attend_in_integers_and_keep_their_parity(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medge.export.onnx.LONG", 1)
    artifact = export(Request(Checkpoint.open(checkpoint), "onnx", load("int8"), tmp_path / "out"))
    model = onnx.load(artifact.part_path("image_encoder"), load_external_data=False)
    assert "MultiHeadAttention" not in {node.op_type for node in model.graph.node}
    assert artifact.manifest.parity["image_encoder"].cosine_min > 0.997
