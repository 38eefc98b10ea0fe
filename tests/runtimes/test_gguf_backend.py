"""GGUF parts on ggml: the right numbers, and one line for every damaged file; ggml itself would end the process."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from medge.checkpoint import Checkpoint
from medge.errors import CorruptError, MedgeError, MissingExtraError, UsageError
from medge.export.pipeline import export
from medge.export.request import Request
from medge.manifest import Artifact
from medge.quantize.scheme import load
from medge.runtimes import ggml
from medge.runtimes.base import RunOptions
from medge.runtimes.ggml_graph import GgmlOps, Node
from medge.runtimes.ggml_weights import Weights
from medge.runtimes.gguf_backend import GgufBackend
from medge.runtimes.gguf_file import BlockType, GgufFile
from medge.runtimes.onnx_backend import OnnxBackend

IMAGE = "image_encoder.gguf"


@pytest.fixture(scope="module")
def made(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`made("int8")` -> the tiny model's artifact in a scheme, once."""
    root, done = tmp_path_factory.mktemp("gguf"), {}

    def make(scheme: str = "fp32", *, tapped: bool = False) -> Path:
        key = f"{scheme}-{tapped}"
        if key not in done:
            out = root / key
            request = Request(Checkpoint.open(checkpoint), "gguf", load(scheme), out, {"parity": "off"}, tapped=tapped)
            done[key] = export(request).root
        return done[key]

    return make


@pytest.fixture
def own(made: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(made(), tmp_path / "own"))


def pixels(count: int = 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).uniform(-1, 1, (count, 3, 56, 56)).astype(np.float32)


def ids(count: int = 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 32000, (count, 64))


def run(root: Path, part: str, inputs: dict[str, Any], threads: int | None = 1) -> dict[str, Any]:
    return GgufBackend().open(Artifact.open(root), part, RunOptions(threads)).run(inputs)


def test_the_same_numbers_as_onnx(made: Callable[..., Path], artifact: Path) -> None:
    for part, inputs in (("image_encoder", {"pixel_values": pixels(2)}), ("text_encoder", {"input_ids": ids(2)})):
        (found,) = run(made(), part, inputs).values()
        (expected,) = OnnxBackend().open(Artifact.open(artifact), part, RunOptions(1)).run(inputs).values()
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_batch_is_its_inputs_one_by_one_and_threads_change_nothing(made: Callable[..., Path]) -> None:
    batch = run(made("int8"), "image_encoder", {"pixel_values": pixels(3)})["image_embeds"]
    for i, image in enumerate(pixels(3)):
        alone = run(made("int8"), "image_encoder", {"pixel_values": image[None]}, threads=2)["image_embeds"]
        np.testing.assert_array_equal(alone[0], batch[i])


@pytest.mark.parametrize("scheme", ["fp16", "int8", "int5", "int4", "int4-affine", "int4-nl"])
def test_unfolding_changes_less_than_quantizing_did(scheme: str, made: Callable[..., Path], tmp_path: Path) -> None:
    inputs = {"pixel_values": pixels()}
    exact = run(made(), "image_encoder", inputs)["image_embeds"]
    found = run(made(scheme), "image_encoder", inputs)["image_embeds"]
    kept = Path(shutil.copytree(made(scheme), tmp_path / "kept"))
    manifest = json.loads((kept / "manifest.json").read_text())
    manifest["session"] = {}
    (kept / "manifest.json").write_text(json.dumps(manifest))
    folded = run(kept, "image_encoder", inputs)["image_embeds"]
    assert np.linalg.norm(found - folded) <= np.linalg.norm(found - exact) + 1e-6


