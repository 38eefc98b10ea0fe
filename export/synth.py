"""Seeded random checkpoints in Hugging Face layout: everything can be tried and timed without gated weights.

Random weights prove plumbing, speed and memory, never accuracy.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np

from medge.errors import UsageError
from medge.export import synth_chat
from medge.manifest import write_json
from medge.registry import FAMILIES, find
from medge.shards import INDEX, RECIPE, Recipe, Shard, SynthSource
from medge.spec import AnySpec, ChatSpec, FloatArray, ModelSpec
from medge.staging import staged
from medge.tensorfile import ITEMSIZE, DType, Produce, chunks, layout, shard, write_chunks

SHARD_BYTES = 2_500_000_000
SIZES = ("tiny", "full")
_PREPROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "processor_class": "SiglipProcessor",
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_resize": True,
    "resample": 3,
}


def synthesize(
    model_id: str,
    size: str,
    out: Path,
    *,
    seed: int = 0,
    replace: bool = False,
    lazy: bool = False,
    on_tensor: Callable[[int], None] = lambda count: None,
) -> AnySpec:
    """Write a random checkpoint; `on_tensor(parameters)` is called after each tensor, for a progress bar.

    With `lazy`, its shards are hashed and not written: they are made when an export reads them (medge.shards).

    Raises:
        UsageError: an unknown model or size, or `out` exists.
    """
    spec = _spec(model_id, size)
    with staged(out, replace=replace) as folder:
        dtype, produce = _values(spec, seed, on_tensor)
        files = _shards(spec, dtype)
        if lazy:
            shards = {name: _described(tensors, dtype, produce) for name, tensors in files.items()}
            recipe = Recipe(source=SynthSource(model=model_id, size=size, seed=seed), shards=shards)
            write_json(folder / RECIPE, recipe.model_dump(mode="json"))
        else:
            for name, tensors in files.items():
                write_chunks(folder / name, tensors, dtype, produce)
        _write_index(folder, files, dtype)
        _write_files(folder, spec)
        (folder / "README.md").write_text(
            f"Seeded random weights in the layout of {json.dumps(spec.id)}, written by `medge synth`: no trained "
            "model.\n"
        )
    return spec


def write_shard(source: SynthSource, name: str, shard: Shard, folder: Path) -> None:
    """Write one shard of a lazy checkpoint, the very bytes that an eager one has."""
    dtype, produce = _values(_spec(source.model, source.size), source.seed, lambda count: None)
    write_chunks(folder / name, {key: tuple(value["shape"]) for key, value in shard.tensors.items()}, dtype, produce)


def parameters(model_id: str, size: str) -> int:
    """How many weights a synthetic checkpoint has."""
    return _spec(model_id, size).parameters


def _spec(model_id: str, size: str) -> AnySpec:
    model = find(model_id)
    if size not in SIZES:
        raise UsageError(f"'{size}' is no size", f"Sizes: {', '.join(SIZES)}")
    family = FAMILIES[model.model_type]
    return family.spec(family.tiny if size == "tiny" else model.config, id=f"{model_id}-{size}")


class _Normal:
    """Normal weights, each tensor from the seed and its own name: small models, a generator's whole quality."""

    def __init__(self, spec: ModelSpec, seed: int, on_tensor: Callable[[int], None]) -> None:
        self._spec, self._seed, self._on_tensor = spec, seed, on_tensor
        self._depth = int(spec.config["vision_config"]["num_hidden_layers"])

    def __call__(self, name: str) -> Iterable[FloatArray]:
        value = tensor(name, self._spec.tensors[name], self._seed, self._depth)
        yield value
        self._on_tensor(value.size)


def tensor(name: str, shape: tuple[int, ...], seed: int, depth: int) -> FloatArray:
    """One tensor, from the seed and its own name alone: the same whatever is written before it."""
    rng = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    if name in ("logit_scale", "logit_bias"):  # SigLIP's initial values: t = log 10, b = -10
        return np.full(shape, math.log(10) if name == "logit_scale" else -10.0, np.float32)
    mean, std = _distribution(name, shape, depth)
    value = rng.standard_normal(shape, np.float32)
    value *= np.float32(std)
    value += np.float32(mean)
    return value


def _distribution(name: str, shape: tuple[int, ...], depth: int) -> tuple[float, float]:
    """Mean and deviation that keep activations of order one through the whole depth, as in a trained tower."""
    if "norm" in name:
        return (1.0, 0.2) if name.endswith("weight") else (0.0, 0.1)
    if len(shape) < 2:
        return 0.0, 0.05
    if name.endswith(("_embedding.weight", "probe")) and "patch" not in name:
        return 0.0, 0.5 if "position" in name else 1.0
    gain = 1.0
    if name.endswith(("out_proj.weight", "fc2.weight")):  # residual branches shrink with depth
        gain = 2 * (2 * depth) ** -0.5
    elif name.endswith(("q_proj.weight", "k_proj.weight", "in_proj_weight")):  # attention that attends
        gain = 1.6
    return 0.0, gain * math.prod(shape[1:]) ** -0.5


_Tensors = Mapping[str, tuple[int, ...]]


def _values(spec: AnySpec, seed: int, on_tensor: Callable[[int], None]) -> tuple[DType, Produce]:
    """What a kind of model is made of, and in which type."""
    if isinstance(spec, ChatSpec):
        return "BF16", synth_chat.Noise(seed, spec.tensors, on_tensor)
    assert isinstance(spec, ModelSpec)  # noqa: S101 - there are two kinds
    return "F32", _Normal(spec, seed, on_tensor)


def _shards(spec: AnySpec, dtype: DType) -> dict[str, _Tensors]:
    """File name -> its tensors, named as the hub's are."""
    parts = list(shard(spec.tensors, SHARD_BYTES, ITEMSIZE[dtype]))
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts)}


def _described(tensors: _Tensors, dtype: DType, produce: Produce) -> Shard:
    """A shard's length, hash and header, without writing it."""
    size, digest = 0, hashlib.sha256()
    for chunk in chunks(tensors, dtype, produce):
        digest.update(chunk)
        size += memoryview(chunk).nbytes
    return Shard(bytes=size, sha256=digest.hexdigest(), tensors=layout(tensors, dtype))


def _write_index(folder: Path, files: Mapping[str, _Tensors], dtype: DType) -> None:
    if len(files) == 1:
        return
    total = sum(ITEMSIZE[dtype] * math.prod(shape) for tensors in files.values() for shape in tensors.values())
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_files(folder: Path, spec: AnySpec) -> None:
    """Configs and tokenizer."""
    if isinstance(spec, ChatSpec):
        synth_chat.write_files(folder, spec)
        _copy_tokenizer("gemma_tokenizer", folder)
        return
    assert isinstance(spec, ModelSpec)  # noqa: S101 - as above
    config: dict[str, Any] = {**spec.config, "torch_dtype": "float32"}
    write_json(folder / "config.json", config)
    size = {"height": spec.image.size, "width": spec.image.size}
    write_json(folder / "preprocessor_config.json", _PREPROCESSOR | {"size": size})
    _copy_tokenizer("siglip_tokenizer", folder)


def _copy_tokenizer(name: str, folder: Path) -> None:
    """The files of a tokenizer that ships with medge."""
    with as_file(files("medge.models") / name) as tokenizer:
        for path in sorted(tokenizer.iterdir()):
            if path.suffix in (".json", ".model", ".jinja"):
                shutil.copyfile(path, folder / path.name)
