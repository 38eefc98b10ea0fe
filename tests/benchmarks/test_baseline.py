import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from medge.benchmarks.baseline import BASELINE, GOLDENS, Baseline, Identity, capture, encode, quiet, record
from medge.benchmarks.datasets import load_dataset
from medge.checkpoint import Checkpoint
from medge.errors import CorruptError, RegressedError, UsageError
from medge.export.synth import synthesize
from medge.manifest import describe
from medge.runtimes import torch_reference
from medge.runtimes.embed import Embedder
from medge.spec import ImageSpec


def _edit(path: Path, **fields: Any) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | fields))


def test_what_is_captured_opens_again(baseline: Baseline, tmp_path: Path, data: Path) -> None:
    again = Baseline.open(tmp_path / "base")
    assert again.manifest == baseline.manifest
    np.testing.assert_array_equal(again.goldens.image_embeddings, baseline.goldens.image_embeddings)
    np.testing.assert_array_equal(again.goldens.targets, load_dataset(data).targets)
    assert again.manifest.reference == "torch 2.13.0 cpu fp32"
    assert again.manifest.dataset_digest == load_dataset(data).digest
    assert len(again.manifest.latency_seconds) == len(again.manifest.images) == 36
    assert all(seconds > 0 for seconds in again.manifest.latency_seconds)


def test_the_goldens_are_plain_safetensors(baseline: Baseline, tmp_path: Path) -> None:
    arrays = load_file(tmp_path / "base" / GOLDENS)
    assert set(arrays) == {"image_embeddings", "class_embeddings", "targets", "scores"}
    np.testing.assert_allclose(arrays["scores"], baseline.goldens.scores, atol=1e-6)


def test_progress_counts_images(data: Path, fake: Callable[..., Embedder]) -> None:
    seen: list[tuple[int, int]] = []
    encode(fake(), load_dataset(data), ("{}",), lambda done, total: seen.append((done, total)))
    assert seen == [(i, 36) for i in range(1, 37)]


def test_an_embedding_that_is_not_finite_is_a_regression(data: Path, fake: Callable[..., Embedder]) -> None:
    with pytest.raises(RegressedError, match=r"chest_x-ray/0\.png.*NaN or infinity"):
        encode(fake(poison=float("nan")), load_dataset(data), ("{}",), quiet)


def test_an_existing_baseline_is_kept(
    baseline: Baseline, tmp_path: Path, data: Path, fake: Callable[..., Embedder]
) -> None:
    identity = Identity("other", "", "0" * 64)
    with pytest.raises(UsageError, match="exists"):
        record(fake(), identity, load_dataset(data), tmp_path / "base")
    with pytest.raises(UsageError, match="exists"):
        capture(tmp_path / "checkpoint", data, tmp_path / "base")
    assert Baseline.open(tmp_path / "base").manifest == baseline.manifest
    record(fake(), identity, load_dataset(data), tmp_path / "base", replace=True)
    assert Baseline.open(tmp_path / "base").manifest.model == "other"


def test_a_failed_capture_leaves_nothing(tmp_path: Path, data: Path, fake: Callable[..., Embedder]) -> None:
    with pytest.raises(RegressedError):
        record(fake(poison=float("inf")), Identity("m", "", "0" * 64), load_dataset(data), tmp_path / "base")
    assert not list(tmp_path.glob("*base*"))


@pytest.mark.usefixtures("baseline")
class TestCorruption:
    @pytest.fixture
    def base(self, tmp_path: Path) -> Path:
        return tmp_path / "base"

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"no baseline: it has no baseline\.json"):
            Baseline.open(tmp_path / "nowhere")

    def test_an_altered_byte(self, base: Path) -> None:
        raw = bytearray((base / GOLDENS).read_bytes())
        raw[-1] ^= 1
        (base / GOLDENS).write_bytes(raw)
        with pytest.raises(CorruptError, match="its sha256 differs"):
            Baseline.open(base)

    def test_truncated(self, base: Path) -> None:
        (base / GOLDENS).write_bytes((base / GOLDENS).read_bytes()[:-4])
        with pytest.raises(CorruptError, match="missing or truncated"):
            Baseline.open(base)

    def test_no_json(self, base: Path) -> None:
        (base / BASELINE).write_text("{")
        with pytest.raises(CorruptError, match="no JSON"):
            Baseline.open(base)

    def test_a_newer_schema(self, base: Path) -> None:
        _edit(base / BASELINE, schema_version=99, something_new=1)
        with pytest.raises(CorruptError, match="schema version 99"):
            Baseline.open(base)

    def test_an_unknown_field(self, base: Path) -> None:
        _edit(base / BASELINE, surprise=1)
        with pytest.raises(CorruptError, match="invalid at 'surprise'"):
            Baseline.open(base)

    def test_goldens_of_another_dataset(self, base: Path) -> None:
        images = json.loads((base / BASELINE).read_text())["images"]
        _edit(base / BASELINE, images=images[:-1])
        with pytest.raises(CorruptError, match="does not fit"):
            Baseline.open(base)

    def test_goldens_outside_the_folder(self, base: Path) -> None:
        entry = json.loads((base / BASELINE).read_text())["goldens"]
        _edit(base / BASELINE, goldens=entry | {"path": "../goldens.safetensors"})
        with pytest.raises(CorruptError, match="leaves the artifact folder"):
            Baseline.open(base)

    def test_goldens_that_are_not_finite(self, base: Path) -> None:
        raw = bytearray((base / GOLDENS).read_bytes())
        start = 8 + int.from_bytes(raw[:8], "little")
        raw[start : start + 4] = np.float32(np.nan).tobytes()
        (base / GOLDENS).write_bytes(raw)
        _edit(base / BASELINE, goldens=describe(base, GOLDENS).model_dump())
        with pytest.raises(CorruptError, match="NaN or infinity"):
            Baseline.open(base)


def test_capture_names_the_checkpoint_by_its_weights(
    tmp_path: Path, data: Path, fake: Callable[..., Embedder], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def open_reference(checkpoint: Checkpoint, **options: Any) -> Embedder:
        asked.update(options, checkpoint=checkpoint)
        return fake(name="torch 2.13.0 NVIDIA H100 fp16", image=ImageSpec(size=8, variant="hf"))

    monkeypatch.setattr(torch_reference, "open_reference", open_reference)
    synthesize("medsiglip-448", "tiny", tmp_path / "checkpoint")
    captured = capture(tmp_path / "checkpoint", data, tmp_path / "base", variant="hf", templates=("a {}",)).manifest
    assert captured.weights_sha256 == Checkpoint.open(tmp_path / "checkpoint").sha256
    assert captured.model == asked["checkpoint"].spec.id
    assert asked["variant"] == captured.image.variant == "hf"
    assert captured.reference == "torch 2.13.0 NVIDIA H100 fp16"
    assert captured.templates == ("a {}",)
    assert captured.data == str(data)
