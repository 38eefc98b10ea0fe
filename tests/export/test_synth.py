"""Random checkpoints: reproducible, loadable by transformers, and with activations that make sense."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from medge.checkpoint import Checkpoint
from medge.errors import UnsupportedError, UsageError
from medge.export import synth
from medge.export.synth import parameters, synthesize, tensor


def test_the_seed_decides_every_byte(checkpoint: Path, tmp_path: Path) -> None:
    for name, seed in (("same", 0), ("other", 1)):
        synthesize("medsiglip-448", "tiny", tmp_path / name, seed=seed)
    weights = [root / "model.safetensors" for root in (checkpoint, tmp_path / "same", tmp_path / "other")]
    first, same, other = (path.read_bytes() for path in weights)
    assert first == same
    assert first != other


def test_a_tensor_depends_on_seed_and_name_alone() -> None:
    def draw(name: str, seed: int) -> np.ndarray:
        return tensor(name, (16, 16), seed, depth=2)

    first = draw("a.weight", 0)
    draw("b.weight", 0)
    np.testing.assert_array_equal(draw("a.weight", 0), first)
    assert not np.array_equal(draw("b.weight", 0), first)
    assert not np.array_equal(draw("a.weight", 1), first)


def test_shards_hold_the_same_weights(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth, "SHARD_BYTES", 1_000_000)
    synthesize("medsiglip-448", "tiny", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    assert {path.name for path in shards} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == 4 * parameters("medsiglip-448", "tiny")
    sharded, whole = Checkpoint.open(tmp_path / "out"), Checkpoint.open(checkpoint)
    for name in whole.spec.tensors:
        assert sharded.entries[name].path.name == index["weight_map"][name]
        np.testing.assert_array_equal(sharded.read(name), whole.read(name))


def test_transformers_loads_it_with_nothing_left_over(checkpoint: Path) -> None:
    transformers = pytest.importorskip("transformers")
    _, info = transformers.SiglipModel.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    processor = transformers.SiglipImageProcessor.from_pretrained(checkpoint)
    assert processor.size == {"height": 56, "width": 56}
    assert transformers.SiglipTokenizer.from_pretrained(checkpoint)("a")["input_ids"]


def test_activations_stay_of_order_one(checkpoint: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import SiglipModel

    model = SiglipModel.from_pretrained(checkpoint).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        images = model.get_image_features(torch.rand(8, 3, 56, 56, generator=generator) * 2 - 1)
        texts = model.get_text_features(torch.randint(2, 32000, (8, 64), generator=generator))
    for embeddings in (images, texts):
        assert 0.1 < embeddings.std() < 10
        cosine = torch.nn.functional.cosine_similarity(embeddings[0], embeddings[1], dim=0)
        assert cosine < 0.99  # inputs can be told apart


def test_the_count_is_of_the_file(checkpoint: Path) -> None:
    found = safetensors.numpy.load_file(checkpoint / "model.safetensors").values()
    assert sum(value.size for value in found) == parameters("medsiglip-448", "tiny")
    assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in found)


def test_progress_adds_up(tmp_path: Path) -> None:
    counts: list[int] = []
    synthesize("medsiglip-448", "tiny", tmp_path / "out", on_tensor=counts.append)
    assert sum(counts) == parameters("medsiglip-448", "tiny")


def test_what_cannot_be_made_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a folder nor a known model"):
        synthesize("siglip", "tiny", tmp_path / "out")
    with pytest.raises(UsageError, match="Sizes: full, tiny"):
        synthesize("medsiglip-448", "huge", tmp_path / "out")
    with pytest.raises(UnsupportedError, match="no gemma3 architecture yet"):
        synthesize("medgemma-4b-it", "tiny", tmp_path / "out")
    assert not list(tmp_path.iterdir())
