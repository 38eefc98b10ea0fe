"""The command line. Heavy packages are imported inside the verbs, so that --help answers at once."""

from __future__ import annotations

import os
import sys

import typer

from medge.cli import artifacts, gate, inference, system
from medge.errors import MedgeError

app = typer.Typer(
    name="medge",
    help="Puts MedSigLIP and MedGemma on phones and laptops. A developer tool, not a medical device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for register in (artifacts.register, inference.register, gate.register, system.register):
    register(app)


def main() -> None:
    """Run a verb; an expected failure is one line and its exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except MedgeError as error:
        from medge.cli.console import exit_with

        sys.exit(exit_with(error))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
