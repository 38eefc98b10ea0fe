"""Folders that appear whole or not at all: written beside their place, renamed once."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medge.errors import UsageError

_KEY = ".resume-key"
_OURS = ("manifest.json", "config.json", "baseline.json")
"""A folder that medge wrote holds one of these; no other is replaced, whatever `replace` says."""


@contextmanager
def staged(out: Path, *, replace: bool = False, resume_key: str | None = None) -> Iterator[Path]:
    """Yield an empty (or, under the same `resume_key`, an earlier unfinished) folder that becomes `out` on success.

    Without a key a failure leaves nothing. With one it leaves the partial folder for the next run of the same
    request. `out` itself is untouched until the rename, also with `replace`.

    Raises:
        UsageError: `out` exists (with `replace`: and is none of medge's), cannot be written, or the disk is full.
    """
    out = Path(out).resolve()  # through a link: the folder is replaced, the link stays
    _check_free(out, replace=replace)
    partial = out.with_name(f".{out.name}.partial")
    try:
        _prepare(partial, resume_key)
        yield partial
        (partial / _KEY).unlink(missing_ok=True)
        _swap(partial, out)
    except OSError as error:
        raise _explain(error, out, resume_key) from error
    finally:
        if resume_key is None:
            shutil.rmtree(partial, ignore_errors=True)


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
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    if resume_key is not None:
        key.write_text(resume_key)


def _swap(partial: Path, out: Path) -> None:
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
    return UsageError(f"{out} cannot be written: {error}")
