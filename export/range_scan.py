"""Whether a decoder stays within float16 on real text: run before an artifact of 16-bit weights is let out."""

from __future__ import annotations

import numpy as np

from medge.checkpoint import Checkpoint
from medge.errors import RegressedError
from medge.export.eager import EagerOps
from medge.progress import Progress
from medge.runtimes.chat import ChatTemplate
from medge.runtimes.generate import Message
from medge.runtimes.vocabulary import VOCABULARY, Vocabulary
from medge.samples import sample_texts
from medge.spec import BuildOptions, Weight

LARGEST = float(np.finfo(np.float16).max)
HEADROOM = 4.0
"""How many times as large another text's values may be, before they are infinite in float16."""
TOKENS = 256


def check(checkpoint: Checkpoint, options: BuildOptions, progress: Progress) -> float:
    """The largest value that any operation of the decoder gives on sample prompts.

    Raises:
        RegressedError: it is too near float16's end, with the place.
    """
    peaks = scan(checkpoint, options, progress)
    place = max(peaks, key=peaks.__getitem__)
    if not peaks[place] * HEADROOM <= LARGEST:  # NaN is beyond too
        raise RegressedError(
            f"The decoder reaches {peaks[place]:,.0f} at '{place}', and float16 ends at {LARGEST:,.0f}",
            "Use scheme int8 or fp32",
        )
    return peaks[place]


def scan(checkpoint: Checkpoint, options: BuildOptions, progress: Progress) -> dict[str, float]:
    """The largest absolute value that each operation of the decoder gives on sample prompts, by its place."""
    spec, ops = checkpoint.any_spec, EagerOps()
    done = iter(range(len(spec.tensors)))

    def read(name: str) -> Weight:
        progress("range scan", next(done, len(spec.tensors)), len(spec.tensors))
        return checkpoint.weight(name)

    with np.errstate(over="ignore", invalid="ignore"):  # what is found is the answer
        x = spec.part("embedding").build(ops, {"input_ids": _ids(checkpoint)}, read, BuildOptions())
        spec.part("decoder").build(ops, {"inputs_embeds": x}, read, options)
    return ops.peaks


def _ids(checkpoint: Checkpoint) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """(1, N) ids of a prompt in the model's own format."""
    chat = checkpoint.chat_spec.chat
    template = ChatTemplate(checkpoint.chat_template(), chat)
    (text,), _ = template.pieces([Message("user", (" ".join(sample_texts(64)),))])
    ids = Vocabulary(checkpoint.root / VOCABULARY).tokenize(text)
    return np.array([ids[:TOKENS]], np.int64)
