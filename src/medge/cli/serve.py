"""The verb that serves artifacts over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medge.cli.console import Settings, Threads, parse_settings, say
from medge.errors import require_installed

_NEEDS = ("starlette", "uvicorn", "prometheus_client")


def register(app: typer.Typer) -> None:
    """Add this module's verb."""
    app.command()(serve)


def serve(
    artifacts: Annotated[list[str], typer.Argument(metavar="ARTIFACT…", help="Artifact folders; ID=FOLDER names one.")],
    host: Annotated[str, typer.Option(help="Where to listen. Beyond this machine a key is needed.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file whose first line is the key. Default: $MEDGE_API_KEY, or none.")
    ] = None,
    settings: Settings = None,
    threads: Threads = None,
) -> None:
    """Serve artifacts like OpenAI's API (chat completions, embeddings, models), with a page to try them on /.

    --set takes context and the limits of docs/serve.md, for example queue=8 or grace_seconds=10.
    """
    for package in _NEEDS:
        require_installed(package, "serve")
    from medge.runtimes.generate import ChatRunOptions
    from medge.serve.limits import Limits, whole_number
    from medge.serve.models import open_models
    from medge.serve.server import Place, read_key
    from medge.serve.server import serve as run

    given = parse_settings(settings)
    context = whole_number("context", given.pop("context")) if "context" in given else None
    limits = Limits.parse(given)
    place = Place(host, port, read_key(api_key_file))
    with place.bind() as listener:  # first: a port that is taken should not be found after minutes of loading
        models = open_models(artifacts, ChatRunOptions(threads=threads, context=context), limits.queue)
        names = ", ".join(served.id for served in models)
        say_where = "Serving {} at {}. Not a medical device. Ctrl-C stops it."
        run(models, place, limits, listener, lambda url: say(say_where.format(names, url)))
