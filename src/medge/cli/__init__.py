"""The command line. Heavy packages are imported inside the verbs, so that --help answers at once."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper

import typer

from medge.cli import artifacts, chat, gate, inference, serve, system
from medge.errors import MedgeError, UsageError

app = typer.Typer(
    name="medge",
    help="Puts MedSigLIP and MedGemma on phones and laptops. A developer tool, not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for register in (artifacts.register, inference.register, chat.register, serve.register, gate.register, system.register):
    register(app)


def main() -> None:
    """Run a verb; a failure is one line and its exit code. MEDGE_DEBUG=1 shows tracebacks instead."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):  # a file's name may hold bytes that no encoding has
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="medge")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except Exception as error:
        if os.environ.get("MEDGE_DEBUG"):
            raise
        sys.exit(_explain(error))


def _explain(error: Exception) -> int:
    from medge.cli.console import exit_with

    if isinstance(error, OSError):  # the system refuses a file that the user named
        error = UsageError(f"{error.filename or 'A file'}: {error.strerror or error}")
    if isinstance(error, MedgeError):
        return exit_with(error)
    first = (str(error).splitlines() or [""])[0]
    sys.stderr.write(f"internal error: {type(error).__name__}: {first}; run with MEDGE_DEBUG=1 for the traceback\n")
    return 70
