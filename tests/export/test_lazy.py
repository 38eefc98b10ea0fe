"""Exports of checkpoints whose shards come and go: the artifact is that of a whole checkpoint, byte by byte."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medge.checkpoint import Checkpoint
from medge.export import hub, synth
from medge.export.pipeline import export
from medge.export.request import Request
from medge.manifest import sha256, write_json
from medge.models.gemma3_graph import PROJECTOR, TOWER
from medge.quantize.scheme import load
from medge.shards import AT_ONCE, INDEX
from medge.tensorfile import read_header, shard, write_chunks

Cli = Callable[..., tuple[int, str, str]]
MODEL, HUB_ID, COMMIT = "medgemma-4b-it", "google/medgemma-4b-it", "c" * 40
SHARD_BYTES, PUBLISHED_BYTES = 600_000, 1_500_000
"""Several shards; and the image tower with the embedding table and the first layers in one, as on the hub."""
SRC = Path(__file__).parents[2] / "src"


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth, "SHARD_BYTES", SHARD_BYTES)


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("eager") / "checkpoint"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synth, "SHARD_BYTES", SHARD_BYTES)
        synth.synthesize(MODEL, "tiny", root)
    assert len(names(root)) > 5
    return root


@pytest.fixture(scope="module")
def expected(eager: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return written(eager, tmp_path_factory.mktemp("eager") / "artifact")


@pytest.fixture
def lazy(tmp_path: Path) -> Path:
    root = tmp_path / "lazy" / "checkpoint"  # a tiny model's name is its folder's
    synth.synthesize(MODEL, "tiny", root, lazy=True)
    return root


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*.safetensors"))


def written(root: Path, out: Path) -> dict[str, bytes]:
    """What an int4 export of the folder holds."""
    export(Request(hub.resolve(str(root)), "gguf", load("int4"), out))
    return content(out)


def content(out: Path) -> dict[str, bytes]:
    """Every file; of the manifest, all but the time."""
    return {path.name: re.sub(rb'"created": ".*"', b"", path.read_bytes()) for path in out.iterdir()}


class Spy:
    """Counts the shards that are made, and how many lie there at once; `before(name)` may fail."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch, before: Callable[[str], None] = lambda name: None):
        self.made: list[str] = []
        self.peak = 0
        write = synth.write_shard

        def spied(source: Any, name: str, shard: Any, folder: Path) -> None:
            before(name)
            write(source, name, shard, folder)
            self.made.append(name)
            self.peak = max(self.peak, len(names(root)))

        patch.setattr(synth, "write_shard", spied)


def test_a_lazy_folder_is_that_of_an_eager_checkpoint_but_for_the_weights(eager: Path, lazy: Path) -> None:
    assert content(lazy).keys() == content(eager).keys() - set(names(eager)) | {"shards.json"}
    for name, value in content(lazy).items():
        assert name == "shards.json" or (eager / name).read_bytes() == value, name
    assert hub.resolve(str(lazy)).sha256 == Checkpoint.open(eager).sha256


