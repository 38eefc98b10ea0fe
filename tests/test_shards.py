"""Shards that come when they are read and go when they have been: the same weights, and never more than two files."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medge.checkpoint import Checkpoint
from medge.errors import CorruptError, MedgeError, UsageError
from medge.export import synth
from medge.export.synth import synthesize
from medge.manifest import sha256
from medge.shards import AT_ONCE, RECIPE, HubSource, Recipe, Shard, Source
from medge.tensorfile import read_header

SOURCE = HubSource(hub_id="some/model", revision="0" * 40)


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny MedSigLIP in several shards."""
    root = tmp_path_factory.mktemp("eager") / "checkpoint"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synth, "SHARD_BYTES", 400_000)
        synthesize("medsiglip-448", "tiny", root)
    assert len(shards(root)) > 4
    return root


def shards(root: Path) -> list[Path]:
    return sorted(root.rglob("*.safetensors"))


def describe(path: Path) -> Shard:
    header = read_header(path)
    base = min(entry.start for entry in header.values())
    end = {name: entry.start - base + entry.read().size * 4 for name, entry in header.items()}
    tensors = {
        name: {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [entry.start - base, end[name]]}
        for name, entry in header.items()
    }
    return Shard(bytes=path.stat().st_size, sha256=sha256(path), tensors=tensors)


class Store:
    """A place that shards come from, and what was asked of it."""

    def __init__(self, eager: Path, root: Path) -> None:
        self.eager, self.root = eager, root
        self.asked: list[str] = []
        self.peak = 0
        root.mkdir()
        for path in eager.iterdir():
            if path.suffix != ".safetensors":
                shutil.copyfile(path, root / path.name)
        recipe = Recipe(source=SOURCE, shards={path.name: describe(path) for path in shards(eager)})
        (root / RECIPE).write_text(recipe.model_dump_json())

    def __call__(self, source: Source, name: str, shard: Shard, folder: Path) -> None:
        assert source == SOURCE
        self.asked.append(name)
        shutil.copyfile(self.eager / name, folder / name)
        self.peak = max(self.peak, len(shards(self.root)))

    def open(self) -> Checkpoint:
        return Checkpoint.open(self.root, self)


@pytest.fixture
def store(eager: Path, tmp_path: Path) -> Store:
    return Store(eager, tmp_path / "lazy")


def test_the_same_weights_and_the_same_identity(eager: Path, store: Store) -> None:
    lazy, whole = store.open(), Checkpoint.open(eager)
    assert lazy.sha256 == whole.sha256
    assert store.asked == []  # neither opening nor the identity takes a weight
    for name in whole.spec.tensors:
        np.testing.assert_array_equal(lazy.read(name), whole.read(name))


def test_each_shard_comes_once_and_none_stays(eager: Path, store: Store) -> None:
    lazy = store.open()
    for name in lazy.spec.tensors:
        lazy.read(name)
    lazy.check_unread()
    assert store.asked == [path.name for path in shards(eager)]
    assert store.peak == 1
    assert not shards(store.root)
    assert not (store.root / ".incoming").exists()


def test_a_shard_with_another_s_tensors_waits_for_them(eager: Path, store: Store) -> None:
    lazy = store.open()
    held, *rest = lazy.spec.tensors
    for name in rest:
        lazy.read(name)
    lazy.read(held)
    assert sorted(store.asked) == [path.name for path in shards(eager)]
    assert store.peak == AT_ONCE
    assert not shards(store.root)


def test_whatever_the_order_there_are_no_more_than_two(eager: Path, store: Store) -> None:
    lazy, whole = store.open(), Checkpoint.open(eager)
    names = list(lazy.spec.tensors)
    np.random.default_rng(0).shuffle(names)
    for name in names[:40]:
        np.testing.assert_array_equal(lazy.read(name), whole.read(name))
    assert store.peak == AT_ONCE
    assert len(store.asked) > len(shards(eager))  # the price


def test_names_in_the_order_of_the_shards_bring_each_once(eager: Path, store: Store) -> None:
    lazy = store.open()
    names = list(lazy.spec.tensors)
    np.random.default_rng(0).shuffle(names)
    for name in lazy.by_shard(names):
        lazy.read(name)
    assert store.asked == [path.name for path in shards(eager)]


def test_what_was_read_can_be_read_again(eager: Path, store: Store) -> None:
    lazy, whole = store.open(), Checkpoint.open(eager)
    for _ in range(2):
        for name in whole.spec.tensors:
            np.testing.assert_array_equal(lazy.read(name), whole.read(name))
    assert store.asked == 2 * [path.name for path in shards(eager)]


def test_at_the_end_none_stays_that_was_read_again_in_part(store: Store) -> None:
    lazy = store.open()
    lazy.check_unread()
    asked = list(store.asked)
    lazy.read(next(iter(lazy.spec.tensors)))
    assert shards(store.root)
    lazy.check_unread()
    assert not shards(store.root)
    assert store.asked == [*asked, asked[0]]


