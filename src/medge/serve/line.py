"""A model's line: one request at a time on a thread of its own, a bounded number behind it, each able to leave."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from starlette.requests import ClientDisconnect

from medge.serve.errors import ApiError

T = TypeVar("T")
Work = Callable[[Callable[[], bool]], Generator[T, None, None]]
"""Runs on the model's thread. It is given the question whether to stop, and yields what it makes."""
_RECENT = 0.2
"""Weight of the last job in the mean that Retry-After is estimated from."""


def stopping() -> ApiError:
    """The answer to what comes, or is cut short, while the server stops."""
    return ApiError(503, "The server is stopping", "stopping", headers={"Retry-After": "10"})


@dataclass(frozen=True)
class _End:
    error: BaseException | None = None


class Job(Generic[T]):
    """Work in a line, seen from the event loop: iterate it for what it makes."""

    def __init__(self, work: Work[T]) -> None:
        self._work = work
        self._loop = asyncio.get_running_loop()
        self._made: asyncio.Queue[T | _End] = asyncio.Queue()
        self.reason: Exception | None = None
        """Why it was cancelled."""
        self._submitted = time.perf_counter()
        self.waited = 0.0
        """Seconds in the line, once it has begun."""

    def __aiter__(self) -> Job[T]:
        return self

    async def __anext__(self) -> T:
        """What comes next. Raises what the work raised."""
        made = await self._made.get()
        if not isinstance(made, _End):
            return made
        self._made.put_nowait(made)  # whoever asks again is told again
        if made.error is not None:
            raise made.error
        raise StopAsyncIteration

    def cancelled(self) -> bool:
        """Whether the work should stop; asked from the model's thread."""
        return self.reason is not None

    def cancel(self, reason: Exception) -> None:
        """Stop; the asker gets the reason where it is still there."""
        self.reason = self.reason or reason

    def end(self, error: BaseException | None) -> None:
        """Nothing more is made."""
        self._give(_End(error))

    def run(self) -> None:
        """On the model's thread: do the work and hand each thing over. What it raises, the asker gets."""
        self.waited = time.perf_counter() - self._submitted
        error: BaseException | None = None
        try:
            with closing(self._work(self.cancelled)) as made:
                for each in made:
                    self._give(each)
                    if self.reason:
                        break
        except BaseException as raised:
            error = raised
        self.end(error or self.reason)

    def _give(self, made: T | _End) -> None:
        self._loop.call_soon_threadsafe(self._made.put_nowait, made)


class Line:
    """The jobs of one model. All but `_work_off` is called from the event loop's thread."""

    def __init__(self, name: str, capacity: int) -> None:
        self._capacity = capacity
        self._waiting: deque[Job[Any]] = deque()
        self._running: Job[Any] | None = None
        self._mean_seconds = 1.0
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work_off, name=f"line of {name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs that have not begun."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """1 while a job runs."""
        return int(self._running is not None)

    def submit(self, work: Work[T]) -> Job[T]:
        """Join the line.

        Raises:
            ApiError: 429, it is full; 503, the server is stopping.
        """
        job = Job(work)
        with self._changed:
            if self._stopping:
                raise stopping()
            if len(self._waiting) >= self._capacity:
                raise self._full()
            self._waiting.append(job)
            self._changed.notify()
        return job

    def leave(self, job: Job[T]) -> None:
        """The client has left: cancel its job; one that waits makes room at once."""
        job.cancel(ClientDisconnect())
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                job.end(job.reason)

    def stop(self) -> None:
        """Take no more; what waits is still worked off."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def cancel_all(self) -> None:
        """End what runs and what waits, with an error for its askers."""
        with self._changed:
            if self._running:
                self._running.cancel(stopping())
            while self._waiting:
                self._waiting.popleft().end(stopping())

    def join(self, seconds: float) -> bool:
        """Wait for the thread after `stop`. False where it still runs."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _full(self) -> ApiError:
        seconds = math.ceil(min(max(self._mean_seconds * len(self._waiting), 1), 300))
        return ApiError(
            429,
            f"{len(self._waiting)} requests wait for this model already. Try again in {seconds} s",
            "queue_full",
            headers={"Retry-After": str(seconds)},
        )

    def _next(self) -> Job[Any] | None:
        with self._changed:
            self._running = None
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            if self._waiting:
                self._running = self._waiting.popleft()
            return self._running

    def _work_off(self) -> None:
        while (job := self._next()) is not None:
            start = time.perf_counter()
            job.run()
            self._mean_seconds += _RECENT * (time.perf_counter() - start - self._mean_seconds)
            del job  # and with it what it was asked, which need not stay until the next comes
