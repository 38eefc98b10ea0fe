"""A tiny SigLIP and a tiny Gemma 3 that are really trained, and held-out images to try them on: regression fixtures.

train.py makes `model/` and `images/` from the medical images that permissively licensed packages ship
(sources.py), train_generator.py makes `generator/`; run.py and asking.py are `medge demo`. All crops come from a few
images: never a medical claim.
"""

from __future__ import annotations

from pathlib import Path

MODEL = Path(__file__).parent / "model"
"""A checkpoint in Hugging Face layout: config, safetensors, tokenizer, preprocessor config."""

IMAGES = Path(__file__).parent / "images"
"""Held-out images, a folder a class; the folder's name is the label."""


GENERATOR = Path(__file__).parent / "generator"
"""A tiny Gemma 3 with an image tower, trained on findings-like text about the same images (train_generator.py)."""


def labels() -> tuple[str, ...]:
    """The classes of the demo images, in sorted order."""
    return tuple(sorted(folder.name for folder in IMAGES.iterdir() if folder.is_dir()))
