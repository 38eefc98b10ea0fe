"""Random checkpoints: reproducible, loadable by transformers, and with activations that make sense."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from medge.checkpoint import Checkpoint
from medge.errors import UsageError
from medge.export import synth, synth_chat
from medge.export.synth import parameters, synthesize, tensor
from medge.models import gemma3


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
    with pytest.raises(UsageError, match="Sizes: tiny, full"):
        synthesize("medsiglip-448", "huge", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gemma") / "checkpoint"
    synthesize("medgemma-4b-it", "tiny", root)
    return root


def test_a_chat_model_loads_in_transformers_with_nothing_left_over(gemma: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, info = transformers.Gemma3ForConditionalGeneration.from_pretrained(gemma, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    ours, theirs = Checkpoint.open(gemma), {gemma3.canonical(key): x for key, x in model.state_dict().items()}
    for name in ours.any_spec.tensors:
        np.testing.assert_array_equal(ours.read(name), theirs[name].float().numpy())


def test_a_chat_model_s_activations_stay_of_order_one(gemma: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import Gemma3ForConditionalGeneration

    model = Gemma3ForConditionalGeneration.from_pretrained(gemma, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.arange(8, 40)[None]).logits
    assert 0.2 < logits.std() < 5
    assert not torch.equal(logits[0, 0].argmax(), logits[0, -1].argmax())


def test_a_chat_model_s_tensors_depend_on_seed_and_name_alone() -> None:
    shapes: dict[str, tuple[int, ...]] = {"a.weight": (3000, 3000), "b.weight": (3000, 3000)}
    counted: list[int] = []

    def draw(name: str, seed: int) -> np.ndarray:
        return np.concatenate(list(synth_chat.Noise(seed, shapes, counted.append)(name)))

    first = draw("a.weight", 0)
    assert first.size == 9_000_000 == counted[0]
    np.testing.assert_array_equal(draw("a.weight", 0), first)
    assert not np.array_equal(draw("b.weight", 0), first)
    assert not np.array_equal(draw("a.weight", 1), first)


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(synth_chat.to_bfloat16(values), expected)


def test_a_text_only_model_has_no_image_files(tmp_path: Path) -> None:
    synthesize("medgemma-27b-text-it", "tiny", tmp_path / "out")
    assert not (tmp_path / "out" / "preprocessor_config.json").exists()
    assert Checkpoint.open(tmp_path / "out").chat_spec.image is None