def test_the_artifact_is_the_same(
    eager: Path, lazy: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spy = Spy(lazy, monkeypatch)
    assert written(lazy, tmp_path / "out") == expected
    assert spy.made == names(eager)  # each once, in order
    assert spy.peak == 1
    assert not names(lazy)


def test_an_encoder_comes_from_a_lazy_folder_too(
    checkpoint: Path, artifact: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synth, "SHARD_BYTES", 10**9)
    lazy = tmp_path / "lazy" / "checkpoint"
    assert cli("synth", "medsiglip-448", "--lazy", "-o", lazy)[0] == 0
    settings = ("--format", "onnx", "--scheme", "fp32", "--set", "parity=off")
    assert cli("export", lazy, *settings, "-o", tmp_path / "out")[0] == 0
    assert content(tmp_path / "out") == content(artifact)


def test_a_full_disk_in_shard_3_is_one_line_and_loses_nothing(
    eager: Path, lazy: Path, expected: dict[str, bytes], tmp_path: Path, cli: Cli
) -> None:
    def full(name: str) -> None:
        if "00003" in name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    command = ("export", lazy, "--format", "gguf", "--scheme", "int4", "-o", tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        first = Spy(lazy, patch, full)
        code, out, err = cli(*command)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "The disk is full" in err
    assert "it resumes" in err
    with pytest.MonkeyPatch.context() as patch:
        second = Spy(lazy, patch)
        assert cli(*command)[0] == 0
    assert first.made + second.made == names(eager)  # nothing is made, or read, a second time
    assert content(tmp_path / "out") == expected


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("at", [3, -1])
def test_a_killed_export_goes_on_byte_by_byte(
    at: int, eager: Path, lazy: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = names(eager)[at]
    code = f"""
import os, signal, sys
from medge.export import synth
from medge.cli import main
write = synth.write_shard
def killed(source, name, shard, folder):
    if name == {name!r}:
        (folder / name).write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
    write(source, name, shard, folder)
synth.write_shard = killed
main()
"""
    options = ["export", str(lazy), "--format", "gguf", "--scheme", "int4", "-o", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(SRC)}
    command = [sys.executable, "-c", code, *options]
    killed = subprocess.run(command, capture_output=True, check=False, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out").exists()
    spy = Spy(lazy, monkeypatch)
    assert written(lazy, tmp_path / "out") == expected
    assert spy.made == names(eager)[names(eager).index(name) :]  # whole tensors that stand are not read again
    assert not names(lazy)


class FakeHub:
    """A repository with the files of a folder, behind the hub's functions that medge calls."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.downloaded: list[str] = []
        self.peak = 0
        self.client: Any = pytest.importorskip("huggingface_hub")
        self.types: Any = pytest.importorskip("huggingface_hub.hf_api")
        patch.setattr(self.client, "HfApi", lambda: self)
        patch.setattr(self.client, "snapshot_download", self.snapshot_download)
        patch.setattr(self.client, "hf_hub_download", self.hf_hub_download)

    def model_info(self, repo: str, *, revision: str, files_metadata: bool) -> Any:
        assert (repo, revision, files_metadata) == (HUB_ID, "main", True)
        siblings = [self._sibling(path) for path in self.root.iterdir()]
        return self.types.ModelInfo(
            id=repo, sha=COMMIT, siblings=siblings, private=False, downloads=0, likes=0, tags=[]
        )

    def _sibling(self, path: Path) -> dict[str, Any]:
        file: dict[str, Any] = {"rfilename": path.name, "size": path.stat().st_size}
        if path.suffix == ".safetensors":
            file["lfs"] = {"size": path.stat().st_size, "sha256": sha256(path), "pointerSize": 135}
        return file

    def parse_safetensors_file_metadata(self, repo: str, name: str, *, revision: str) -> Any:
        assert (repo, revision) == (HUB_ID, COMMIT)
        header = read_header(self.root / name)
        base = min(entry.start for entry in header.values())
        tensors = {}
        for tensor, entry in header.items():
            start, size = entry.start - base, 2 * int(np.prod(entry.shape))
            offsets = (start, start + size)
            tensors[tensor] = self.types.TensorInfo(dtype=entry.dtype, shape=list(entry.shape), data_offsets=offsets)
        return self.types.SafetensorsFileMetadata(metadata={"format": "pt"}, tensors=tensors)

    def snapshot_download(self, repo: str, *, revision: str, allow_patterns: list[str], local_dir: Path) -> str:
        assert (repo, revision) == (HUB_ID, COMMIT)
        for path in self.root.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                shutil.copyfile(path, local_dir / path.name)
        (local_dir / ".cache" / "huggingface").mkdir(parents=True)
        return str(local_dir)

    def hf_hub_download(self, repo: str, name: str, *, revision: str, local_dir: Path) -> str:
        assert (repo, revision) == (HUB_ID, COMMIT)
        shutil.copyfile(self.root / name, local_dir / name)
        self.downloaded.append(name)
        self.peak = max(self.peak, len(names(local_dir.parent)))
        return str(local_dir / name)


@pytest.fixture(scope="module")
def published(eager: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as the hub's MedGemma has them: the tower in the first shard, layers cut in their middle."""
    root = tmp_path_factory.mktemp("published") / "checkpoint"
    shutil.copytree(eager, root, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    source = Checkpoint.open(eager)
    ordered = sorted(source.any_spec.tensors, key=_module_order)
    shapes = {name: source.any_spec.tensors[name] for name in ordered}
    parts = [dict(sorted(part.items())) for part in shard(shapes, PUBLISHED_BYTES, 2)]
    weight_map: dict[str, str] = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        write_chunks(root / file, part, "BF16", lambda name: [source.entries[name].raw_rows(0, shapes[name][0])])
        weight_map |= dict.fromkeys(part, file)
    write_json(root / INDEX, {"metadata": {}, "weight_map": weight_map})
    assert {file for name, file in weight_map.items() if name.startswith((TOWER, PROJECTOR))} == {names(root)[0]}
    assert any(cut(weight_map, layer) for layer in range(6))
    return root


def cut(weight_map: dict[str, str], layer: int) -> bool:
    return len({file for name, file in weight_map.items() if f"model.layers.{layer}." in name}) > 1


def _module_order(name: str) -> tuple[int, int, int]:
    parts = name.split(".")
    layer = int(parts[3]) if "language_model.model.layers" in name else -1 if "embed" in name else 1000
    inside = 0 if "self_attn" in name else 1 if "mlp" in name else 2
    return (0 if name.startswith((TOWER, PROJECTOR)) else 1, layer, inside)


def test_each_shard_is_downloaded_once_whichever_part_needs_it(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    expected = written(published, tmp_path / "eager")
    fake, lazy = FakeHub(published, monkeypatch), tmp_path / "lazy" / "checkpoint"
    assert cli("fetch", MODEL, "--lazy", lazy) == (0, f"{lazy}\n", "")
    assert not names(lazy)
    assert not (lazy / ".cache").exists()
    assert hub.resolve(str(lazy)).sha256 == Checkpoint.open(published).sha256
    assert not fake.downloaded
    assert written(lazy, tmp_path / "out") == expected
    assert fake.downloaded == names(published)
    assert fake.peak == AT_ONCE  # the first waits for the image tower's turn
    assert not names(lazy)


def test_shards_are_those_of_the_commit_that_was_fetched(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeHub(published, monkeypatch)
    hub.fetch_lazily(MODEL, tmp_path / "lazy")
    recipe = json.loads((tmp_path / "lazy" / "shards.json").read_text())
    assert recipe["source"] == {"kind": "hub", "hub_id": HUB_ID, "revision": COMMIT}
    assert {name: one["sha256"] for name, one in recipe["shards"].items()} == {
        name: sha256(published / name) for name in names(published)
    }
