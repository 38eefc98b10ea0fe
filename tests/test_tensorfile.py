"""safetensors by plain reads: equal to the safetensors package, and suspicious of every byte of a header."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medge.errors import CorruptError
from medge.tensorfile import read_header, shard, write, write_chunks

GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def raw_file(path: Path, header: bytes, data: bytes = b"\0" * 16, length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def one_entry(path: Path, entry: Any) -> Path:
    return raw_file(path, json.dumps({"x": entry}).encode())


def test_reads_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {"a": rng.normal(size=(3, 5)).astype(np.float32), "b": rng.normal(size=7).astype(np.float16),
               "none": np.zeros((0, 4), np.float32), "scalar": np.full((), 3, np.float32)}  # fmt: skip
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    entries = read_header(tmp_path / "x.safetensors")
    assert entries.keys() == tensors.keys()
    for name, expected in tensors.items():
        found = entries[name].read()
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


def test_bfloat16_equals_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    value = torch.randn(64).to(torch.bfloat16)
    save_file({"x": value}, tmp_path / "x.safetensors")
    np.testing.assert_array_equal(read_header(tmp_path / "x.safetensors")["x"].read(), value.float().numpy())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(shapes=st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=5))
def test_the_safetensors_package_reads_what_is_written(tmp_path: Path, shapes: list[tuple[int, ...]]) -> None:
    tensors = {f"t{i}": shape for i, shape in enumerate(shapes)}
    values = {name: np.random.default_rng(i).normal(size=shape).astype(np.float32)
              for i, (name, shape) in enumerate(tensors.items())}  # fmt: skip
    path = tmp_path / "x.safetensors"
    assert write(path, tensors, values.__getitem__) == sum(value.nbytes for value in values.values())
    found = safetensors.numpy.load_file(path)
    for name, value in values.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(GOOD | {"data_offsets": [0, 15]}, id="size contradicts shape"),
        pytest.param(GOOD | {"data_offsets": [16, 32]}, id="beyond the end"),
        pytest.param(GOOD | {"data_offsets": [-16, 0]}, id="before the start"),
        pytest.param(GOOD | {"data_offsets": [0]}, id="one offset"),
        pytest.param(GOOD | {"data_offsets": [float("inf"), 3]}, id="infinite offset"),
        pytest.param(GOOD | {"shape": [-2, -2]}, id="negative dimensions"),
        pytest.param(GOOD | {"shape": [2**62, 4]}, id="huge"),
        pytest.param(GOOD | {"shape": [float("inf")]}, id="infinite dimension"),
        pytest.param(GOOD | {"shape": None}, id="no shape"),
        pytest.param(GOOD | {"dtype": "I64"}, id="integers"),
        pytest.param(GOOD | {"dtype": ["F32"]}, id="dtype is a list"),
        pytest.param({"dtype": "F32"}, id="no shape key"),
        pytest.param(None, id="null"),
        pytest.param("F32", id="a string"),
    ],
)
def test_a_malformed_entry_is_refused_by_name(entry: Any, tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="'x'"):
        read_header(one_entry(tmp_path / "x.safetensors", entry))


@pytest.mark.parametrize(
    ("header", "length"),
    [
        pytest.param(b"{}", 2**63, id="header longer than any file"),
        pytest.param(b"{}", 200, id="header longer than this file"),
        pytest.param(b"not json", None, id="no JSON"),
        pytest.param(b"[]", None, id="no object"),
        pytest.param(b"\xff\xfe", None, id="no UTF-8"),
        pytest.param(b"[" * 100_000, None, id="nested without end"),
    ],
)
def test_a_malformed_header_is_refused(header: bytes, length: int | None, tmp_path: Path) -> None:
    path = raw_file(tmp_path / "x.safetensors", header, length=length)
    with pytest.raises(CorruptError, match="no safetensors file"):
        read_header(path)


@pytest.mark.parametrize("size", [0, 4, 8, 40])
def test_a_cut_file_is_refused(size: int, tmp_path: Path) -> None:
    path = one_entry(tmp_path / "x.safetensors", GOOD)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CorruptError):
        read_header(path)


def test_a_file_that_shrank_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = one_entry(tmp_path / "x.safetensors", GOOD)
    entry = read_header(path)["x"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptError, match="ends inside 'x'"):
        entry.read()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(data=st.binary(max_size=200))
def test_no_bytes_raise_anything_else(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with contextlib.suppress(CorruptError):
        read_header(path)


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=20), limit=st.integers(4, 100))
def test_shards_keep_order_and_limit(sizes: list[int], limit: int) -> None:
    tensors: dict[str, tuple[int, ...]] = {f"t{i}": (size,) for i, size in enumerate(sizes)}
    parts = list(shard(tensors, limit))
    assert [name for part in parts for name in part] == list(tensors)
    for part in parts:
        assert len(part) == 1 or 4 * sum(shape[0] for shape in part.values()) <= limit


def test_a_tensor_is_written_in_pieces_and_read_by_rows(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    value = torch.randn(10, 6).to(torch.bfloat16)
    raw = value.view(torch.uint16).numpy()
    path = tmp_path / "x.safetensors"
    assert write_chunks(path, {"x": (10, 6)}, "BF16", lambda name: (raw[:7], raw[7:])) == 120
    entry = read_header(path)["x"]
    np.testing.assert_array_equal(entry.rows(3, 9), value[3:9].float().numpy())
    np.testing.assert_array_equal(entry.read(), value.float().numpy())
    with pytest.raises(AssertionError):
        write_chunks(path, {"x": (10, 6)}, "BF16", lambda name: (raw[:7],))
