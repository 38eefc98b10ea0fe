"""Labelled images on disk: a folder per class, or a CSV of paths and labels.

DIR/chest_x-ray/a.png        the class is the folder's name, underscores read as spaces
DIR/skin/b.dcm

path,label                   paths are relative to the CSV; several labels of an image: edema|effusion
path,edema,effusion          or one 0/1 column a label (all zeros is an image without findings)
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medge.errors import UsageError
from medge.manifest import sha256

IMAGES = frozenset(
    {".png", ".jpg", ".jpeg", ".jp2", ".j2k", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".dcm", ".dicom"}
)
NOT_IMAGES = frozenset({".md", ".txt", ".json", ".csv", ".tsv", ".toml", ".yaml", ".yml", ".html", ".pdf"})
"""Skipped in a folder. Any other file is an error: a gate that drops data in silence measures other data."""
_NAMES_SKIPPED = frozenset({"LICENSE", "LICENCE", "NOTICE", "Thumbs.db"})


@dataclass(frozen=True)
class Item:
    """One image: where it is, what it is called in reports, and its labels (none: no finding)."""

    path: Path
    name: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Dataset:
    """Labelled images in a fixed order."""

    root: Path
    items: tuple[Item, ...]
    labels: tuple[str, ...]

    @cached_property
    def targets(self) -> NDArray[np.bool_]:
        """(images, labels): whether the image has the label."""
        return np.array([[label in item.labels for label in self.labels] for item in self.items], dtype=bool)

    @property
    def multilabel(self) -> bool:
        """Whether some image has no label, or several."""
        return any(len(item.labels) != 1 for item in self.items)

    @cached_property
    def digest(self) -> str:
        """sha256 over the images' bytes and labels, in order. Where the folder lies does not matter."""
        lines = [f"{sha256(item.path)} {'|'.join(item.labels)}" for item in self.items]
        return hashlib.sha256("\n".join([*self.labels, "", *lines]).encode()).hexdigest()

    def first(self, count: int) -> Dataset:
        """`count` images or all, the labels taken in turn, so that a small part still shows each of them."""
        queues = [[item for item in self.items if item.labels[:1] == head] for head in self._heads()]
        turns = (item for turn in zip_longest(*queues) for item in turn if item is not None)
        chosen = sorted(islice(turns, count), key=self.items.index)
        return Dataset(self.root, tuple(chosen), tuple(sorted({label for item in chosen for label in item.labels})))

    def _heads(self) -> list[tuple[str, ...]]:
        return list(dict.fromkeys(item.labels[:1] for item in self.items))


def load_dataset(path: str | Path) -> Dataset:
    """Read a dataset's files and labels; no pixels yet.

    Raises:
        UsageError: nothing there, no image, one missing or repeated, a malformed row, or fewer than 2 labels.
    """
    path = Path(path)
    if path.is_dir():
        items = _from_folders(path)
    elif path.suffix.lower() == ".csv" and path.is_file():
        items = _from_csv(path)
    else:
        raise UsageError(f"{path} is neither a folder nor a CSV", "Pass a folder per class, or a CSV of path and label")
    labels = tuple(sorted({label for item in items for label in item.labels}))
    _check(path, items, labels)
    return Dataset(path, tuple(items), labels)


def _check(path: Path, items: list[Item], labels: tuple[str, ...]) -> None:
    if not items:
        raise UsageError(f"{path} holds no images", f"Images end in {', '.join(sorted(IMAGES))}")
    if not labels:
        raise UsageError(f"{path} names no labels", "Give at least two classes")
    if len(labels) == 1:
        raise UsageError(
            f"{path} has one label only, '{labels[0]}': AUC and top-1 are undefined",
            "Give at least two classes",
        )
    first: dict[Path, str] = {}
    for item in items:
        earlier = first.setdefault(item.path.resolve(), item.name)
        if earlier is not item.name:
            raise UsageError(f"{path} lists '{item.name}' twice (first as '{earlier}')", "Keep one of them")


def _from_folders(root: Path) -> list[Item]:
    items = []
    for file in sorted(path for path in root.rglob("*") if path.is_file()):
        name = file.relative_to(root)
        if _skipped(name):
            continue
        if file.suffix.lower() not in IMAGES:
            raise UsageError(f"{file} is no image that medge reads", "Move it out of the data folder")
        if len(name.parts) == 1:
            raise UsageError(f"{file} lies in no class folder", "Put each image into a folder named as its class")
        items.append(Item(file, name.as_posix(), (name.parts[0].replace("_", " "),)))
    return items


def _skipped(name: Path) -> bool:
    hidden = any(part.startswith(".") for part in name.parts)
    return hidden or name.suffix.lower() in NOT_IMAGES or name.name in _NAMES_SKIPPED


def _from_csv(path: Path) -> list[Item]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            header = reader.fieldnames or []
            if "path" not in header:
                raise UsageError(f"{path} has no column 'path'", "Its first line must name the columns: path,label")
            if len(set(header)) != len(header):
                raise UsageError(f"{path} names a column twice", "Its first line must name each column once")
            return [_item(path, f"{path} line {reader.line_num}", row) for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no CSV in UTF-8: {error}") from None


def _item(path: Path, where: str, row: Mapping[str, str | None]) -> Item:
    if None in row or None in row.values():
        raise UsageError(f"{where} has another number of cells than the header")
    cells = {key: (value or "").strip() for key, value in row.items()}
    name = cells.pop("path")
    file = path.parent / name
    if not name or not file.is_file():
        raise UsageError(f"{where}: the image '{name}' is missing", "Paths are relative to the CSV")
    return Item(file, name, tuple(_labels(where, cells)))


def _labels(where: str, cells: Mapping[str, str]) -> Iterator[str]:
    if "label" in cells:  # other columns are the user's own: a source, a patient number
        labels = [label.strip() for label in cells["label"].split("|") if label.strip()]
        if not labels:
            raise UsageError(f"{where} has no label", "Write it in the column 'label', several separated by |")
        yield from dict.fromkeys(labels)
        return
    for column, value in cells.items():
        if value not in ("0", "1"):
            raise UsageError(
                f"{where}: column '{column}' holds '{value}'", "Without a column 'label', cells are 0 or 1"
            )
        if value == "1":
            yield column
