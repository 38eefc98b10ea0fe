"""What one client may ask of the server, so that no request takes it from the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from medge.errors import UsageError

_MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """All of them can be set: `medge serve --set NAME=VALUE`.

    Raises:
        UsageError: a value below 1.
    """

    queue: int = 32
    """Requests that wait for one model; the next is answered with 429."""
    body_bytes: int = 64 * _MIB
    held_bytes: int = 512 * _MIB
    """Bodies of all requests that are read, waiting or running."""
    image_bytes: int = 32 * _MIB
    image_pixels: int = 50_000_000
    """By the image's header: a decompression bomb is never decoded."""
    images: int = 32
    """Images in one request."""
    messages: int = 512
    tools: int = 64
    inputs: int = 256
    """Texts and images in one request for embeddings, and labels of a classification."""
    schema_bytes: int = 64 * 1024
    """Of a JSON Schema, written without spaces."""
    answer_tokens: int = 4096
    """An answer ends here with the reason `length`, whatever a request asks for."""
    read_seconds: int = 60
    """For a request to arrive whole."""
    write_seconds: int = 60
    """Without reading for so long, a client is cut off."""
    grace_seconds: int = 30
    """For what runs and waits when the server is told to stop."""

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
