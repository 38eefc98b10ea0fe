"""The artifacts that are served: opened once, each with its own line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medge.errors import UsageError
from medge.manifest import Artifact, Manifest
from medge.runtimes import Embedder, Generator, open_embedder, open_generator
from medge.runtimes.embed import IMAGE, TEXT
from medge.runtimes.generate import ChatRunOptions
from medge.serve.errors import ApiError, invalid
from medge.serve.line import Line

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


@dataclass(frozen=True)
class Served:
    """One artifact."""

    id: str
    manifest: Manifest
    model: Embedder | Generator
    line: Line

    def document(self) -> dict[str, Any]:
        """OpenAI's form, and what a client has to know to use it."""
        facts: dict[str, Any] = {"task": self.manifest.task, "source": self.manifest.source.model}
        if isinstance(self.model, Embedder):
            facts |= {"images": True, "image_size": self.model.image.size}
        else:
            facts |= {"images": self.model.image is not None, "context": self.model.context}
        created = int(self.manifest.created.timestamp())
        run = {"format": self.manifest.format, "scheme": self.manifest.scheme, "runtime": self.model.name}
        return {"id": self.id, "object": "model", "created": created, "owned_by": "medge", "medge": facts | run}

    def close(self) -> None:
        """Give its memory back; its line must have ended."""
        if not isinstance(self.model, Embedder):
            self.model.close()


class Models:
    """All of them, by id."""

    def __init__(self, served: Sequence[Served]) -> None:
        self._served: Mapping[str, Served] = {each.id: each for each in served}

    def __iter__(self) -> Iterator[Served]:
        return iter(self._served.values())

    def get(self, id: str) -> Served:
        """A model by its id.

        Raises:
            ApiError: 404.
        """
        if id not in self._served:
            known = ", ".join(self._served)
            raise ApiError(404, f"There is no such model here. Models: {known}", "model_not_found", param="model")
        return self._served[id]

    def generator(self, id: str) -> tuple[Served, Generator]:
        """A model that answers.

        Raises:
            ApiError: there is none of that id, or it is an embedder.
        """
        served = self.get(id)
        if isinstance(served.model, Embedder):
            raise invalid(f"'{id}' embeds and does not answer: use /v1/embeddings", "model", "wrong_task")
        return served, served.model

    def embedder(self, id: str) -> tuple[Served, Embedder]:
        """A model that embeds.

        Raises:
            ApiError: there is none of that id, or it is a chat model.
        """
        served = self.get(id)
        if not isinstance(served.model, Embedder):
            raise invalid(f"'{id}' answers and does not embed: use /v1/chat/completions", "model", "wrong_task")
        return served, served.model


def open_models(names: Sequence[str], options: ChatRunOptions, queue: int) -> Models:
    """Open artifacts, each `FOLDER` or `ID=FOLDER`; the id is else the folder's name.

    Raises:
        UsageError: an id twice, or one that no URL should hold.
        MedgeError: as `medge.open`.
    """
    folders: dict[str, Path] = {}
    for name in names:
        id, folder = _named(name)
        if not _ID.fullmatch(id):
            raise UsageError(f"'{id}' is no id for a model", "Name it with letters and digits: ID=FOLDER")
        if id in folders:
            raise UsageError(f"Two artifacts have the id '{id}'", "Name one of them: ID=FOLDER")
        folders[id] = folder
    return Models([_open(id, folder, options, queue) for id, folder in folders.items()])


def _named(name: str) -> tuple[str, Path]:
    id, equals, folder = name.partition("=")
    if equals and not Path(name).exists():
        return id, Path(folder)
    return Path(name).resolve().name, Path(name)


def _open(id: str, folder: Path, options: ChatRunOptions, queue: int) -> Served:
    manifest = Artifact.open(folder).manifest
    if manifest.task == "generate":
        return Served(id, manifest, open_generator(folder, options), Line(id, queue))
    model = open_embedder(folder, options)
    for part in (IMAGE, TEXT):
        model.session(part)  # what cannot be loaded is found now, not with the first request
    return Served(id, manifest, model, Line(id, queue))
