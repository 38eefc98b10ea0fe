"""Gemma 3 in ONNX: what the files hold, and that plain ONNX Runtime computes transformers' numbers with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from medge.errors import CorruptError, UsageError, WeightsError
from medge.export.synth import synthesize
from medge.manifest import Artifact

Export = Callable[..., Artifact]


@pytest.fixture(scope="session")
def chat_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("onnx") / "chat"
    synthesize("medgemma-4b-it", "tiny", root)
    return root


def nodes(artifact: Artifact, part: str, op: str) -> list[onnx.NodeProto]:
    graph = onnx.load(artifact.part_path(part), load_external_data=False).graph
    return [node for node in graph.node if node.op_type == op]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {found.name: onnx.helper.get_attribute_value(found) for found in node.attribute}


def test_five_of_six_layers_have_a_window_and_a_base_of_their_own(chat_checkpoint: Path, run_export: Export) -> None:
    artifact = run_export(root=chat_checkpoint)
    layers = nodes(artifact, "decoder", "GroupQueryAttention")
    windows = [attributes(layer).get("local_window_size") for layer in layers]
    assert windows == [512] * 5 + [None]
    assert {layer.input[7] for layer in layers[:5]} == {"rope.10000.1.cos"}
    assert layers[5].input[7] == "rope.1e+06.8.cos"


def test_rotations_are_stretched_in_full_layers_alone(chat_checkpoint: Path, run_export: Export) -> None:
    """onnxruntime-genai's builder drops the factor of 8: logits off by 0.47."""
    model = onnx.load(run_export(root=chat_checkpoint).part_path("decoder"))
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer if "rope" in tensor.name}
    place, pair = 800, 3
    for name, base, factor in (("rope.1e+06.8", 1e6, 8), ("rope.10000.1", 1e4, 1)):
        angle = place / factor * base ** (-2 * pair / 64)
        assert stored[f"{name}.cos"][place, pair] == pytest.approx(np.cos(angle), abs=1e-4)
        assert stored[f"{name}.sin"][place, pair] == pytest.approx(np.sin(angle), abs=1e-4)


@pytest.mark.parametrize("scheme", ["fp32", "fp16", "int8", "int4"])
def test_the_embedding_table_is_stored_once(chat_checkpoint: Path, run_export: Export, scheme: str) -> None:
    artifact = run_export(scheme, root=chat_checkpoint)
    assert [file.path for file in artifact.manifest.parts["embedding"].files] == ["embedding.onnx"]
    assert artifact.manifest.parts["embedding"].facts == {"reads": "decoder.onnx.data"}
    assert artifact.part_path("embedding").stat().st_size < 2000
    session = onnxruntime.InferenceSession(artifact.part_path("embedding"), providers=["CPUExecutionProvider"])
    ids = np.array([[0, 5, 2047]], np.int64)
    (rows,) = session.run(None, {"input_ids": ids})
    from medge.checkpoint import Checkpoint

    table = Checkpoint.open(chat_checkpoint).read("language_model.model.embed_tokens.weight")
    expected = table[ids] * np.sqrt(128)
    assert np.abs(rows - expected).max() <= {"int8": 0.06, "int4": 0.06}.get(scheme, 1e-5) * np.abs(expected).max()


def test_plain_onnx_runtime_gives_all_logits_unless_told_otherwise(chat_checkpoint: Path, run_export: Export) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForImageTextToText

    artifact = run_export(root=chat_checkpoint)
    session = onnxruntime.InferenceSession(artifact.part_path("decoder"), providers=["CPUExecutionProvider"])
    assert [found.name for found in session.get_overridable_initializers()] == ["is_image", "logits_to_keep"]
    embeds = np.random.default_rng(0).standard_normal((1, 40, 128)).astype(np.float32)
    places = {"context": 64, "window": 512}
    inputs = {
        found.name: np.zeros([places.get(size, size) for size in found.shape], np.float32)
        for found in session.get_inputs()
        if found.name.startswith("past")
    }
    ours = session.run(["logits"], {**inputs, "inputs_embeds": embeds, "attention_mask": np.ones((1, 40), np.int64)})
    model = AutoModelForImageTextToText.from_pretrained(chat_checkpoint, dtype=torch.float32).eval()
    with torch.inference_mode():
        theirs = model(inputs_embeds=torch.from_numpy(embeds)).logits.numpy()
    np.testing.assert_allclose(ours[0], theirs, atol=1e-4)


def test_a_text_model_has_nothing_of_images(run_export: Export, tmp_path: Path) -> None:
    synthesize("medgemma-27b-text-it", "tiny", tmp_path / "text")
    artifact = run_export("int4", root=tmp_path / "text")
    assert list(artifact.manifest.parts) == ["decoder", "embedding"]
    assert nodes(artifact, "decoder", "If") == []
    assert {attributes(node)["bits"] for node in nodes(artifact, "decoder", "MatMulNBits")} == {4, 8}


