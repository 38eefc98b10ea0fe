"""A tiny Gemma 3 with an image tower, its transformers model and its artifacts, one of each a session."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import medge.models
from medge.models import gemma3
from medge.runtimes.base import RunOptions
from medge.runtimes.generate import Generator

TOKENIZER = Path(medge.models.__file__).with_name("gemma_tokenizer")
SIZE, TOKENS = 224, 16
"""Pixels and tokens of an image: a sixteenth of MedGemma's, for speed."""


@dataclass(frozen=True)
class TinyGemma:
    """Both sides of the comparison."""

    artifact: Path
    """In GGUF."""
    onnx: Path
    """The same in ONNX."""
    model: Any
    """transformers' Gemma3ForConditionalGeneration, fp32, its weights exact in bf16."""
    processor: Any
    """transformers' Gemma3Processor."""


@pytest.fixture(scope="session")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> TinyGemma:
    """Seed 0. Not to be written to."""
    pytest.importorskip("llama_cpp")
    from transformers import AutoTokenizer, Gemma3ImageProcessor, Gemma3Processor

    from medge.checkpoint import Checkpoint
    from medge.export.pipeline import export
    from medge.export.request import Request
    from medge.quantize.scheme import load

    root = tmp_path_factory.mktemp("gemma")
    model = _model()
    model.save_pretrained(root / "checkpoint")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, root / "checkpoint")
    checkpoint = Checkpoint.open(root / "checkpoint")
    export(Request(checkpoint, "gguf", load("fp16"), root / "artifact", {"parity": "off"}))
    export(Request(checkpoint, "onnx", load("fp16"), root / "onnx", {"parity": "off"}))
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    pixels = {"size": {"height": SIZE, "width": SIZE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    images = Gemma3ImageProcessor(**pixels, image_seq_length=TOKENS)
    template = (TOKENIZER / "chat_template.jinja").read_text(encoding="utf-8")
    processor = Gemma3Processor(images, tokenizer, template, image_seq_length=TOKENS)
    return TinyGemma(root / "artifact", root / "onnx", model, processor)


@pytest.fixture(scope="session", params=["gguf", "onnx"])
def _one_generator(gemma: TinyGemma, request: pytest.FixtureRequest) -> Iterator[Generator]:
    from medge.runtimes import open_generator

    generator = open_generator(gemma.artifact if request.param == "gguf" else gemma.onnx, RunOptions(threads=1))
    yield generator
    generator.close()


@pytest.fixture
def generator(_one_generator: Generator) -> Generator:
    """The artifact, opened in each runtime, with nothing in its cache."""
    _one_generator.forget()
    return _one_generator


def _model() -> Any:
    """Random weights, exact in bf16."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {**gemma3.TINY["vision_config"], "image_size": SIZE}
    config = Gemma3Config(**{**gemma3.TINY, "vision_config": vision, "mm_tokens_per_image": TOKENS})
    model = Gemma3ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        scale, shift = (0.1, float("vision_tower" in name)) if "norm" in name else (0.06, 0.0)
        parameter.data = (values * scale + shift).to(torch.bfloat16).float()
    model.tie_weights()
    return model
