"""Whether to stop, asked from within a computation that knows nothing of its caller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Watch:
    """Asks whether to stop, from within native code.

    What the question raises (Ctrl-C arrives there) would be lost in a callback: it is kept, and raised by `check`.
    """

    def __init__(self) -> None:
        self.begin(never)

    def begin(self, cancelled: Callable[[], bool]) -> None:
        """Ask this from now on."""
        self._cancelled = cancelled
        self._error: BaseException | None = None

    def __call__(self, *_: Any) -> bool:
        """Whether native code should stop now."""
        try:
            return self._error is not None or self._cancelled()
        except BaseException as error:
            self._error = error
            return True

    def check(self) -> bool:
        """Whether to stop; raises what the question had raised."""
        stop = self()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return stop


def never() -> bool:
    """No question is ever answered with yes."""
    return False
