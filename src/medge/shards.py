"""A checkpoint's weight files: all there, or each there only while it is read.

54 GB of weights need not lie on the disk at once. A folder with shards.json holds everything of a checkpoint but its
weights, and names for each shard where it comes from (the hub, or a generator of random weights), how long it is, its
sha256 and its header. A shard arrives when its first tensor is read and goes when its last one has been.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, Field, ValidationError

from medge.errors import CorruptError, UsageError, WeightsError
from medge.manifest import Sha256, sha256
from medge.spec import Frozen
from medge.staging import stamp
from medge.tensorfile import Entry, entries, read_header

RECIPE = "shards.json"
AT_ONCE = 2
"""Shards on the disk at most: one that is read, and one whose last tensors are another part's."""
INDEX = "model.safetensors.index.json"
_INCOMING = ".incoming"
"""Where a shard arrives: in its place it is whole and checked."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint.

    Raises:
        UsageError: absent, or it cannot be read.
        CorruptError: no JSON, or no object.
    """
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


def shard_names(root: Path) -> list[str]:
    """The weight files that a checkpoint folder must have.

    Raises:
        CorruptError: the index is none, or leads out of the folder.
    """
    index = root / INDEX
    if not index.is_file():
        return ["model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    for name in names:
        if Path(name).name != name:
            raise CorruptError(f"{index} points outside its folder: '{name}'", "Download it again")
    return names


class Shards(Protocol):
    """A checkpoint's weight files."""

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Every tensor and where it lies, or will lie."""
        ...

    def need(self, path: Path) -> None:
        """Called before a shard is read."""
        ...

    def release(self, path: Path) -> None:
        """Called when all of a shard has been read."""
        ...

    def sha256(self, path: Path) -> str:
        """Hex digest of a shard."""
        ...

    def stamp(self, path: Path) -> str:
        """Tells a shard from a changed one without reading it."""
        ...


class Resident:
    """Shards that are there and stay.

    Raises:
        WeightsError: one is missing.
    """

    def __init__(self, paths: Sequence[Path] = ()) -> None:
        self._paths = paths
        for path in paths:
            if not path.is_file():
                raise WeightsError(f"{path} is missing", "Download the whole checkpoint: medge fetch MODEL")

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """From the files' headers."""
        for path in self._paths:
            yield from read_header(path).items()

    def need(self, path: Path) -> None:
        """It is there."""

    def release(self, path: Path) -> None:
        """It stays."""

    def sha256(self, path: Path) -> str:
        """Of the file."""
        return sha256(path)

    def stamp(self, path: Path) -> str:
        """Of the file."""
        return stamp([path])


class SynthSource(Frozen):
    """Shards of seeded random weights (export/synth.py)."""

    kind: Literal["synth"] = "synth"
    model: str
    size: str
    seed: int


class HubSource(Frozen):
    """Shards of a repository on the hub."""

    kind: Literal["hub"] = "hub"
    hub_id: str
    revision: str
    """A commit, so that all shards are of one version."""


Source = SynthSource | HubSource


class Shard(Frozen):
    """One weight file that is not there yet."""

    bytes: int = Field(gt=0)
    sha256: Sha256
    tensors: dict[str, dict[str, Any]]
    """Its safetensors header, without the metadata."""


def _plain(name: str) -> str:
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise ValueError(f"'{name}' is no weight file of this folder")
    return name


class Recipe(Frozen):
    """shards.json."""

    schema_version: Literal[1] = 1
    source: Annotated[Source, Field(discriminator="kind")]
    shards: dict[Annotated[str, AfterValidator(_plain)], Shard]


Supply = Callable[[Source, str, Shard, Path], None]
"""supply(source, name, shard, folder): write the shard to folder/name. Nobody else needs to know how."""


def shards_of(root: Path, supply: Supply | None) -> Shards:
    """The weight files of a checkpoint folder, of whichever kind.

    Raises:
        UsageError: they come when they are read, and nobody here brings them.
        WeightsError: one is missing that should be there.
        CorruptError: the index or the recipe is invalid.
    """
    path = root / RECIPE
    if not path.is_file():
        return Resident([root / name for name in shard_names(root)])
    if supply is None:
        raise UsageError(f"{root} holds no weights: an export brings them shard by shard", "Only medge export reads it")
    try:
        return Streamed(root, Recipe.model_validate(read_json(path)), supply)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CorruptError(f"{path} is invalid at '{where}': {first['msg']}", "Write the folder again") from None


class Streamed:
    """Shards that come when they are read and go when they have been. One export a folder at a time."""

    def __init__(self, root: Path, recipe: Recipe, supply: Supply) -> None:
        self._root, self._source, self._supply = root, recipe.source, supply
        self._shards = {root / name: shard for name, shard in recipe.shards.items()}
        self._here = [path for path in self._shards if path.is_file()]
        """On the disk, the least recently read first: an earlier run may have left some."""
        self._sound: set[Path] = set()

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """From the recorded headers."""
        for path, shard in self._shards.items():
            yield from entries(path, shard.tensors, shard.bytes).items()

    def need(self, path: Path) -> None:
        """Bring the shard unless it is here; others go first if there would be more than AT_ONCE.

        Raises:
            UsageError: the disk is full.
            CorruptError: what came is not what was recorded.
            WeightsError: the hub refuses it.
        """
        if path not in self._sound:
            if not path.is_file() or _flaw(path, self._shards[path]):
                self._make_room(path)
                self._bring(path)
            self._sound.add(path)
        self._here = [*(other for other in self._here if other != path), path]

    def release(self, path: Path) -> None:
        """Delete the shard."""
        path.unlink(missing_ok=True)
        self._here = [other for other in self._here if other != path]
        self._sound.discard(path)

    def sha256(self, path: Path) -> str:
        """As recorded; what arrives is held to it."""
        return self._shards[path].sha256

    def stamp(self, path: Path) -> str:
        """What is recorded, too."""
        return self.sha256(path)

    def _make_room(self, path: Path) -> None:
        others = [other for other in self._here if other != path]
        for other in others[: max(0, len(others) + 1 - AT_ONCE)]:
            self.release(other)

    def _bring(self, path: Path) -> None:
        shard, incoming = self._shards[path], self._root / _INCOMING
        incoming.mkdir(exist_ok=True)
        arrived = incoming / path.name
        try:
            self._supply(self._source, path.name, shard, incoming)
        except OSError as error:
            arrived.unlink(missing_ok=True)
            raise _refused(path, shard, error) from error
        flaw = _flaw(arrived, shard)
        if flaw:
            arrived.unlink(missing_ok=True)
            raise CorruptError(f"{path.name} arrived {flaw}", "Run the same command; if it stays so, write the folder "
                               f"{self._root} again")  # fmt: skip
        arrived.replace(path)
        shutil.rmtree(incoming)


def _refused(path: Path, shard: Shard, error: OSError) -> UsageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UsageError(
            f"The disk is full: {path} needs {shard.bytes / 1e9:.1f} GB",
            "Free some space. Then run the same command: it resumes",
        )
    return UsageError(f"{path} cannot be written: {error.strerror or error}", "Then run the same command: it resumes")


def _flaw(path: Path, shard: Shard) -> str:
    """What is wrong with a shard; empty if nothing is."""
    size = path.stat().st_size
    if size != shard.bytes:
        return f"with {size} bytes instead of {shard.bytes}"
    return "" if sha256(path) == shard.sha256 else "altered: its sha256 is not the recorded one"
