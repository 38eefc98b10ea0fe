"""The one Embedder: batches, caches, scores, and what a damaged artifact gets to hear."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

import medge
from medge.errors import CorruptError, MissingExtraError, UnsupportedError, UsageError
from medge.manifest import MANIFEST
from medge.models.siglip import TINY, spec
from medge.runtimes.base import RunOptions, Tensors, normalize
from medge.runtimes.embed import Embedder, check_labels
from medge.runtimes.torch_reference import open_reference
from medge.spec import FloatArray

WIDTH = 5


class FakeSession:
    """Embeds by the mean over a row's values; counts its runs."""

    def __init__(self, part: str) -> None:
        self.part = part
        self.batches: list[int] = []
        self.poison = False

    def run(self, inputs: Tensors) -> dict[str, FloatArray]:
        (value,) = inputs.values()
        self.batches.append(len(value))
        flat = value.reshape(len(value), -1).astype(np.float32)
        weights = np.random.default_rng(0).normal(size=(flat.shape[1], WIDTH)).astype(np.float32)
        return {"out": flat @ weights * (np.float32(np.nan) if self.poison else 1)}


@pytest.fixture
def sessions() -> dict[str, FakeSession]:
    return {}


@pytest.fixture
def embedder(sessions: dict[str, FakeSession], checkpoint: Path) -> Embedder:
    def open_part(part: str) -> FakeSession:
        sessions[part] = FakeSession(part)
        return sessions[part]

    tiny = spec(TINY, id="x")
    return Embedder(
        open_part, name="fake", image=tiny.image, tokenizer=(checkpoint / "spiece.model", tiny.tokenizer),
        scalars={"logit_scale": np.log(10), "logit_bias": -10.0}, root=checkpoint, batch_size=3,
    )  # fmt: skip


@pytest.fixture
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (9, 7, 3), dtype=np.uint8) for _ in range(7)]


def test_rows_have_length_one_and_do_not_depend_on_the_batch(
    embedder: Embedder, images: list[Any], sessions: dict[str, FakeSession]
) -> None:
    counts: list[int] = []
    rows = embedder.embed_images(images, counts.append)
    assert rows.shape == (7, WIDTH)
    assert rows.dtype == np.float32
    assert counts == sessions["image_encoder"].batches == [3, 3, 1]
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([embedder.embed_images([one]) for one in images]), rows, atol=1e-5)


def test_a_text_is_embedded_once(embedder: Embedder, sessions: dict[str, FakeSession]) -> None:
    first = embedder.embed_texts(["a", "b", "a"])
    np.testing.assert_array_equal(first[0], first[2])
    assert sessions["text_encoder"].batches == [2]
    np.testing.assert_array_equal(embedder.embed_texts(["b", "a"]), first[[1, 0]])
    embedder.embed_texts(["c"])
    assert sessions["text_encoder"].batches == [2, 1]


def test_a_released_part_is_loaded_again(embedder: Embedder, sessions: dict[str, FakeSession]) -> None:
    embedder.embed_texts(["a"])
    first = sessions["text_encoder"]
    embedder.release("text_encoder")
    embedder.release("text_encoder")
    embedder.embed_texts(["b"])
    assert sessions["text_encoder"] is not first


def test_nothing_to_embed_is_a_usage_error(embedder: Embedder) -> None:
    with pytest.raises(UsageError, match="No image given"):
        embedder.embed_images([])
    with pytest.raises(UsageError, match="No text given"):
        embedder.embed_texts([])


def test_a_class_is_the_mean_of_its_prompts_at_length_one(embedder: Embedder) -> None:
    templates = ["{}", "a photo of {}", "{} in a patient"]
    found = embedder.class_embeddings(["mri", "x-ray"], templates)
    each = embedder.embed_texts([template.replace("{}", "x-ray") for template in templates])
    np.testing.assert_allclose(found[1], normalize(each.mean(0)), atol=1e-6)


def test_scores_are_siglip_s(embedder: Embedder, images: list[Any]) -> None:
    rows, classes = embedder.embed_images(images), embedder.class_embeddings(["a", "b", "c"])
    logits = 10.0 * rows.astype(np.float64) @ classes.T
    soft = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(embedder.classify(images, ["a", "b", "c"]), soft, atol=1e-5)
    sigmoid = 1 / (1 + np.exp(-(logits - 10)))
    np.testing.assert_allclose(embedder.classify(images, ["a", "b", "c"], multilabel=True), sigmoid, atol=1e-5)


