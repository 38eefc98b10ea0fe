"""image_encoder.gguf is also a tower of llama.cpp's `clip` loader, unpatched: its patch embeddings are medge's."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from medge.checkpoint import Checkpoint
from medge.export.pipeline import export
from medge.export.request import Request
from medge.manifest import Artifact
from medge.quantize.scheme import load
from medge.runtimes.base import RunOptions
from medge.runtimes.gguf_backend import GgufBackend
from medge.spec import FloatArray

WIDTH = 64
"""Of the tiny tower, and so of the language model that mtmd insists on beside it."""


KEPT: list[Any] = []
"""Log callbacks: llama.cpp and ggml call the last one until the process ends."""


@pytest.fixture(scope="module", params=["fp32", "int8", "int4"])
def artifact(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("clip") / "out"
    scheme = load(request.param)
    return export(Request(Checkpoint.open(checkpoint), "gguf", scheme, out, {"parity": "off"}, tapped=True))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest llama: one layer, bytes for a vocabulary."""
    path = tmp_path_factory.mktemp("llama") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-6)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3] + [6] * 256)
    block = {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {f"blk.0.{name}": shape for name, shape in (block | dict.fromkeys(names, (WIDTH, WIDTH))).items()}
    for name, shape in (shapes | {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}).items():
        writer.add_tensor(f"{name}.weight", np.full(shape, 0.01, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def context(artifact: Artifact, language_model: Path) -> Iterator[Any]:
    from llama_cpp import llama_cpp, mtmd_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    KEPT.append(quiet)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    mtmd_cpp.mtmd_log_set(quiet, ctypes.c_void_p(0))
    model = llama_cpp.llama_model_load_from_file(str(language_model).encode(), llama_cpp.llama_model_default_params())
    assert model
    params = mtmd_cpp.mtmd_context_params_default()
    params.use_gpu = params.warmup = False
    params.n_threads = 1
    found = mtmd_cpp.mtmd_init_from_file(str(artifact.part_path("image_encoder")).encode(), model, params)
    assert found, "llama.cpp does not load the tower"
    yield found
    mtmd_cpp.mtmd_free(found)
    llama_cpp.llama_model_free(model)


def encoded(context: Any, image: np.ndarray[Any, Any]) -> list[FloatArray]:
    """Every image chunk's embeddings: mtmd's overview and tiles, which are one image of the tower's own size here."""
    from llama_cpp import mtmd_cpp

    height, width = image.shape[:2]
    pixels = (ctypes.c_uint8 * image.size).from_buffer_copy(image.tobytes())
    bitmap = mtmd_cpp.mtmd_bitmap_init(width, height, pixels)
    marker = mtmd_cpp.mtmd_default_marker()
    text = mtmd_cpp.mtmd_input_text(text=marker, text_len=len(marker), add_special=False, parse_special=True)
    chunks = mtmd_cpp.mtmd_input_chunks_init()
    bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
    assert mtmd_cpp.mtmd_tokenize(context, chunks, ctypes.byref(text), bitmaps, 1) == 0
    found = []
    for i in range(mtmd_cpp.mtmd_input_chunks_size(chunks)):
        chunk = mtmd_cpp.mtmd_input_chunks_get(chunks, i)
        if mtmd_cpp.mtmd_input_chunk_get_type(chunk) == mtmd_cpp.MTMD_INPUT_CHUNK_TYPE_IMAGE:
            assert mtmd_cpp.mtmd_encode_chunk(context, chunk) == 0
            tokens = mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk)
            raw = mtmd_cpp.mtmd_get_output_embd(context)
            found.append(np.ctypeslib.as_array(raw, (tokens, WIDTH)).copy())
    mtmd_cpp.mtmd_input_chunks_free(chunks)
    mtmd_cpp.mtmd_bitmap_free(bitmap)
    return found


def test_llama_cpp_s_patch_embeddings_are_medge_s(artifact: Artifact, context: Any) -> None:
    image = np.random.default_rng(0).integers(0, 256, (56, 56, 3), np.uint8)
    pixels = ((image.astype(np.float32) / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None]
    outputs = GgufBackend().open(artifact, "image_encoder", RunOptions(1)).run({"pixel_values": pixels})
    expected = outputs[max(outputs)][0]  # the last tap: behind post_layernorm
    found = encoded(context, image)
    assert found
    for tokens in found:
        cosine = np.sum(tokens * expected, 1) / np.linalg.norm(tokens, axis=1) / np.linalg.norm(expected, axis=1)
        # Its GELU is a table of float16, and under blocks it rounds activations to 8 bits where medge unfolds weights.
        assert cosine.min() >= (0.99999 if artifact.manifest.scheme == "fp32" else 0.999)
