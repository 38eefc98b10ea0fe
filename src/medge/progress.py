"""Progress of long work, as a callback: whoever works reports, whoever shows decides how."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""(stage, done, total), called as work goes on; a total of 0 is a stage of unknown length."""


def counter(report: Progress, stage: str, total: int) -> Callable[[int], None]:
    """A callback that adds up what is done of a stage and reports the sum."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        report(stage, done, total)

    return advance
