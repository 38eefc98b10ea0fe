"""A checkpoint folder in Hugging Face layout: found, accounted for, and read one tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medge.errors import CorruptError, UnsupportedError, WeightsError
from medge.registry import family, spec_of
from medge.shards import Resident, Shards, Supply, read_json, shards_of
from medge.spec import AnySpec, ChatSpec, FloatArray, ModelSpec, Weight
from medge.tensorfile import Entry


class Checkpoint:
    """Weights that are proven complete before anyone reads them: every tensor there, none surplus, all shaped."""

    def __init__(
        self, root: Path, any_spec: AnySpec, entries: Mapping[str, Entry], shards: Shards | None = None
    ) -> None:
        self.root = root
        self.any_spec = any_spec
        """Its shape, of whichever kind; `spec` and `chat_spec` are for who needs one kind."""
        self.entries = entries
        self.seen: set[str] = set()
        """Tensors that were read, and found finite by their reader."""
        self._shards: Shards = shards or Resident()
        self._left: dict[Path, set[str]] = {}
        """Of each shard, what nobody is done with."""
        for name in entries:
            self._left.setdefault(entries[name].path, set()).add(name)

    @classmethod
    def open(cls, root: str | Path, supply: Supply | None = None) -> Checkpoint:
        """Read config.json and the headers of all shards; no weights yet. `supply` brings shards that come and go.

        Raises:
            UsageError: no checkpoint there, or one whose shards come and go, without `supply`.
            WeightsError: a shard or a tensor is missing.
            CorruptError: truncated, surplus, misshapen, or an invalid config.
        """
        root = Path(root)
        config = read_json(root / "config.json")
        spec, built = spec_of(config, root.resolve().name), family(str(config["model_type"]))
        shards = shards_of(root, supply)
        named = ((built.canonical(name), entry) for name, entry in shards.entries())
        entries = {name: entry for name, entry in named if name not in built.tied}
        _account(root, spec, entries)
        return cls(root, spec, entries, shards)

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
        value = self._finite(name, self._at_hand(name).read())
        self.done_with(name)
        return value

    def raw_rows(self, name: str, step: int) -> Iterator[NDArray[Any]]:
        """One matrix, `step` rows at a time: some are larger than the memory that an export may take.

        float32, or the bits of bfloat16 as uint16. Whoever quantizes them refuses what is not finite.
        """
        count = self.entries[name].shape[0]
        for start in range(0, count, step):
            yield self._at_hand(name).raw_rows(start, min(start + step, count))
        self.done_with(name)

    def done_with(self, name: str) -> None:
        """Nobody reads the tensor again: its reader, or an unfinished run before, has all of it."""
        self.seen.add(name)
        path = self.entries[name].path
        self._left[path].discard(name)
        if not self._left[path]:
            self._shards.release(path)

    def by_shard(self, names: Iterable[str]) -> list[str]:
        """Names in the order that reads one shard after the other: a layer may begin in one and end in the next."""
        return sorted(names, key=lambda name: self.entries[name].path)

    def _at_hand(self, name: str) -> Entry:
        entry = self.entries[name]
        if not self._left[entry.path]:  # its shard went: all of it may be read once more
            self._left[entry.path] = {other for other, found in self.entries.items() if found.path == entry.path}
        self._shards.need(entry.path)
        return entry

    def _finite(self, name: str, value: FloatArray) -> FloatArray:
        # A sum is finite only if every addend is, and needs no temporary of the tensor's size.
        with np.errstate(over="ignore", invalid="ignore"):
            finite = np.isfinite(value.sum(dtype=np.float64))
        if not finite:
            raise CorruptError(f"'{name}' in {self.entries[name].path} holds NaN or infinity", "Use a sound checkpoint")
        return value

    def check_unread(self) -> None:
        """Read what nobody has asked for (a folded bias, say): its NaN would otherwise pass unnoticed.

        Then let all shards go: one that was read twice, and in part, would stay.
        """
        for name in self.entries:
            if name not in self.seen:
                self.read(name)
        for path in self._left:
            self._shards.release(path)

    def weight(self, name: str) -> Weight:
        """One tensor, unread; what architectures are built from."""
        return Weight(name, lambda: self.read(name), lambda step: self.raw_rows(name, step))

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

    def chat_template(self) -> str:
        """The chat template: a file of its own or, in older checkpoints, a field of another.

        Raises:
            WeightsError: there is none.
            CorruptError: the file that should hold it is no JSON.
        """
        name = self.chat_spec.chat.template
        if (self.root / name).is_file():
            return (self.root / name).read_text(encoding="utf-8")
        for other in ("chat_template.json", "tokenizer_config.json"):
            found = read_json(self.root / other).get("chat_template") if (self.root / other).is_file() else None
            if isinstance(found, str):
                return found
        raise WeightsError(f"{self.root} has no chat template", f"Copy {name} from the model's page")

    @cached_property
    def sha256(self) -> str:
        """Identity of the weights: the hash of the shards' hashes, in name order."""
        return hashlib.sha256("".join(self._shards.sha256(path) for path in sorted(self._left)).encode()).hexdigest()

    @property
    def stamp(self) -> str:
        """Tells these weights from changed ones without reading them: an export that was cut goes on at once."""
        return "".join(self._shards.stamp(path) for path in sorted(self._left))


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
