"""A checkpoint folder in Hugging Face layout: found, accounted for, and read one tensor at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from medge.errors import CorruptError, UsageError, WeightsError
from medge.manifest import sha256
from medge.registry import spec_of
from medge.spec import FloatArray, ModelSpec, Weight
from medge.tensorfile import Entry, read_header

_INDEX = "model.safetensors.index.json"


class Checkpoint:
    """Weights that are proven complete before anyone reads them: every tensor there, none surplus, all shaped."""

    def __init__(self, root: Path, spec: ModelSpec, entries: Mapping[str, Entry]) -> None:
        self.root = root
        self.spec = spec
        self.entries = entries
        self._sound: set[str] = set()

    @classmethod
    def open(cls, root: str | Path) -> Checkpoint:
        """Read config.json and the headers of all shards; no weights yet.

        Raises:
            UsageError: no checkpoint there.
            WeightsError: a shard or a tensor is missing.
            CorruptError: truncated, surplus, misshapen, or an invalid config.
        """
        root = Path(root)
        spec = spec_of(_read_json(root / "config.json"), root.resolve().name)
        entries = {name: entry for path in _shards(root) for name, entry in read_header(path).items()}
        _account(root, spec, entries)
        return cls(root, spec, entries)

    def read(self, name: str) -> FloatArray:
        """One tensor as float32.

        Raises:
            CorruptError: it holds NaN or infinity.
        """
        value = self.entries[name].read()
        # A sum is finite only if every addend is, and needs no temporary of the tensor's size.
        with np.errstate(over="ignore", invalid="ignore"):
            finite = np.isfinite(value.sum(dtype=np.float64))
        if not finite:
            raise CorruptError(f"'{name}' in {self.entries[name].path} holds NaN or infinity", "Use a sound checkpoint")
        self._sound.add(name)
        return value

    def check_unread(self) -> None:
        """Read what nobody has asked for (a folded bias, say): its NaN would otherwise pass unnoticed."""
        for name in self.entries:
            if name not in self._sound:
                self.read(name)

    def weight(self, name: str) -> Weight:
        """One tensor, unread; what architectures are built from."""
        return Weight(name, lambda: self.read(name))

    def scalars(self) -> dict[str, float]:
        """What scoring needs beside the embeddings."""
        return {key: float(self.read(name).ravel()[0]) for key, name in self.spec.scalars.items()}

    def tokenizer_file(self) -> Path:
        """The SentencePiece file.

        Raises:
            WeightsError: it is missing.
        """
        path = self.root / self.spec.tokenizer.file
        if not path.is_file():
            raise WeightsError(f"{path} is missing", "Copy it from the model's page beside the weights")
        return path

    @cached_property
    def sha256(self) -> str:
        """Identity of the weights: the hash of the shards' hashes, in name order."""
        paths = sorted({entry.path for entry in self.entries.values()})
        return hashlib.sha256("".join(sha256(path) for path in paths).encode()).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path.parent} is no checkpoint: it has no {path.name}") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path} is no JSON: {error}", "Download it again") from None
    if not isinstance(value, dict):
        raise CorruptError(f"{path} holds no JSON object", "Download it again")
    return value


def _shards(root: Path) -> Iterable[Path]:
    index = root / _INDEX
    names = ["model.safetensors"]
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    for name in names:
        path = root / name
        if Path(name).name != name:
            raise CorruptError(f"{index} points outside its folder: '{name}'", "Download it again")
        if not path.is_file():
            raise WeightsError(f"{path} is missing", "Download the whole checkpoint: medge fetch MODEL")
        yield path


def _account(root: Path, spec: ModelSpec, entries: Mapping[str, Entry]) -> None:
    missing = [name for name in spec.tensors if name not in entries]
    surplus = [name for name in entries if name not in spec.tensors]
    if missing:
        raise WeightsError(f"{root} lacks {_some(missing)}", "Download the whole checkpoint")
    if surplus:
        raise CorruptError(f"{root} holds {_some(surplus)}, which {spec.id} has not", "Is config.json its own?")
    for name, shape in spec.tensors.items():
        if entries[name].shape != shape:
            raise CorruptError(
                f"'{name}' has shape {entries[name].shape}, config.json says {shape}",
                "Is config.json its own?",
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"'{names[0]}'{more}"