def test_rows_survive_that_their_shard_goes_between_them(eager: Path, store: Store) -> None:
    lazy, whole = store.open(), Checkpoint.open(eager)
    firsts = {entry.path: name for name, entry in lazy.entries.items() if len(entry.shape) == 2}
    (_, name), *others = firsts.items()
    parts = []
    for rows in lazy.raw_rows(name, 1 + lazy.entries[name].shape[0] // 3):
        parts.append(rows)
        for _, other in others[:3]:
            lazy.read(other)
    np.testing.assert_array_equal(np.concatenate(parts), whole.read(name))


def test_a_new_run_takes_what_the_one_before_left(eager: Path, store: Store) -> None:
    first = store.open()
    first.read(next(iter(first.spec.tensors)))
    (left,) = shards(store.root)
    second = store.open()
    for name in second.spec.tensors:
        second.read(name)
    assert store.asked.count(left.name) == 1


def test_what_an_earlier_run_has_taken_is_not_fetched(eager: Path, store: Store) -> None:
    lazy = store.open()
    first, *rest = [path.name for path in shards(eager)]
    for name, entry in lazy.entries.items():
        if entry.path.name == first:
            lazy.done_with(name)
    lazy.check_unread()
    assert store.asked == rest


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])])
def test_a_damaged_leftover_is_brought_again(damage: Callable[[bytes], bytes], eager: Path, store: Store) -> None:
    path = store.root / shards(eager)[0].name
    path.write_bytes(damage((eager / path.name).read_bytes()))
    name = next(name for name, entry in Checkpoint.open(eager).entries.items() if entry.path.name == path.name)
    np.testing.assert_array_equal(store.open().read(name), Checkpoint.open(eager).read(name))
    assert store.asked == [path.name]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], r"model-00001.*arrived with \d+ bytes instead of \d+"),
        (lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), r"model-00001.*arrived altered: its sha256"),
    ],
)
def test_what_arrives_damaged_is_refused(
    damage: Callable[[bytes], bytes], message: str, eager: Path, store: Store
) -> None:
    def broken(source: Source, name: str, shard: Shard, folder: Path) -> None:
        (folder / name).write_bytes(damage((eager / name).read_bytes()))

    lazy = Checkpoint.open(store.root, broken)
    with pytest.raises(CorruptError, match=message):
        lazy.read(next(iter(lazy.spec.tensors)))
    assert not shards(store.root)


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, r"The disk is full: .*00003.* needs 0\.0 GB"), (errno.EIO, "cannot be writ")]
)
def test_a_full_disk_in_shard_3_loses_nothing(number: int, message: str, eager: Path, store: Store) -> None:
    def full(source: Source, name: str, shard: Shard, folder: Path) -> None:
        if "00003" in name:
            (folder / name).write_bytes(b"half")
            raise OSError(number, "the system's words")
        store(source, name, shard, folder)

    with pytest.raises(UsageError, match=message) as caught:
        Checkpoint.open(store.root, full).check_unread()
    assert "it resumes" in caught.value.remedy
    assert not shards(store.root)


def test_without_a_supply_it_says_what_reads_it(store: Store) -> None:
    with pytest.raises(UsageError, match=r"holds no weights.*Only medge export"):
        Checkpoint.open(store.root)


def test_a_shard_that_goes_while_it_is_read_is_told(store: Store) -> None:
    lazy = store.open()
    first, second, *_ = lazy.spec.tensors
    lazy.read(first)
    shards(store.root)[0].unlink()  # another export of the same folder
    with pytest.raises(CorruptError, match="went away while it was read"):
        lazy.read(second)


def edit(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    recipe = json.loads((root / RECIPE).read_text())
    change(recipe)
    (root / RECIPE).write_text(json.dumps(recipe))


def first_tensor(recipe: dict[str, Any]) -> Any:
    return next(iter(next(iter(recipe["shards"].values()))["tensors"].values()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda r: r.pop("source"), r"shards\.json is invalid at 'source'", id="no source"),
        pytest.param(lambda r: r["source"].update(kind="ftp"), "'source'.*'ftp'", id="another kind"),
        pytest.param(lambda r: r.update(schema_version=2), "schema_version", id="newer"),
        pytest.param(lambda r: r["shards"].update({"../x.safetensors": {}}), "no weight file", id="outside"),
        pytest.param(lambda r: r["shards"].popitem(), "lacks", id="a shard too few"),
        pytest.param(lambda r: first_tensor(r).pop("data_offsets"), "header of .* is malformed", id="no offsets"),
        pytest.param(lambda r: first_tensor(r).update(shape=[1, 2, 3]), "contradict its shape", id="another shape"),
        pytest.param(lambda r: first_tensor(r).update(dtype="I8"), "has dtype I8", id="no float"),
    ],
)
def test_what_is_wrong_with_the_recipe_is_named(
    change: Callable[[dict[str, Any]], object], message: str, store: Store
) -> None:
    edit(store.root, change)
    with pytest.raises(MedgeError, match=message) as caught:
        store.open()
    assert "\n" not in str(caught.value)
    assert not store.asked
