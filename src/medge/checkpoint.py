"""A checkpoint folder in Hugging Face layout: found, accounted for, and read one tensor at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medge.errors import CorruptError, UnsupportedError, UsageError, WeightsError
from medge.manifest import sha256
from medge.registry import family, spec_of
from medge.spec import AnySpec, ChatSpec, FloatArray, ModelSpec, Weight
from medge.tensorfile import Entry, read_header

_INDEX = "model.safetensors.index.json"


class Checkpoint:
    """Weights that are proven complete before anyone reads them: every tensor there, none surplus, all shaped."""

    def __init__(self, root: Path, any_spec: AnySpec, entries: Mapping[str, Entry]) -> None:
        self.root = root
        self.any_spec = any_spec
        """Its shape, of whichever kind; `spec` and `chat_spec` are for who needs one kind."""
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
        config = _read_json(root / "config.json")
        spec, built = spec_of(config, root.resolve().name), family(str(config["model_type"]))
        found = (entry for path in _shards(root) for entry in read_header(path).items())
        named = ((built.canonical(name), entry) for name, entry in found)
        entries = {name: entry for name, entry in named if name not in built.tied}
        _account(root, spec, entries)
        return cls(root, spec, entries)

    @property
    def spec(self) -> ModelSpec:
        """The dual encoder that it is.

        Raises:
            UnsupportedError: it is none.
        """
        if not isinstance(self.any_spec, ModelSpec):
            raise UnsupportedError(f"{self.root} is a chat model", "This needs a dual encoder, such as MedSigLIP")
        return self.any_spec

    @property
    def chat_spec(self) -> ChatSpec:
        """The chat model that it is.

        Raises:
            UnsupportedError: it is none.
        """
        if not isinstance(self.any_spec, ChatSpec):
            raise UnsupportedError(f"{self.root} is no chat model", "This needs one, such as MedGemma")
        return self.any_spec

    def read(self, name: str) -> FloatArray:
        """One tensor as float32.

        Raises:
            CorruptError: it holds NaN or infinity.
        """
        value = self._finite(name, self.entries[name].read())
        self._sound.add(name)
        return value

    def raw_rows(self, name: str, step: int) -> Iterator[NDArray[Any]]:
        """One matrix, `step` rows at a time: some are larger than the memory that an export may take.

        float32, or the bits of bfloat16 as uint16. Whoever quantizes them refuses what is not finite.
        """
        entry = self.entries[name]
        for start in range(0, entry.shape[0], step):
            yield entry.raw_rows(start, min(start + step, entry.shape[0]))
        self._sound.add(name)

    def _finite(self, name: str, value: FloatArray) -> FloatArray:
        # A sum is finite only if every addend is, and needs no temporary of the tensor's size.
        with np.errstate(over="ignore", invalid="ignore"):
            finite = np.isfinite(value.sum(dtype=np.float64))
        if not finite:
            raise CorruptError(f"'{name}' in {self.entries[name].path} holds NaN or infinity", "Use a sound checkpoint")
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


def _account(root: Path, spec: AnySpec, entries: Mapping[str, Entry]) -> None:
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
