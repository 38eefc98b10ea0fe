"""uvicorn's HTTP, with an end to its patience.

uvicorn waits for ever for the rest of a request's head, and for a client that reads nothing of its answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from medge.serve.limits import Limits


class _Patient(H11Protocol):
    limits: ClassVar[Limits] = Limits()
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._arm(self.limits.read_seconds, self._abort_unasked)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._arm(self.limits.read_seconds, self._abort_unasked)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._arm(self.limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._disarm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def _abort_unasked(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()

    def _arm(self, seconds: int, then: Callable[[], None]) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, then)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def protocol(limits: Limits) -> type[H11Protocol]:
    """The protocol under these limits: uvicorn makes its instances itself, from the class alone."""
    return type("Protocol", (_Patient,), {"limits": limits})
