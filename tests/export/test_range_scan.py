"""Gemma 3 in float16: the exact rescaling, and the scan that refuses what overflows all the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medge.checkpoint import Checkpoint
from medge.errors import RegressedError
from medge.export import range_scan
from medge.export.eager import EagerOps
from medge.export.synth import synthesize
from medge.export.synth_chat import to_bfloat16
from medge.manifest import Artifact
from medge.runtimes.base import RunOptions
from medge.runtimes.generate import Message, log_softmax
from medge.runtimes.torch_generator import open_reference
from medge.spec import BuildOptions, FloatArray
from medge.tensorfile import read_header

SCALED = BuildOptions(residual_scale=1 / 64)
TEXT = " ".join(f"Finding {i}: a nodule of {i} mm." for i in range(30))


@pytest.fixture(scope="session")
def chat_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scan") / "chat"
    synthesize("medgemma-4b-it", "tiny", root)
    return root


@pytest.fixture
def overflowing(chat_checkpoint: Path, tmp_path: Path) -> Callable[[str, float], Path]:
    """A copy of which one RMSNorm's gain is multiplied."""

    def make(norm: str, factor: float) -> Path:
        root = Path(shutil.copytree(chat_checkpoint, tmp_path / "large"))
        path = root / "model.safetensors"
        entry = read_header(path)[f"language_model.model.{norm}.weight"]
        raw = np.memmap(path, np.uint16, "r+", entry.start, entry.shape)
        raw[:] = to_bfloat16((entry.read() + 1) * np.float32(factor) - 1)
        raw.flush()
        return root

    return make


def logits(checkpoint: Checkpoint, ids: list[int], options: BuildOptions, dtype: Any = np.float32) -> FloatArray:
    ops, spec, read = EagerOps(dtype=dtype), checkpoint.any_spec, checkpoint.weight
    with np.errstate(over="ignore", invalid="ignore"):
        x = spec.part("embedding").build(ops, {"input_ids": np.array([ids])}, read, BuildOptions())
        found: FloatArray = spec.part("decoder").build(ops, {"inputs_embeds": x}, read, options)[0]
    return found


def ids_and_logits(root: Path) -> tuple[list[int], FloatArray]:
    reference = open_reference(root, device="cpu", options=RunOptions(threads=1))
    prompt = reference.prompt([Message("user", (TEXT,))])
    return list(prompt.ids), np.concatenate(list(reference.logits(prompt)))


def divergence(ours: FloatArray, theirs: FloatArray) -> float:
    p, q = log_softmax(theirs).astype(np.float64), log_softmax(ours).astype(np.float64)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("options", [BuildOptions(), SCALED])
def test_the_architecture_in_numpy_is_transformers_own(chat_checkpoint: Path, options: BuildOptions) -> None:
    ids, theirs = ids_and_logits(chat_checkpoint)
    assert len(ids) > 512  # past the window
    np.testing.assert_allclose(logits(Checkpoint.open(chat_checkpoint), ids, options), theirs, atol=1e-4)


def test_a_residual_stream_beyond_float16_is_brought_within_it(overflowing: Callable[[str, float], Path]) -> None:
    """As the real 270M's: 103,795."""
    root = overflowing("layers.2.post_feedforward_layernorm", 40_000)
    checkpoint = Checkpoint.open(root)
    ids, theirs = ids_and_logits(root)
    peaks = range_scan.scan(checkpoint, BuildOptions(), lambda *_: None)
    assert peaks["language_model.model.layers.2.residual2"] > range_scan.LARGEST
    assert not np.isfinite(logits(checkpoint, ids, BuildOptions(), np.float16)).all()
    np.testing.assert_allclose(logits(checkpoint, ids, SCALED), theirs, atol=1e-3)
    assert divergence(logits(checkpoint, ids, SCALED, np.float16), theirs) <= 3e-4
    assert range_scan.check(checkpoint, SCALED, lambda *_: None) * 4 < range_scan.LARGEST


def test_what_overflows_all_the_same_is_refused(
    overflowing: Callable[[str, float], Path], run_export: Callable[..., Artifact], tmp_path: Path
) -> None:
    root = overflowing("layers.3.pre_feedforward_layernorm", 30_000)
    with pytest.raises(RegressedError, match=r"The decoder reaches [\d,]+ at 'language_model.model.layers.3.mlp"):
        run_export("fp16", root=root)
    assert not (tmp_path / "out").exists()
    assert run_export("int8", root=root).manifest.scheme == "int8"


def test_what_was_found_is_told(chat_checkpoint: Path, run_export: Callable[..., Artifact]) -> None:
    facts = run_export("fp16", root=chat_checkpoint).manifest.parts["decoder"].facts
    assert 1 < float(facts["largest value"]) < 100
    assert facts["residual scale"] == "1/64"
