"""Random Gemma 3 checkpoints, as fast as the disk takes them: 8.6 GB of bfloat16 for the 4B.

A generator of normal numbers is slower than a disk. One block of noise, of a prime length so that no matrix's rows
fall in step with it, is drawn once and read from another place for each tensor.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medge.manifest import write_json
from medge.spec import ChatSpec

BLOCK = 4_194_301
"""Numbers in the block: the largest prime below 2**22."""


TOKEN_IDS = {"boi_token_index": 6, "eoi_token_index": 7, "image_token_index": 2047, "eos_token_id": [1, 5]}
"""Of the small tokenizer that every random checkpoint gets; the published ones have other ids."""


class Noise:
    """bfloat16 values of each tensor, piece by piece."""

    def __init__(self, seed: int, shapes: Mapping[str, tuple[int, ...]], on_tensor: Callable[[int], None]) -> None:
        self._noise = np.random.Generator(np.random.SFC64(seed)).standard_normal(BLOCK, np.float32)
        self._shapes, self._on_tensor = shapes, on_tensor
        self._blocks: dict[tuple[float, float], NDArray[np.uint16]] = {}

    def __call__(self, name: str) -> Iterator[NDArray[np.uint16]]:
        """A tensor's values, by its name and the seed alone."""
        shape = self._shapes[name]
        block, left = self._scaled(*_distribution(name, shape)), math.prod(shape)
        start = zlib.crc32(name.encode()) % BLOCK
        while left:
            piece = block[start : start + left]
            yield piece
            left, start = left - len(piece), 0
        self._on_tensor(math.prod(shape))

    def _scaled(self, mean: float, std: float) -> NDArray[np.uint16]:
        key = (mean, std)
        if key not in self._blocks:
            self._blocks[key] = to_bfloat16(self._noise * np.float32(std) + np.float32(mean))
        return self._blocks[key]


def to_bfloat16(value: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of finite float32 values, rounded to nearest even."""
    bits = value.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and deviation that keep activations of order one."""
    if "norm" in name:
        tower = name.startswith("vision_tower")  # a LayerNorm's gain is its weight, an RMSNorm's 1 + weight
        return (1.0, 0.05) if tower and name.endswith("weight") else (0.0, 0.1)
    if len(shape) < 2:
        return 0.0, 0.05
    if "position_embedding" in name:
        return 0.0, 0.5
    inputs = shape[0] if "input_projection" in name else math.prod(shape[1:])
    return 0.0, inputs**-0.5


def write_files(folder: Path, spec: ChatSpec) -> None:
    """Configs, tokenizer and chat template."""
    ids = {name: value for name, value in TOKEN_IDS.items() if name in spec.config}
    write_json(folder / "config.json", {**spec.config, **ids, "torch_dtype": "bfloat16"})
    generation = {"eos_token_id": TOKEN_IDS["eos_token_id"], "bos_token_id": 2, "pad_token_id": 0}
    write_json(folder / "generation_config.json", generation)
    if spec.image is not None:
        write_json(folder / "preprocessor_config.json", _preprocessor(spec.image.size, spec.chat.image_tokens))
        write_json(folder / "processor_config.json", {"processor_class": "Gemma3Processor"})


def _preprocessor(size: int, tokens: int) -> dict[str, Any]:
    return {
        "image_processor_type": "Gemma3ImageProcessor",
        "processor_class": "Gemma3Processor",
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_pan_and_scan": None,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_seq_length": tokens,
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": size, "width": size},
    }
