"""A tiny Gemma 3 with an image tower, its transformers model and its GGUF artifact, one of each a session."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medge.manifest import Manifest, PartFiles, Source, describe, write_json
from medge.runtimes.generate import Generator
from medge.spec import ChatFormat, ImageSpec

SPECIAL = [
    "<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>",
    "<start_of_image>", "<end_of_image>", "<image_soft_token>",
]  # fmt: skip
WHITESPACE = ["\n" * n for n in range(1, 5)] + ["▁" * n for n in range(2, 5)]
"""Gemma keeps runs of these whole."""
TEMPLATE = """{{ bos_token }}
{%- set lead = '' -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set lead = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("roles must alternate") }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (lead if loop.first else '') }}
    {%- for item in message['content'] -%}
        {{ '<start_of_image>' if item['type'] == 'image' else item['text'] | trim }}
    {%- endfor -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""
"""The shape of Gemma 3's."""
CORPUS = [
    "Describe this chest radiograph. Is there a pleural effusion?",
    "The heart is enlarged, the lungs are clear, no pneumothorax; compare the two images.",
    "You are an expert radiologist. Answer in one sentence. Findings and impression follow.",
]
WINDOW = 512
"""llama.cpp clips what image tokens see of each other below 256."""


@dataclass(frozen=True)
class TinyGemma:
    """Both sides of the comparison."""

    artifact: Path
    model: Any
    """transformers' Gemma3ForConditionalGeneration, fp32, its weights exact in bf16."""
    processor: Any
    """transformers' Gemma3Processor."""


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> TinyGemma:
    """224 px, 16 tokens an image, seed 0. Not to be written to."""
    pytest.importorskip("llama_cpp")
    root = tmp_path_factory.mktemp("gemma")
    tokenizer = _tokenizer()
    model = _model(len(tokenizer))
    _write_text(root / "decoder.gguf", model, tokenizer)
    _write_vision(root / "vision.gguf", model)
    (root / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    chat = ChatFormat(image_tokens=16, context=2048)
    manifest = Manifest(
        schema_version=1,
        source=Source(model="tiny", hub_id="none", revision="0", weights_sha256="0" * 64),
        licence="none",
        task="generate",
        format="gguf",
        scheme="fp16",
        parts={name: _part(root, f"{name}.gguf") for name in ("decoder", "vision")},
        files=(describe(root, "chat_template.jinja"),),
        image=ImageSpec(size=224, variant="finetune"),
        chat=chat,
    )
    write_json(root / "manifest.json", json.loads(manifest.model_dump_json()))
    return TinyGemma(root, model, _processor(tokenizer))


@pytest.fixture(scope="session")
def _one_generator(gemma: TinyGemma) -> Iterator[Generator]:
    from medge.manifest import Artifact
    from medge.runtimes.base import RunOptions
    from medge.runtimes.llama_backend import LlamaGenerator

    generator = LlamaGenerator(Artifact.open(gemma.artifact), RunOptions(threads=1))
    yield generator
    generator.close()


@pytest.fixture
def generator(_one_generator: Generator) -> Generator:
    """The artifact, opened, with nothing in its cache."""
    _one_generator.forget()
    return _one_generator


def _part(root: Path, file: str) -> PartFiles:
    return PartFiles(files=(describe(root, file),), inputs=(), outputs=())


def _tokenizer() -> Any:
    """Gemma's kind: BPE with byte fallback, spaces as ▁, no prefix; trained on three sentences."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
    from transformers import GemmaTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    alphabet = sorted({c for text in CORPUS for c in text.replace(" ", "▁")} | set(map(chr, range(33, 127))))
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([text.replace(" ", "▁") for text in CORPUS], trainer)
    learned = json.loads(trained.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    names = [*SPECIAL, *WHITESPACE, *(f"<0x{b:02X}>" for b in range(256))]
    # Merged pieces before single characters, as Gemma orders them, so that a score is minus the id.
    names += [p for p in pieces if len(p) > 1] + [p for p in pieces if len(p) == 1]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in WHITESPACE])
    fast = GemmaTokenizerFast(
        tokenizer_object=tokenizer,
        add_bos_token=True,
        eos_token="<eos>",
        extra_special_tokens={
            "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>",
        },
    )  # fmt: skip
    fast.chat_template = TEMPLATE
    return fast


def _processor(tokenizer: Any) -> Any:
    from transformers import Gemma3ImageProcessor, Gemma3Processor

    images = Gemma3ImageProcessor(
        size={"height": 224, "width": 224}, image_mean=[0.5] * 3, image_std=[0.5] * 3, image_seq_length=16
    )
    return Gemma3Processor(images, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=16)


def _model(vocabulary: int) -> Any:
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": vocabulary, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 7,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "query_pre_attn_scalar": 32,
        "sliding_window": WINDOW, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "max_position_embeddings": 2048,
    }  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 224, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    marks = {"boi_token_index": 7, "eoi_token_index": 8, "image_token_index": 9}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=16, **marks)
    model = Gemma3ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        scale, shift = (0.1, float("vision_tower" in name)) if "norm" in name else (0.06, 0.0)
        parameter.data = (values * scale + shift).to(torch.bfloat16).float()
    model.tie_weights()
    return model


def _write_text(path: Path, model: Any, tokenizer: Any) -> None:
    import gguf

    config = model.config.text_config
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(8.0)
    _add_vocabulary(writer, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    _add_tensors(writer, names, model.model.language_model.named_parameters(prefix="model"), "norm.weight")


def _add_vocabulary(writer: Any, tokenizer: Any) -> None:
    """As llama.cpp's converter has it: a score of minus the id makes its SPM merge in BPE's order."""
    from gguf import TokenType

    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    names = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    kinds = [
        TokenType.UNKNOWN if name == "<unk>"
        else TokenType.CONTROL if name in SPECIAL
        else TokenType.USER_DEFINED if name in WHITESPACE
        else TokenType.BYTE if name.startswith("<0x")
        else TokenType.NORMAL
        for name in names
    ]  # fmt: skip
    own = (TokenType.USER_DEFINED,)
    writer.add_token_list([n.replace("▁", " ") if k in own else n for n, k in zip(names, kinds, strict=True)])
    writer.add_token_scores([-float(i) if k == TokenType.NORMAL else -1000.0 for i, k in enumerate(kinds)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(6)
    writer.add_eot_token_id(6)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


def _write_vision(path: Path, model: Any) -> None:
    import gguf

    config = model.config.vision_config
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("gemma3")
    writer.add_vision_projection_dim(model.config.text_config.hidden_size)
    writer.add_vision_image_size(config.image_size)
    writer.add_vision_patch_size(config.patch_size)
    writer.add_vision_embedding_length(config.hidden_size)
    writer.add_vision_feed_forward_length(config.intermediate_size)
    writer.add_vision_block_count(config.num_hidden_layers)
    writer.add_vision_head_count(config.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
    writer.add_vision_use_gelu(True)
    writer.add_vision_image_mean([0.5] * 3)
    writer.add_vision_image_std([0.5] * 3)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, config.num_hidden_layers)
    parameters = [
        (name.removeprefix("model.").replace("_weight", ".weight"), value)
        for name, value in model.named_parameters()
        if "language_model" not in name
    ]
    _add_tensors(writer, names, parameters, "soft_emb_norm")


def _add_tensors(writer: Any, names: Any, parameters: Any, plus_one: str) -> None:
    """Matrices in F16, the rest in F32; Gemma's norms multiply by 1 + weight, GGUF's by the weight."""
    for name, parameter in parameters:
        values = parameter.detach().numpy()
        matrix = values.ndim > 1 and "embeddings" not in name
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(own, values.astype(np.float16 if matrix else np.float32) + (plus_one in name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
