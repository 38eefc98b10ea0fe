"""The importance matrix of a chat model's export: collected here, or read from a file of llama.cpp's.

Collecting costs a forward pass over the calibration set (calibration.py). It is done once: the matrix is kept in the
user's cache under the hashes of weights and calibration set, as a file that llama-quantize takes as well.

Like llama-imatrix, it has an entry for every linear layer and none for the embedding table, though Gemma 3 also uses
that as its output matrix: an error there is met twice, as output and as input, and by the output's importance alone
the answers came out no better (docs/schemes.md).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import Any

from medge.errors import MedgeError, UsageError, require
from medge.export import calibration
from medge.export.calibration import CHUNK, Calibration
from medge.export.gguf_chat import WITHOUT_IMPORTANCE, is_vision, names, type_of
from medge.export.layer_stream import forward, steps
from medge.export.request import Request
from medge.manifest import sha256
from medge.quantize.importance import ImportanceMatrix
from medge.quantize.scheme import Scheme
from medge.runtimes.torch_generator import FP32_PARAMETERS
from medge.spec import AnySpec


def check(request: Request, scheme: Scheme) -> None:
    """Find what is missing or wrong before minutes of work, not after.

    Raises:
        UsageError: a calibration set without `importance=collect` or one that cannot be read, a scheme that rounds
            nothing by importance, or a file of another model.
        CorruptError: the file is no importance matrix.
        MissingExtraError: collecting needs torch.
    """
    choice = request.settings.get("importance", "off")
    if "calibration" in request.settings and choice != "collect":
        raise UsageError(
            "Chat models are calibrated for an importance matrix, and none is collected", "Add --set importance=collect"
        )
    if choice == "off":
        return
    if all(type_of(rule) in WITHOUT_IMPORTANCE for rule in scheme.rules):
        raise UsageError(f"Scheme '{scheme.name}' rounds nothing by importance", "Use int4-k, or leave importance out")
    if choice == "collect":
        require("torch", "export")
        _calibration(request)
    else:
        _given(request, Path(choice))


def gather(request: Request, work: Path) -> ImportanceMatrix | None:
    """The matrix that the request asks for: from its file, from the cache, or collected now; None if for none."""
    choice = request.settings.get("importance", "off")
    if choice == "off":
        return None
    return _collected(request, work) if choice == "collect" else _given(request, Path(choice))


def _calibration(request: Request) -> Calibration:
    path = request.settings.get("calibration")
    return calibration.load(request.checkpoint, Path(path) if path else None)


def _given(request: Request, path: Path) -> ImportanceMatrix:
    """A file's matrix, which fits the model."""
    matrix = ImportanceMatrix.load(path)
    _check_fit(path, matrix, request.checkpoint.any_spec)
    sources = ", ".join(PureWindowsPath(source).name for source in matrix.dataset.split(", "))
    size = f"{matrix.chunks} chunks of {matrix.chunk_size} tokens"
    matrix.dataset = f"a file's, of '{sources}': {size}, sha256 {sha256(path)[:16]}"
    return matrix


def _check_fit(path: Path, matrix: ImportanceMatrix, spec: AnySpec) -> None:
    widths = {}
    for tensor, shape in spec.tensors.items():
        if len(shape) == 2:
            widths[names(spec, vision=is_vision(tensor))(tensor)] = shape[-1]
    lacking = next((name for name in widths if name.startswith("blk.") and name not in matrix.sums), None)
    wrong = f"{path} has no importance of '{lacking}'" if lacking else None
    for name, sums in matrix.sums.items():
        if len(sums) != widths.get(name):
            its = f"{widths[name]} columns" if name in widths else "no such tensor"
            wrong = f"{path} has {len(sums)} columns for '{name}', and {spec.id} has {its}"
    if wrong:
        raise UsageError(wrong, "Use a matrix of this very model, or --set importance=collect")


def _collected(request: Request, work: Path) -> ImportanceMatrix:
    """From the cache or, the first time, by a pass through the model."""
    import platformdirs

    found = _calibration(request)
    folder = platformdirs.user_cache_path("medge") / "importance"
    path = folder / f"{request.checkpoint.sha256[:32]}-{found.digest[:32]}.gguf"
    with suppress(MedgeError):  # absent or damaged: a cache may be either
        return ImportanceMatrix.load(path)
    own = work / "importance.gguf"
    collect(request, found).save(own)
    with suppress(OSError):  # a full disk or a read-only home costs time at the next export, and nothing now
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        shutil.copyfile(own, part)
        part.replace(path)
    return ImportanceMatrix.load(own)  # float32, as a later export will read it


def collect(request: Request, found: Calibration) -> ImportanceMatrix:
    """Read the calibration set with the checkpoint, fp32 up to FP32_PARAMETERS weights and bf16 above."""
    checkpoint = request.checkpoint
    spec = checkpoint.chat_spec
    matrix = ImportanceMatrix(found.description, CHUNK)
    rename = {vision: names(spec, vision=vision) for vision in (False, True) if spec.image or not vision}
    dtype = "fp32" if spec.parameters <= FP32_PARAMETERS else "bf16"
    advance = request.counter("collect importance", steps(checkpoint, found.prompts))
    forward(checkpoint, found.prompts, dtype, partial(_add, matrix, rename), advance)
    return matrix


def _add(matrix: ImportanceMatrix, rename: dict[bool, Callable[[str], str]], tensor: str, x: Any) -> None:
    rows = x.flatten(0, -2).float()
    matrix.add_squares(rename[is_vision(tensor)](tensor), rows.square().sum(0).double().numpy(), len(rows))
