"""The real medical images and prompts that ship with medge: what parity and calibration use by default."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.resources import files
from itertools import chain, zip_longest
from pathlib import Path

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".bmp", ".webp"})
TEMPLATES = ("{}", "a photo of {}", "a medical image showing {}", "{} in a patient")


def sample_root() -> Path:
    """A folder per class of held-out images of the demo model's sources (see SOURCES.md there)."""
    return Path(str(files("medge"))) / "demo" / "images"


def list_images(root: Path, count: int) -> list[Path]:
    """`count` images of a folder tree, taken from its subfolders in turn, in name order."""
    folders: dict[Path, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in SUFFIXES:
            folders.setdefault(path.parent, []).append(path)
    turns = chain.from_iterable(zip_longest(*folders.values()))
    return [path for path in turns if path is not None][:count]


def sample_texts(count: int) -> list[str]:
    """Prompts over the sample classes."""
    labels = sorted(path.name for path in sample_root().iterdir() if path.is_dir())
    return [template.replace("{}", label) for template in TEMPLATES for label in labels][:count]


def digest(images: Sequence[Path], texts: Sequence[str]) -> str:
    """Identity of a set of inputs, by content."""
    lines = [hashlib.sha256(path.read_bytes()).hexdigest() for path in images]
    return hashlib.sha256("\n".join([*lines, *texts]).encode()).hexdigest()
