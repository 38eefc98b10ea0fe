"""The process: where it listens, who may reach it there, and how it stops."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from medge.errors import UsageError
from medge.serve.app import Service, create_app
from medge.serve.errors import LOG
from medge.serve.limits import Limits
from medge.serve.models import Models
from medge.serve.protocol import protocol

KEY_VARIABLE = "MEDGE_API_KEY"
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
"""What a Host header calls this machine."""
_MIN_KEY = 16
_TICK = 0.05


@dataclass(frozen=True)
class Place:
    """Where to listen, and the key that is needed there.

    Raises:
        UsageError: no key, where others than this machine can come.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    """0 is any free one."""
    key: str | None = None

    def __post_init__(self) -> None:
        if self.key is None and not self.loopback:
            raise UsageError(
                f"'{self.host}' can be reached from other machines, and there is no API key",
                f"Set {KEY_VARIABLE}, or give --api-key-file; or listen on 127.0.0.1",
            )

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def bind(self) -> socket.socket:
        """A listening socket.

        Raises:
            UsageError: the address is taken, or none of this machine's.
        """
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            return socket.create_server(found[0][4][:2], family=found[0][0], backlog=512)
        except OSError as error:
            raise UsageError(
                f"Cannot listen on {self.host}, port {self.port}: {error.strerror or error}", "Give another --port"
            ) from None


def read_key(path: Path | None) -> str | None:
    """The API key: a file's first line, else the environment's. Never an argument: any user can list those.

    Raises:
        UsageError: the file cannot be read, or the key is too short to be a secret.
    """
    try:
        lines = os.environ.get(KEY_VARIABLE, "") if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"{path} cannot be read as a key", "Give a text file with the key in its first line") from None
    key = (lines.splitlines() or [""])[0].strip()
    if not key and path is None:
        return None
    if len(key) < _MIN_KEY or not key.isascii():  # a header's bytes beyond ASCII mean what each client likes
        raise UsageError(
            f"The API key has fewer than {_MIN_KEY} characters, or some beyond ASCII",
            'Make one with: python -c "import secrets; print(secrets.token_urlsafe(32))"',
        )
    return key


def serve(
    models: Models, place: Place, limits: Limits, listener: socket.socket, started: Callable[[str], None]
) -> None:
    """Serve on a socket that `place` bound, until SIGTERM or Ctrl-C. `started` is called with the address."""
    _silence()
    service = Service(models, limits, place.key, _LOOPBACK if place.loopback and place.key is None else None)
    started(_url(listener))
    try:
        asyncio.run(Server(service).serve(sockets=[listener]))
    finally:
        _close(service)


def _silence() -> None:
    """Libraries' warnings may quote what they read."""
    warnings.simplefilter("ignore")
    for name in ("pydicom", "uvicorn", "PIL"):
        logging.getLogger(name).disabled = True
    LOG.propagate = False
    LOG.addHandler(logging.StreamHandler(sys.stderr))


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _close(service: Service) -> None:
    service.stop()
    service.cancel()
    for served in service.models:
        if served.line.join(service.limits.grace_seconds):
            served.close()


class Server(uvicorn.Server):
    """Stops in two steps: it takes no more and says so at /health while it finishes, and only then stops listening."""

    def __init__(self, service: Service) -> None:
        limits = service.limits
        super().__init__(
            uvicorn.Config(
                create_app(service), http=protocol(limits), ws="none", lifespan="off", log_config=None,
                access_log=False, server_header=False, timeout_graceful_shutdown=limits.grace_seconds,
            )
        )  # fmt: skip
        self._service = service
        self._signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins to stop, the second does not wait for answers, the third for nobody."""
        self._signals += 1
        self.force_exit = self._signals > 2

    async def main_loop(self) -> None:
        """uvicorn's, and after a signal until all is finished or the grace is over."""
        while not self._signals:
            await self.on_tick(0)
            await asyncio.sleep(_TICK)
        self._service.stop()
        try:
            async with asyncio.timeout(self._service.limits.grace_seconds):
                while self._service.busy and self._signals < 2:
                    await asyncio.sleep(_TICK)
        except TimeoutError:
            pass
        self._service.cancel()