def test_gelu_is_the_tanh_form_to_float32(made: Callable[..., Path]) -> None:
    library = ggml.load()
    x = np.concatenate([np.linspace(-12, 12, 4095), [-1e4]]).astype(np.float32)
    owner = Weights(library, GgufFile.open(made() / IMAGE), unfold=False)
    context = library.context(owner, 64, 64)
    node = Node(library.new_tensor_4d(context, BlockType.F32, x.size, 1, 1, 1), x.shape)
    y = GgmlOps(library, context, owner).gelu_tanh(node, "gelu")
    assert library.backend_alloc_ctx_tensors_from_buft(context, library.backend_dev_buffer_type(library.device))
    library.write(node.tensor, x)
    graph = library.new_graph_custom(context, 64, False)
    library.build_forward_expand(graph, y.tensor)
    backend = library.backend_dev_init(library.device, None)
    assert library.backend_graph_compute(backend, graph) == 0
    exact = x.astype(np.float64)
    exact = 0.5 * exact * (1 + np.tanh(np.sqrt(2 / np.pi) * (exact + 0.044715 * exact**3)))
    np.testing.assert_allclose(library.read(y.tensor, x.shape), exact, atol=2e-6)


def test_taps_are_the_blocks_outputs(made: Callable[..., Path], checkpoint: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import SiglipModel

    found = run(made(tapped=True), "image_encoder", {"pixel_values": pixels()})
    modules = list(Checkpoint.open(checkpoint).spec.part("image_encoder").blocks.values())
    assert list(found) == ["image_embeds", *(f"tap_{i}" for i in range(len(modules)))]
    model, seen = SiglipModel.from_pretrained(checkpoint).eval(), []
    for module in modules:
        model.get_submodule(module).register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.inference_mode():
        model.get_image_features(torch.from_numpy(pixels()))
    for i, expected in enumerate(seen):
        np.testing.assert_allclose(found[f"tap_{i}"], getattr(expected, "numpy", expected[0].numpy)(), atol=2e-5)


@pytest.mark.parametrize(
    "wrong", [pixels()[:, :, :28], pixels().astype(np.float64), pixels()[:0], np.zeros((0,), np.float32), None]
)
def test_inputs_that_the_graph_does_not_take_are_one_line(wrong: Any, made: Callable[..., Path]) -> None:
    with pytest.raises(CorruptError, match="takes 'pixel_values'"):
        run(made(), "image_encoder", {} if wrong is None else {"pixel_values": wrong})


@pytest.mark.parametrize("id", [-1, 32000, 2**40])
def test_an_id_without_a_row_is_refused(id: int, made: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="32000"):
        run(made(), "text_encoder", {"input_ids": np.full((1, 64), id)})


def damage(root: Path, at: int, raw: bytes) -> None:
    with (root / IMAGE).open("r+b") as stream:
        stream.seek(at)
        stream.write(raw)


def place(root: Path, text: bytes) -> int:
    """Just behind a name in the header."""
    return (root / IMAGE).read_bytes().index(text) + len(text)


def corrupt(root: Path, match: str) -> None:
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["parts"]["image_encoder"]["files"][0]["bytes"] = (root / IMAGE).stat().st_size
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptError, match=match) as caught:
        GgufBackend().open(Artifact.open(root), "image_encoder", RunOptions(1))
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


def test_another_magic_and_version(own: Path) -> None:
    damage(own, 4, struct.pack("<I", 2))
    corrupt(own, "version 2")
    damage(own, 0, b"ONNX")
    corrupt(own, "no GGUF")


@pytest.mark.parametrize("size", [0, 3, 20, 700, 5000, -1])
def test_a_truncated_file(size: int, own: Path) -> None:
    raw = (own / IMAGE).read_bytes()
    last = max(GgufFile.open(own / IMAGE).tensors.values(), key=lambda entry: entry.offset)
    (own / IMAGE).write_bytes(raw[: last.offset + last.bytes - 1] if size == -1 else raw[:size])
    corrupt(own, "truncated|more than it has bytes for")


@pytest.mark.parametrize("alignment", [0, 7, 48, 1 << 20])
def test_a_wrong_alignment(alignment: int, own: Path) -> None:
    damage(own, place(own, b"general.alignment") + 4, struct.pack("<I", alignment))
    corrupt(own, "alignment|truncated")


