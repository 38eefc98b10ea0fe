"""What reaches the terminal: results on stdout, progress and errors on stderr, one exit code an outcome."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medge.errors import MedgeError, UsageError
from medge.progress import Progress as Show

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A further setting.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Compute threads. Default: one a physical core.")]


def stderr() -> Console:
    """Where progress and errors go."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_json(document: Any) -> None:
    """One JSON document on stdout; infinities and NaN are a bug, not output."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: int = 99) -> None:
    """A table on stdout; columns from index `numeric` on are numbers, to the right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index >= numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: a label like "[abc]" is no markup
    console = Console(highlight=False)
    if not console.is_terminal:  # a pipe has no width: nothing should be folded there
        console = Console(highlight=False, width=200)
    console.print(table)


def say(text: str) -> None:
    """A line for people, on stderr."""
    stderr().print(text, markup=False, soft_wrap=True)


def parse_settings(pairs: Sequence[str] | None) -> dict[str, str]:
    """--set key=value, several times.

    Raises:
        UsageError: a pair without "=".
    """
    settings = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"--set {pair} is not KEY=VALUE")
        settings[key] = value
    return settings


@contextmanager
def progress() -> Iterator[Show]:
    """A progress display on stderr, one bar a stage."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = stderr()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for task in tasks.values():
                    bars.update(task, visible=False)
                tasks[stage] = bars.add_task(stage, total=total or None)
            bars.update(tasks[stage], completed=done)

        yield report


def exit_with(error: MedgeError) -> int:
    """Show an expected failure in one line; returns its exit code."""
    from rich.text import Text

    message, remedy = (" ".join(text.splitlines()) for text in (error.message, error.remedy))
    line = Text.assemble(("error: ", "bold red"), (message + ".", "bold"), f" {remedy}" if remedy else "")
    stderr().print(line, soft_wrap=True)
    return error.exit_code
