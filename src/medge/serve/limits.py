"""What one client may ask of the server, so that no request takes it from the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from medge.errors import UsageError

_MIB = 1 << 20


def _limit(default: int, what: str) -> Any:
    return field(default=default, metadata={"what": what})


@dataclass(frozen=True)
class Limits:
    """All of them can be set: `medge serve --set NAME=VALUE`.

    Raises:
        UsageError: a value below 1.
    """

    queue: int = _limit(32, "requests that wait for one model; the next is answered with 429")
    body_bytes: int = _limit(64 * _MIB, "of one request")
    held_bytes: int = _limit(512 * _MIB, "bodies of all requests that are read, waiting or running; beyond it 429")
    image_bytes: int = _limit(32 * _MIB, "of one image's file")
    image_pixels: int = _limit(50_000_000, "of one image, by its header: a decompression bomb is never decoded")
    images: int = _limit(32, "in one request")
    messages: int = _limit(512, "in one request")
    tools: int = _limit(64, "in one request")
    inputs: int = _limit(256, "texts and images in one request for embeddings; prompts in a classification")
    schema_bytes: int = _limit(64 * 1024, "of one JSON Schema, written without spaces")
    answer_tokens: int = _limit(4096, "an answer ends here with the reason `length`, whatever a request asks for")
    read_seconds: int = _limit(60, "for a request to arrive whole")
    write_seconds: int = _limit(60, "a client that reads nothing for so long is cut off")
    grace_seconds: int = _limit(30, "for what runs and waits when the server is told to stop")

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise UsageError(f"--set {name}={value}", "Give 1 or more")

    @classmethod
    def parse(cls, given: Mapping[str, str]) -> Limits:
        """Limits by name.

        Raises:
            UsageError: no such limit, or no whole number.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in given if name not in names]
        if unknown:
            raise UsageError(f"--set {unknown[0]}: no such setting", f"Settings: {', '.join([*names, 'context'])}")
        return cls(**{name: whole_number(name, value) for name, value in given.items()})


def whole_number(name: str, value: str) -> int:
    """The value of a setting.

    Raises:
        UsageError: no whole number.
    """
    try:
        return int(value)
    except ValueError:
        raise UsageError(f"--set {name}={value} is no whole number") from None
