from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from medge.errors import CorruptError, UnsupportedError, UsageError
from medge.quantize.ggml_blocks import quantize_rows
from medge.quantize.importance import ImportanceMatrix
from medge.spec import FloatArray

NAME = "blk.0.attn_q.weight"


def activations(n: int = 64, k: int = 256) -> FloatArray:
    random = np.random.default_rng(3)
    return np.asarray(random.normal(0, 1, (n, k)) * random.chisquare(1, k), np.float32)


def matrix() -> ImportanceMatrix:
    found = ImportanceMatrix("synthetic", chunk_size=16)
    found.add(NAME, activations())
    found.add("blk.0.attn_k.weight", activations())
    return found


def test_it_is_the_mean_square_of_each_column_however_batched() -> None:
    x, batched = activations(), ImportanceMatrix("synthetic", 16)
    batched.add(NAME, x[:10])
    batched.add(NAME, x[10:].reshape(6, 9, 256))
    found = batched.of(NAME)
    assert found is not None
    assert found.dtype == np.float32
    means = np.square(x).mean(0)
    np.testing.assert_allclose(found, np.maximum(means, 1e-6 * means.mean()), rtol=1e-6)


def test_columns_that_were_never_lit_still_count_a_little() -> None:
    x = activations()
    x[:, 32:64] = 0  # a whole block: with zeros ggml would store zeros
    dark = ImportanceMatrix("synthetic", 16)
    dark.add(NAME, x)
    found = dark.of(NAME)
    assert found is not None
    assert 0 < found[32:64].max() < 1e-5 * found.mean()
    weights = np.random.default_rng(4).normal(0, 0.02, (1, 256)).astype(np.float32)
    decoded = gguf.quants.dequantize(quantize_rows(weights, "Q4_0", found), gguf.GGMLQuantizationType.Q4_0)
    np.testing.assert_allclose(decoded[:, 32:64], weights[:, 32:64], atol=0.01)


def test_what_met_no_input_has_no_importance() -> None:
    dark = ImportanceMatrix("synthetic", 16)
    dark.add(NAME, np.zeros((4, 32), np.float32))
    assert dark.of(NAME) is None
    assert dark.of("other") is None


def test_it_serves_the_objective_better_than_none() -> None:
    """The measure is what it stands for: the error at the layer's output, on inputs not calibrated on."""
    x = activations(4000)
    calibrated = ImportanceMatrix("synthetic", 16)
    calibrated.add(NAME, x[:2000])
    weights = np.random.default_rng(5).normal(0, 0.02, (32, 256)).astype(np.float32)

    def output_error(importance: FloatArray | None) -> float:
        packed = quantize_rows(weights, "Q4_0", importance)
        error = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_0) - weights
        return float(np.square(x[2000:] @ error.T).sum())

    assert output_error(calibrated.of(NAME)) < 0.9 * output_error(None)


def test_the_file_is_llama_cpp_s_and_comes_back(tmp_path: Path) -> None:
    path, again = tmp_path / "imatrix.gguf", tmp_path / "again.gguf"
    matrix().save(path)
    matrix().save(again)
    assert path.read_bytes() == again.read_bytes()
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["synthetic"]
    assert (reader.fields["imatrix.chunk_count"].contents(), reader.fields["imatrix.chunk_size"].contents()) == (4, 16)
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes[f"{NAME}.in_sum2"] == [256, 1]
    assert shapes[f"{NAME}.counts"] == [1, 1]
    back = ImportanceMatrix.load(path)
    assert (back.dataset, back.chunk_size, back.counts) == ("synthetic", 16, matrix().counts)
    for name in back.counts:
        np.testing.assert_array_equal(back.of(name), matrix().of(name))


def damaged(path: Path, **changes: Any) -> Path:
    """A file with one thing wrong."""
    values: dict[str, Any] = {
        "type": "imatrix",
        "chunk": 16,
        "sums": np.ones((1, 32), np.float32),
        "counts": np.ones((1, 1)),
    } | changes
    writer = gguf.GGUFWriter(path, arch="")
    writer.add_type(values["type"])
    writer.add_uint32("imatrix.chunk_size", values["chunk"])
    writer.add_tensor(f"{NAME}.in_sum2", values["sums"])
    if values["counts"] is not None:
        writer.add_tensor(f"{NAME}.counts", values["counts"].astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"type": "model"}, "is no importance matrix"),
        ({"chunk": 0}, "is no importance matrix"),
        ({"counts": None}, "without their count"),
        ({"sums": np.full((1, 32), -1, np.float32)}, "negative or non-finite values"),
        ({"sums": np.full((1, 32), np.nan, np.float32)}, "negative or non-finite values"),
        ({"sums": np.ones((1, 32), np.float16)}, "as F16, not F32"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(CorruptError, match=match):
        ImportanceMatrix.load(damaged(tmp_path / "imatrix.gguf", **changes))


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="counts experts"):
        ImportanceMatrix.load(damaged(tmp_path / "experts.gguf", counts=np.ones((4, 1))))
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        ImportanceMatrix.load(tmp_path / "absent.gguf")
    path = damaged(tmp_path / "cut.gguf")
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(CorruptError, match="truncated"):
        ImportanceMatrix.load(path)


def test_inputs_that_cannot_be_are_refused() -> None:
    found = matrix()
    with pytest.raises(UsageError, match="have 8 columns, and had 256"):
        found.add(NAME, np.ones((2, 8), np.float32))
    with pytest.raises(CorruptError, match=f"Inputs of '{NAME}' are not finite"):
        found.add(NAME, np.full((2, 256), np.inf, np.float32))