def test_bits_are_those_of_the_scheme(chat_checkpoint: Path, run_export: Export) -> None:
    products = nodes(run_export("int4", root=chat_checkpoint), "decoder", "MatMulNBits")
    *layers, head = [attributes(node)["bits"] for node in products]
    assert set(layers) == {4}
    assert head == 8


@pytest.mark.parametrize(
    ("bits", "block", "method", "width", "limit"),
    [
        (4, 32, "absmax", 32, 0.01),
        (4, 32, "mse", 32, 0.01),
        (4, 64, "mse", 64, 0.012),
        (8, None, "absmax", 32, 1e-4),
    ],
)
def test_a_block_s_values_come_back(
    chat_checkpoint: Path, run_export: Export, bits: int, block: int | None, method: str, width: int, limit: float
) -> None:
    """MatMulNBits' order of values is neither ggml's nor a plain row's."""
    from medge.checkpoint import Checkpoint
    from medge.quantize.scheme import Scheme

    rules = [
        {"match": r"vision_tower\..*|multi_modal.*", "bits": 32},
        {"match": ".*", "bits": bits, "block": block, "method": method},
    ]
    scheme = Scheme.model_validate({"name": "own", "title": "Own", "activations": "dynamic", "rules": rules})
    model = onnx.load(run_export(scheme, root=chat_checkpoint).part_path("decoder"))
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    name = "language_model.model.layers.1.mlp.down_proj"
    packed, scales = stored[f"{name}.weight"], stored[f"{name}.scales"]
    levels = packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1)
    values = levels.reshape(*packed.shape[:2], -1).astype(np.float32) - 2 ** (bits - 1)
    assert values.shape[-1] == width
    exact = Checkpoint.open(chat_checkpoint).read(f"{name}.weight")
    error = (values * scales[..., None]).reshape(exact.shape) - exact
    assert np.square(error).mean() < limit * np.square(exact).mean()


def test_a_context_is_chosen_at_export(chat_checkpoint: Path, run_export: Export, tmp_path: Path) -> None:
    artifact = run_export(root=chat_checkpoint, context="1000")
    assert artifact.manifest.chat is not None
    assert artifact.manifest.chat.context == 1000
    for wrong in ("1", "8193", "many"):
        with pytest.raises(UsageError, match=f"context={wrong} is no number of tokens"):
            run_export(root=chat_checkpoint, out=tmp_path / "other", context=wrong)


def test_a_missing_vocabulary_is_found_before_any_work(run_export: Export, tmp_path: Path) -> None:
    root = tmp_path / "chat"
    synthesize("medgemma-4b-it", "tiny", root)
    (root / "tokenizer.json").unlink()
    with pytest.raises(WeightsError, match=r"tokenizer\.json is missing"):
        run_export(root=root)


@pytest.mark.parametrize("scheme", ["fp32", "int4"])
def test_weights_that_are_not_finite_are_refused(run_export: Export, tmp_path: Path, scheme: str) -> None:
    from medge.tensorfile import read_header

    root = tmp_path / "chat"
    synthesize("medgemma-4b-it", "tiny", root)
    path = root / "model.safetensors"
    for name in ("layers.4.mlp.up_proj", "embed_tokens"):
        entry = read_header(path)[f"language_model.model.{name}.weight"]
        raw = np.memmap(path, np.uint16, "r+", entry.start, (8,))
        kept, raw[3] = raw[3], 0x7F80
        raw.flush()
        with pytest.raises(CorruptError, match=name):
            run_export(scheme, root=root)
        raw[3] = kept
        raw.flush()


def test_genai_s_config_names_what_the_graphs_have(chat_checkpoint: Path, run_export: Export) -> None:
    artifact = run_export(root=chat_checkpoint)
    config = json.loads((artifact.root / "genai_config.json").read_bytes())
    (stages,) = config["model"]["decoder"]["pipeline"]
    for stage in stages.values():
        session = onnxruntime.InferenceSession(artifact.root / stage["filename"], providers=["CPUExecutionProvider"])
        assert {found.name for found in session.get_inputs()} == set(stage["inputs"])
        assert {found.name for found in session.get_outputs()} == set(stage["outputs"])
    assert config["model"]["eos_token_id"] == [5, 1]


def test_genai_gives_our_numbers(chat_checkpoint: Path, run_export: Export) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    from medge.runtimes import open_generator
    from medge.runtimes.generate import Message

    artifact = run_export(root=chat_checkpoint)
    generator = open_generator(artifact.root)
    prompt = generator.prompt([Message("user", (" ".join(f"{i} mm." for i in range(250)),))])
    ours = np.concatenate(list(generator.logits(prompt)))[-1]
    model = genai.Model(str(artifact.root))
    theirs = genai.Generator(model, genai.GeneratorParams(model))
    theirs.append_tokens(np.array([prompt.ids], np.int32))
    np.testing.assert_allclose(theirs.get_logits().ravel()[-len(ours) :], ours, atol=1e-4)
    assert len(prompt.ids) > 512
