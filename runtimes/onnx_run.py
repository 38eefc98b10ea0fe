"""Running an ONNX Runtime session for long, with an eye on whether to stop."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from medge.runtimes.onnx_backend import explain
from medge.runtimes.watch import Watch

_ASK_EVERY = 0.05
"""Seconds between two questions whether to stop."""


def interruptible(run: Callable[[Any], Any], watch: Watch, what: str) -> bool:
    """run(onnxruntime.RunOptions), left within milliseconds when the watch says so. False: it was left.

    Raises:
        CorruptError: ONNX Runtime fails; `what` failed names it.
    """
    import onnxruntime

    options = onnxruntime.RunOptions()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, options)
        while not wait([running], _ASK_EVERY).done and not watch():
            pass
        if not running.done():
            options.terminate = True
        error = running.exception()
    if error is None:
        return True
    if options.terminate:
        return False
    if not isinstance(error, Exception):
        raise error
    raise explain(what, error) from error
