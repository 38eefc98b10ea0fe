"""What the demo has to show, before anyone prints it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Something to print."""

    title: str
    columns: list[str]
    rows: list[list[str]]
