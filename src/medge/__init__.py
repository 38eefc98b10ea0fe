"""medge puts MedSigLIP and MedGemma on the edge: export, run, and hold every artifact to its reference.

`medge.open(path)` is the one door to any artifact; `open_embedder` and `open_generator` are it for who knows the
kind. Importing `medge` loads no torch and no runtime.
medge is a developer tool, not a medical device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "open", "open_embedder", "open_generator"]

if TYPE_CHECKING:
    from medge.runtimes import open, open_embedder, open_generator


def __getattr__(name: str) -> Any:
    if name in __all__:  # lazy: the runtime costs 0.3 s of imports
        from medge import runtimes

        return getattr(runtimes, name)
    raise AttributeError(f"module 'medge' has no attribute '{name}'")