@pytest.mark.parametrize("field", [8, 16])
def test_absurd_counts(field: int, own: Path) -> None:
    damage(own, field, struct.pack("<Q", 2**60))
    corrupt(own, "more than it has bytes for")


@pytest.mark.parametrize(
    ("skip", "raw", "match"),
    [
        (0, struct.pack("<I", 9), "rank 9"),
        (4, struct.pack("<QQ", 2**62, 2**62), "cannot hold"),
        (4, struct.pack("<QQ", 0, 64), "cannot hold"),
        (4, struct.pack("<QQ", 64, 32), "config.json contradicts"),
        (4, struct.pack("<QQ", 32, 64), "config.json contradicts"),
        (20, struct.pack("<I", 99), "type 99"),
        (24, struct.pack("<Q", 2**40), "truncated"),
        (24, struct.pack("<Q", 33), "alignment"),
        (24, struct.pack("<Q", 0), "inside another"),
    ],
)
def test_a_tensor_that_is_not_as_stated(skip: int, raw: bytes, match: str, own: Path) -> None:
    damage(own, place(own, b"v.blk.1.attn_q.weight") + skip, raw)
    corrupt(own, match)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        (b"v.post_ln.weight", b"v.post_lm.weight", "lacks the tensor 'v.post_ln.weight'"),
        (b"v.post_ln.weight", b"v.post_ln.we\xffght", "UTF-8"),
        (b"v.blk.1.ln1.weight", b"v.blk.0.ln1.weight", "twice"),
        (b"general.architecture", b"general.brchitecture", "another architecture"),
    ],
)
def test_names_that_are_not_the_layout_s(old: bytes, new: bytes, match: str, own: Path) -> None:
    damage(own, place(own, old) - len(old), new)
    corrupt(own, match)


def test_config_json_of_another_model(own: Path) -> None:
    config = json.loads((own / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3
    raw = json.dumps(config)
    (own / "config.json").write_text(raw)
    manifest = json.loads((own / "manifest.json").read_text())
    for file in manifest["files"]:
        if file["path"] == "config.json":
            file["bytes"] = len(raw)
    (own / "manifest.json").write_text(json.dumps(manifest))
    corrupt(own, "lacks the tensor 'v.blk.2")


@pytest.fixture(scope="module")
def header(made: Callable[..., Path]) -> tuple[Path, bytes, int]:
    raw = (made("int4") / IMAGE).read_bytes()
    return made("int4"), raw, min(entry.offset for entry in GgufFile.open(made("int4") / IMAGE).tensors.values())


@hypothesis.settings(max_examples=100, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(data=strategies.data())
def test_no_damage_to_the_header_ends_the_process(
    data: strategies.DataObject, header: tuple[Path, bytes, int], tmp_path: Path
) -> None:
    """Any bytes anywhere: an error of ours, or a graph that runs."""
    root, raw, size = header
    at = data.draw(strategies.integers(0, size - 1))
    new = data.draw(strategies.binary(min_size=1, max_size=8))
    own = tmp_path / "fuzzed"
    if not own.exists():
        shutil.copytree(root, own)
    (own / IMAGE).write_bytes((raw[:at] + new + raw[at + len(new) :])[: len(raw)])
    with contextlib.suppress(MedgeError):
        run(own, "image_encoder", {"pixel_values": pixels()})


def test_a_ggml_of_another_interface_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(ggml.importlib.util.find_spec("llama_cpp").submodule_search_locations[0]) / "lib"  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(ggml._SIGNATURES, "ggml_gone", (None, ()))
        with pytest.raises(MissingExtraError, match="'ggml_gone' is missing"):
            ggml.Ggml(folder)
    with monkeypatch.context() as patch:
        patch.setattr(BlockType, "bytes", 35)
        with pytest.raises(MissingExtraError, match="another version"):
            ggml.Ggml(folder)
    with pytest.raises(MissingExtraError, match="cannot be loaded"):
        ggml.Ggml(folder / "nowhere")


def test_no_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    with pytest.raises(MissingExtraError, match="not installed"):
        ggml.load.__wrapped__()
