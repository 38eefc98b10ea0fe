"""Pages of a mapped file are given back, and nothing of it is lost."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from medge.runtimes.mapped import release

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says where a file is mapped")


def resident(path: Path) -> int:
    """KiB of a file that this process's maps hold in memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines():
        if "-" in line.partition(" ")[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


def test_a_files_pages_go_and_its_content_stays(tmp_path: Path) -> None:
    path, other = tmp_path / "a file.bin", tmp_path / "other.bin"
    for each in (path, other):
        each.write_bytes(bytes(range(256)) * 4096)
    with path.open("rb") as one, other.open("rb") as two:
        access = {"length": 0, "access": mmap.ACCESS_READ}
        with mmap.mmap(one.fileno(), **access) as first, mmap.mmap(two.fileno(), **access) as second:
            assert first[:] == second[:]
            assert resident(path) == resident(other) == 1024
            release(path)
            assert (resident(path), resident(other)) == (0, 1024)
            assert first[:] == second[:]


def test_a_map_that_may_hold_changes_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "copied.bin"
    path.write_bytes(bytes(8192))
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY) as copied:
        copied[0] = 1
        release(path)
        assert copied[0] == 1
