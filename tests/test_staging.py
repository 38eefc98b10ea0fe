"""A folder appears whole or not at all, and what was there before is lost to nothing but its replacement."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from medge.errors import UsageError
from medge.staging import staged


def fill(out: Path, text: str = "new", **options: str | bool | None) -> None:
    with staged(out, **options) as folder:  # type: ignore[arg-type]
        (folder / "manifest.json").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_success_leaves_the_folder_and_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path / "deep" / "out", resume_key="key")
    assert names(tmp_path / "deep") == ["out"]
    assert names(tmp_path / "deep" / "out") == ["manifest.json"]


def test_nothing_is_there_before_the_end(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as folder:
        (folder / "x").write_text("")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize(("key", "left"), [(None, []), ("key", [".out.partial"])])
def test_failure_leaves_only_what_can_resume(
    error: type[BaseException], key: str | None, left: list[str], tmp_path: Path
) -> None:
    with pytest.raises(error), staged(tmp_path / "out", resume_key=key):
        raise error
    assert names(tmp_path) == left


@pytest.mark.parametrize(("second", "kept"), [("key", True), ("other", False), (None, False)])
def test_only_the_same_request_resumes(second: str | None, kept: bool, tmp_path: Path) -> None:
    with pytest.raises(KeyError), staged(tmp_path / "out", resume_key="key") as folder:
        {"part": (folder / "part").write_text("")}["cut"]
    with staged(tmp_path / "out", resume_key=second) as folder:
        assert (folder / "part").exists() is kept


def test_what_exists_is_refused_and_untouched(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    with pytest.raises(UsageError, match="exists"):
        fill(tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").read_text() == "old"


def test_replacing_swaps_at_the_end_only(tmp_path: Path) -> None:
    fill(tmp_path / "out", "old")
    with pytest.raises(ValueError, match="cut"), staged(tmp_path / "out", replace=True):
        raise ValueError("cut")
    assert (tmp_path / "out" / "manifest.json").read_text() == "old"
    fill(tmp_path / "out", "new", replace=True)
    assert (tmp_path / "out" / "manifest.json").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_replacing_never_deletes_what_medge_did_not_write(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="no folder that medge wrote"):
        fill(home, replace=True)
    file = tmp_path / "file"
    file.write_text("years of work")
    with pytest.raises(UsageError, match="no folder that medge wrote"):
        fill(file, replace=True)
    with pytest.raises(UsageError, match="no folder that medge wrote"):
        fill(Path("/"), replace=True)
    assert names(home) == ["thesis.tex"]
    assert file.read_text() == "years of work"


def test_an_empty_folder_can_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", replace=True)
    assert names(tmp_path / "out") == ["manifest.json"]


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_stays_a_link(dangling: bool, tmp_path: Path) -> None:
    if not dangling:
        fill(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    fill(tmp_path / "link", replace=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "manifest.json").read_text() == "new"
    assert names(tmp_path) == ["link", "real"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "The disk is full while writing"),
        (errno.EACCES, "cannot be written"),
        (errno.EROFS, "cannot be written"),
        (errno.EIO, r"Writing .* failed: \[Errno 5\]"),
    ],
)
def test_the_system_s_refusals_become_one_line(number: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message) as caught, staged(tmp_path / "out"):
        raise OSError(number, "as the system says it")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


@pytest.mark.parametrize("below", ["out", "deep/out"])
def test_a_file_as_parent_is_a_usage_error(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match=r"Writing .*out failed"):
        fill(tmp_path / "file" / below)
    assert (tmp_path / "file").read_text() == "mine"


def test_two_writers_never_mix(tmp_path: Path) -> None:
    with staged(tmp_path / "out", resume_key="key") as folder:
        (folder / "manifest.json").write_text("first")
        for key in ("key", "other", None):
            with pytest.raises(UsageError, match="Another medge is writing"):
                fill(tmp_path / "out", "second", resume_key=key)
        assert (folder / "manifest.json").read_text() == "first"
    assert (tmp_path / "out" / "manifest.json").read_text() == "first"


def test_what_appeared_meanwhile_is_not_replaced_unasked(tmp_path_factory: pytest.TempPathFactory) -> None:
    theirs, tmp_path = tmp_path_factory.mktemp("theirs"), tmp_path_factory.mktemp("ours")
    (theirs / "manifest.json").write_text("theirs")
    with pytest.raises(UsageError, match="exists"), staged(tmp_path / "out"):
        shutil.copytree(theirs, tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").read_text() == "theirs"
    assert names(tmp_path) == ["out"]


def test_a_link_in_the_partial_folder_s_place_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.tex").write_text("years of work")
    (tmp_path / ".out.partial").symlink_to(victim)
    with pytest.raises(UsageError, match="is a link"):
        fill(tmp_path / "out")
    assert names(victim) == ["thesis.tex"]


def test_a_link_inside_a_leftover_is_removed_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.tex").write_text("years of work")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "x").symlink_to(victim)
    fill(tmp_path / "out")
    assert names(victim) == ["thesis.tex"]
    assert names(tmp_path / "out") == ["manifest.json"]


def test_an_old_copy_that_a_kill_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "x").write_text("")
    fill(tmp_path / "out", "old")
    fill(tmp_path / "out", "new", replace=True)
    assert names(tmp_path) == ["out"]
