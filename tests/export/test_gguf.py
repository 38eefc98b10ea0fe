"""GGUF files: the layout of docs/gguf.md, readable by gguf-py, the same bytes each time, in one tensor's memory."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from medge.checkpoint import Checkpoint
from medge.demo import IMAGES, MODEL
from medge.errors import UnsupportedError
from medge.export.pipeline import export
from medge.export.request import Request
from medge.export.synth import synthesize
from medge.manifest import Artifact
from medge.quantize.scheme import load
from medge.runtimes import open_embedder
from medge.runtimes.base import RunOptions
from medge.runtimes.gguf_names import tensor_name

SCHEMES = ("fp32", "fp16", "int8", "int5", "int4", "int4-affine", "int4-nl")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Artifact]:
    """`made(checkpoint, "int8")` -> the artifact, once a module."""
    root = tmp_path_factory.mktemp("gguf")
    done: dict[tuple[Path, str], Artifact] = {}

    def make(source: Path, scheme: str) -> Artifact:
        key = source, scheme
        if key not in done:
            out = root / f"{len(done)}"
            done[key] = export(Request(Checkpoint.open(source), "gguf", load(scheme), out, {"parity": "off"}))
        return done[key]

    return make


def read(artifact: Artifact, part: str) -> Any:
    return gguf.GGUFReader(artifact.part_path(part))


def test_gguf_py_reads_every_tensor_and_key(checkpoint: Path, made: Callable[..., Artifact]) -> None:
    source = Checkpoint.open(checkpoint)
    reader = read(made(checkpoint, "fp32"), "image_encoder")
    found = {tensor.name: tensor for tensor in reader.tensors}
    for module, name in (
        ("vision_model.embeddings.patch_embedding", "v.patch_embd"),
        ("vision_model.encoder.layers.1.self_attn.q_proj", "v.blk.1.attn_q"),
        ("vision_model.encoder.layers.1.mlp.fc2", "v.blk.1.ffn_down"),
        ("vision_model.post_layernorm", "v.post_ln"),
        ("vision_model.head.mlp.fc1", "v.head.ffn_up"),
    ):
        for kind in ("weight", "bias"):
            np.testing.assert_array_equal(found[f"{name}.{kind}"].data, source.read(f"{module}.{kind}"))
    assert "v.blk.0.attn_k.weight" in found
    assert "v.blk.0.attn_k.bias" not in found, "softmax drops it"
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.architecture"] == "clip"
    assert keys["general.file_type"] == 0
    assert keys["clip.vision.embedding_length"] == 64
    assert keys["clip.vision.feed_forward_length"] == 240
    assert keys["clip.vision.image_mean"] == [0.5, 0.5, 0.5]
    assert keys["siglip.vision.preprocessing"] == "bigvision"
    assert keys["siglip.logit_scale"] == pytest.approx(source.scalars()["logit_scale"])


def test_the_text_file_holds_its_tokenizer(checkpoint: Path, made: Callable[..., Artifact]) -> None:
    import sentencepiece

    reader = read(made(checkpoint, "int8"), "text_encoder")
    keys = {name: field.contents() for name, field in reader.fields.items()}
    model = sentencepiece.SentencePieceProcessor(model_file=str(checkpoint / "spiece.model"))
    assert keys["tokenizer.ggml.tokens"] == [model.id_to_piece(i) for i in range(32000)]
    np.testing.assert_allclose(keys["tokenizer.ggml.scores"], [model.get_score(i) for i in range(32000)], rtol=1e-6)
    assert keys["tokenizer.ggml.eos_token_id"] == 1
    assert keys["clip.text.context_length"] == 64
    types = keys["tokenizer.ggml.token_type"]
    assert types[model.unk_id()] == 2
    assert types[1] == (3 if model.is_control(1) else 1)


@pytest.mark.parametrize(
    ("scheme", "type", "file_type"),
    [
        ("fp16", "F16", 1),
        ("int8", "Q8_0", 7),
        ("int5", "Q5_1", 9),
        ("int4", "Q4_0", 2),
        ("int4-affine", "Q4_1", 3),
        ("int4-nl", "IQ4_NL", 25),
    ],
)
def test_layers_are_stored_as_the_rules_say(
    scheme: str, type: str, file_type: int, checkpoint: Path, made: Callable[..., Artifact]
) -> None:
    artifact = made(checkpoint, scheme)
    reader = read(artifact, "image_encoder")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["v.blk.0.attn_q.weight"] == types["v.head.ffn_down.weight"] == type
    assert types["v.blk.0.ln1.weight"] == types["v.blk.0.attn_q.bias"] == types["v.position_embd.weight"] == "F32"
    assert types["v.patch_embd.weight"] == ("F32" if scheme == "int8" else "F16")
    assert reader.fields["general.file_type"].contents() == file_type
    assert type in artifact.manifest.parts["image_encoder"].facts["stored"]


def test_the_mlp_is_padded_with_zeros_for_blocks_alone(checkpoint: Path, made: Callable[..., Artifact]) -> None:
    for scheme, width in (("fp16", 240), ("int8", 256)):
        reader = read(made(checkpoint, scheme), "text_encoder")
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        up, down = tensors["t.blk.0.ffn_up.weight"], tensors["t.blk.0.ffn_down.weight"]
        assert (list(up.shape), list(down.shape)) == ([64, width], [width, 64])
        assert reader.fields["clip.text.feed_forward_length"].contents() == width
        assert reader.fields["siglip.text.feed_forward_length_unpadded"].contents() == 240
        rows = gguf.quants.dequantize(up.data, up.tensor_type)
        assert not rows[240:].any()
        assert rows[:240].any(1).all()


def test_rows_that_no_block_divides_stay_in_floats(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "all-int4.toml"
    path.write_text('name="all"\ntitle="x"\nactivations="none"\nrules=[{match=".*", bits=4, block=32, method="mse"}]\n')
    artifact = export(Request(Checkpoint.open(checkpoint), "gguf", load(path), tmp_path / "out", {"parity": "off"}))
    types = {tensor.name: tensor.tensor_type.name for tensor in read(artifact, "image_encoder").tensors}
    assert types["v.patch_embd.weight"] == "F16"  # rows of 14 pixels
    assert types["v.head.attn_v.weight"] == "Q4_0"
    assert np.isfinite(open_embedder(artifact.root).embed_images([min(IMAGES.rglob("*.jpg"))])).all()


def test_the_same_bytes_each_time(checkpoint: Path, tmp_path: Path, made: Callable[..., Artifact]) -> None:
    again = export(Request(Checkpoint.open(checkpoint), "gguf", load("int4-nl"), tmp_path / "x", {"parity": "off"}))
    assert again.digest == made(checkpoint, "int4-nl").digest


def test_an_unfinished_file_has_no_magic(checkpoint: Path, tmp_path: Path) -> None:
    counted: list[int] = []

    def stop(count: int) -> None:
        counted.append(count)
        if len(counted) == 20:
            raise KeyboardInterrupt

    from medge.export.base import PartJob
    from medge.export.gguf import GgufExporter

    source = Checkpoint.open(checkpoint)
    job = PartJob(source, source.spec.part("image_encoder"), load("int8"), on_tensor=stop)
    with pytest.raises(KeyboardInterrupt):
        GgufExporter().write(job, tmp_path)
    raw = (tmp_path / "image_encoder.gguf").read_bytes()
    assert len(raw) > 10_000
    assert raw[:4] == b"\0" * 4


def test_progress_counts_every_weight_that_is_read(checkpoint: Path, tmp_path: Path) -> None:
    from medge.export.base import PartJob
    from medge.export.gguf import GgufExporter

    counted: list[int] = []
    source = Checkpoint.open(checkpoint)
    part = source.spec.part("text_encoder")
    GgufExporter().write(PartJob(source, part, load("fp16"), on_tensor=counted.append), tmp_path)
    shapes = {name: shape for name, shape in source.spec.tensors.items() if name.startswith("text_model")}
    expected = sum(int(np.prod(shape)) for name, shape in shapes.items() if not name.endswith("k_proj.bias"))
    assert sum(counted) == expected


@pytest.mark.parametrize("scheme", ["int8-static", "palette4", "palette6"])
def test_what_ggml_cannot_do_is_refused_before_any_work(scheme: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="Nearest: --scheme int"):
        export(Request(Checkpoint.open(checkpoint), "gguf", load(scheme), tmp_path / "out", {"parity": "off"}))
    assert not (tmp_path / "out").exists()


def test_a_weight_beyond_float16_is_refused(own_checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(own_checkpoint / "model.safetensors")
    tensors["vision_model.encoder.layers.0.mlp.fc1.weight"][0, 0] = 1e9
    save_file(tensors, own_checkpoint / "model.safetensors")
    with pytest.raises(UnsupportedError, match="float16"):
        export(Request(Checkpoint.open(own_checkpoint), "gguf", load("fp16"), tmp_path / "o", {"parity": "off"}))


def test_no_module_without_a_name() -> None:
    with pytest.raises(KeyError):
        tensor_name("vision_model.encoder.layers.0.mlp.fc3", "weight")


LIMITS = {"fp32": 0.9999, "fp16": 0.9999, "int8": 0.999}
"""Least cosine on the trained demo model; the narrower schemes answer for their top-1 instead."""


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_demo_model_keeps_its_answers(scheme: str, made: Callable[..., Artifact]) -> None:
    images = sorted(IMAGES.rglob("*.jpg"))
    prompts = sorted(path.name for path in IMAGES.iterdir() if path.is_dir())
    exact, found = (open_embedder(made(MODEL, s).root, RunOptions(threads=1)) for s in ("fp32", scheme))
    expected, embedded = exact.embed_images(images), found.embed_images(images)
    assert np.sum(expected * embedded, axis=1).min() >= LIMITS.get(scheme, 0.95)
    tops = [model.scores(x, model.class_embeddings(prompts)) for model, x in ((exact, expected), (found, embedded))]
    assert np.mean(tops[0].argmax(1) == tops[1].argmax(1)) >= 0.97


@pytest.mark.slow
def test_full_size_is_written_in_one_tensor_s_memory(tmp_path: Path) -> None:
    synthesize("medsiglip-448", "full", tmp_path / "full")
    export(Request(Checkpoint.open(tmp_path / "full"), "gguf", load("int8"), tmp_path / "out", {"parity": "off"}))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1_500_000  # KB, pytest and torch counted
