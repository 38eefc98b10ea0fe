"""Folders that appear whole or not at all: written beside their place, renamed once."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from medge.errors import UsageError

_KEY = ".resume-key"
_OURS = ("manifest.json", "config.json", "baseline.json")
"""A folder that medge wrote holds one of these; no other is replaced, whatever `replace` says."""


def stamp(paths: Iterable[Path]) -> str:
    """Tells files from later versions of themselves without reading them: what a resume key is made of."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.exists()]
    return json.dumps(stats)


@contextmanager
def staged(out: Path, *, replace: bool = False, resume_key: str | None = None) -> Iterator[Path]:
    """Yield an empty (or, under the same `resume_key`, an earlier unfinished) folder that becomes `out` on success.

    Without a key a failure leaves nothing. With one it leaves the partial folder for the next run of the same
    request. `out` itself is untouched until the rename, also with `replace`.

    Raises:
        UsageError: `out` exists (with `replace`: and is none of medge's), cannot be written, is being written by
            another process, or the disk is full.
    """
    out = Path(out).resolve()  # through a link: the folder is replaced, the link stays
    _check_free(out, replace=replace)
    partial = out.with_name(f".{out.name}.partial")
    try:
        with _alone(partial, out):
            try:
                _prepare(partial, resume_key)
                yield partial
                (partial / _KEY).unlink(missing_ok=True)
                _swap(partial, out, replace=replace)
            except BaseException:
                if resume_key is None:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        raise _explain(error, out, resume_key) from error


@contextmanager
def _alone(partial: Path, out: Path) -> Iterator[None]:
    """One writer a folder; the lock is the system's, and ends with the process that holds it."""
    if partial.is_symlink():
        raise UsageError(f"{partial} is a link, and what it leads to would be cleared", "Remove it")
    partial.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":  # which cannot open a folder; there two writers are the user's care
        yield
        return
    import fcntl

    handle = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not partial.exists() or not os.path.samestat(os.fstat(handle), partial.stat()):
            raise BlockingIOError  # the other one finished between our open and our lock
    except BlockingIOError:
        os.close(handle)
        raise UsageError(f"Another medge is writing {out}", "Wait for it, or name another folder") from None
    try:
        yield
    finally:
        os.close(handle)


def _check_free(out: Path, *, replace: bool) -> None:
    if not out.exists():
        return
    if not replace:
        raise UsageError(f"{out} exists", "Name another folder, or pass --force to replace it")
    if not any((out / name).is_file() for name in _OURS) and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} is no folder that medge wrote, so it is not replaced", "Name another folder")


def _prepare(partial: Path, resume_key: str | None) -> None:
    key = partial / _KEY
    if resume_key is None or not key.is_file() or key.read_text() != resume_key:
        for path in partial.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if resume_key is not None:
        key.write_text(resume_key)


def _swap(partial: Path, out: Path, *, replace: bool) -> None:
    _check_free(out, replace=replace)  # again: the work may have taken minutes
    old = out.with_name(f".{out.name}.old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _explain(error: OSError, out: Path, resume_key: str | None) -> UsageError:
    after = "Then run the same command: it resumes" if resume_key else "Then run the same command again"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UsageError(f"The disk is full while writing {out}", f"Free some space. {after}")
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return UsageError(f"{out.parent} cannot be written: {error.strerror}", "Choose another folder with -o")
    return UsageError(f"Writing {out} failed: {error}")
