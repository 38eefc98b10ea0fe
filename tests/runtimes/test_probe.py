"""A linear probe is plain data: what it says comes back, and nothing else is believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from medge.errors import CorruptError, UsageError
from medge.runtimes.base import normalize
from medge.runtimes.probe import Probe, fit

LABELS = ("a", "b", "c")


@pytest.fixture
def embeddings() -> tuple[np.ndarray, list[str]]:
    """Three clusters, 20 rows each."""
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 16))
    rows = np.concatenate([centre + 0.3 * rng.normal(size=(20, 16)) for centre in centres])
    return normalize(rows), [label for label in LABELS for _ in range(20)]


@pytest.mark.parametrize("count", [2, 3])
def test_probabilities_are_scikit_learn_s(count: int, embeddings: Any) -> None:
    from sklearn.linear_model import LogisticRegression

    rows, labels = embeddings[0][: 20 * count], embeddings[1][: 20 * count]
    probe = fit(rows, labels, "0" * 64, c=2.0)
    expected = LogisticRegression(C=2.0, max_iter=2000).fit(rows, labels).predict_proba(rows)
    assert probe.labels == LABELS[:count]
    assert probe.weight.shape == (count, 16)
    np.testing.assert_allclose(probe.apply(rows), expected, atol=1e-4)


def test_saved_and_loaded_it_is_the_same(embeddings: Any, tmp_path: Path) -> None:
    probe = fit(embeddings[0], embeddings[1], "ab" * 32)
    probe.save(tmp_path / "probe.safetensors")
    loaded = Probe.load(tmp_path / "probe.safetensors")
    assert (loaded.labels, loaded.weights_sha256) == (probe.labels, "ab" * 32)
    np.testing.assert_array_equal(loaded.apply(embeddings[0]), probe.apply(embeddings[0]))
    assert [path.name for path in tmp_path.iterdir()] == ["probe.safetensors"]


def test_one_label_is_too_few(embeddings: Any) -> None:
    with pytest.raises(UsageError, match="at least two labels"):
        fit(embeddings[0][:20], ["a"] * 20, "")


def test_embeddings_of_another_width_are_refused(embeddings: Any) -> None:
    with pytest.raises(UsageError, match="takes embeddings of 16, these have 8"):
        fit(embeddings[0], embeddings[1], "").apply(np.zeros((1, 8), np.float32))


@pytest.mark.parametrize("where", ["absent/probe.safetensors", "file/probe.safetensors"])
def test_where_it_cannot_be_written(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    probe = Probe(LABELS, np.zeros((3, 2), np.float32), np.zeros(3, np.float32), "")
    with pytest.raises(UsageError, match="cannot be written"):
        probe.save(tmp_path / where)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_absent_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="medge probe fit"):
        Probe.load(tmp_path / "probe.safetensors")


def write(path: Path, weight: Any = None, bias: Any = None, **metadata: str) -> None:
    tensors = {"weight": np.zeros((3, 2), np.float32) if weight is None else np.float32(weight),
               "bias": np.zeros(3, np.float32) if bias is None else np.float32(bias)}  # fmt: skip
    save_file(tensors, path, {"labels": json.dumps(LABELS), "weights_sha256": ""} | metadata)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda p: p.write_bytes(b"junk"), id="junk"),
        pytest.param(lambda p: p.write_bytes(b""), id="empty"),
        pytest.param(lambda p: save_file({"weight": np.zeros((3, 2))}, p), id="no metadata"),
        pytest.param(lambda p: write(p, weight=[[1, 2]]), id="too few rows"),
        pytest.param(lambda p: write(p, weight=[1, 2, 3]), id="no matrix"),
        pytest.param(lambda p: write(p, bias=[0, 0]), id="bias too short"),
        pytest.param(lambda p: write(p, bias=[0, 0, np.nan]), id="NaN"),
        pytest.param(lambda p: write(p, labels="{"), id="labels no JSON"),
        pytest.param(lambda p: write(p, labels="3"), id="labels no list"),
        pytest.param(lambda p: write(p, labels='["a"]'), id="labels too few"),
    ],
)
def test_a_damaged_probe_is_corrupt(damage: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "probe.safetensors"
    damage(path)
    with pytest.raises(CorruptError):
        Probe.load(path)