@pytest.mark.parametrize(
    ("labels", "templates", "message"),
    [
        ([], ["{}"], "No label given"),
        (["a", "a"], ["{}"], "given twice"),
        (["a"], [], "needs '{}' once"),
        (["a"], ["no place"], "needs '{}' once"),
        (["a"], ["{} and {}"], "needs '{}' once"),
    ],
)
def test_labels_and_templates_that_cannot_be_used(labels: list[str], templates: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_labels(labels, templates)


def test_a_label_may_hold_braces(embedder: Embedder) -> None:
    found = embedder.class_embeddings(["{}", "{0}"], ["a {} b"])
    np.testing.assert_array_equal(found[0], embedder.embed_texts(["a {} b"])[0])


def test_output_that_is_no_number_is_corrupt(embedder: Embedder, sessions: dict[str, FakeSession]) -> None:
    embedder.embed_texts(["a"])
    sessions["text_encoder"].poison = True
    with pytest.raises(CorruptError, match=r"text_encoder of .* gives NaN"):
        embedder.embed_texts(["b"])


@given(rows=st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=1, max_size=4))
def test_normalize_gives_length_one_or_zero(rows: list[list[float]]) -> None:
    array = np.array(rows, np.float32)
    length = np.linalg.norm(normalize(array), axis=1)
    assert (np.isclose(length, 1, atol=1e-5) | (np.linalg.norm(array, axis=1) < 1e-9)).all()


def test_open_takes_every_kind_of_image(artifact: Path, images: list[Any], tmp_path: Path) -> None:
    model = medge.open_embedder(artifact, RunOptions(threads=1))
    path = tmp_path / "x.png"
    PIL.Image.fromarray(images[0]).save(path)
    kinds: list[Any] = [path, str(path), path.read_bytes(), PIL.Image.fromarray(images[0]), images[0]]
    rows = model.embed_images(kinds)
    np.testing.assert_allclose(rows, np.repeat(rows[:1], 5, axis=0), atol=1e-6)
    assert model.name.startswith("onnxruntime ")


def test_the_torch_reference_and_the_artifact_are_one_model(
    artifact: Path, checkpoint: Path, images: list[Any]
) -> None:
    pytest.importorskip("torch")
    reference, model = (
        open_reference(checkpoint, device="cpu", options=RunOptions(threads=1)),
        medge.open_embedder(artifact),
    )
    assert reference.name.endswith(" cpu fp32")
    np.testing.assert_allclose(model.embed_images(images), reference.embed_images(images), atol=1e-5)
    texts = ["a chest x-ray", "", "x" * 500, "ünïcödé ☃"]
    np.testing.assert_allclose(model.embed_texts(texts), reference.embed_texts(texts), atol=1e-5)
    np.testing.assert_allclose(model.classify(images, texts), reference.classify(images, texts), atol=1e-5)


def test_a_gpu_that_is_not_there_is_a_usage_error(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no CUDA device"):
        open_reference(checkpoint, device="cuda")


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda m: m["tokenizer"].update(file="../spiece.model"), CorruptError, "accounts for no"),
        (lambda m: m["tokenizer"].update(file="/etc/passwd"), CorruptError, "accounts for no"),
        (lambda m: m["scalars"].clear(), CorruptError, "lacks the scalars logit_scale, logit_bias"),
        (lambda m: m.update(image=None, tokenizer=None), UnsupportedError, "is a chat model"),
    ],
)
def test_a_manifest_that_cannot_be_run(change: Change, kind: type[Exception], message: str, own_artifact: Path) -> None:
    path = own_artifact / MANIFEST
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(kind, match=message):
        medge.open_embedder(own_artifact)


@pytest.mark.parametrize(("format", "package"), [("executorch", "executorch"), ("gguf", "llama_cpp")])
def test_a_missing_extra_is_named(
    format: str, package: str, own_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = own_artifact / MANIFEST
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"format": format}))
    monkeypatch.setattr("medge.errors.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=f"'{package}' is not installed") as caught:
        medge.open_embedder(own_artifact)
    assert f"medge[{format}]" in caught.value.remedy


def test_only_the_latest_texts_are_kept(
    embedder: Embedder, sessions: dict[str, FakeSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medge.runtimes.embed.CACHED_TEXTS", 2)
    three = embedder.embed_texts(["a", "b", "c"])
    np.testing.assert_array_equal(embedder.embed_texts(["b", "c"]), three[1:])
    assert sessions["text_encoder"].batches == [3]
    np.testing.assert_allclose(embedder.embed_texts(["a"])[0], three[0], atol=1e-6)
    assert sessions["text_encoder"].batches == [3, 1]
