"""Whether a checkpoint knows the token that ends an image.

MedGemma's release notes: weights from before 2025-07-09 miss it in their vocabulary, which degrades answers about
images ever so little. What that looks like in the files is not published. So both ways of missing are looked for: the
tokenizer has no such token, or the token's embedding is that of a token which no training has moved.

Tokens that a model never met end up side by side: of the real Gemma 3 270M, the 6,242 reserved `<unusedN>` have a
median cosine of .988 to their mean, <unk> .988, words .58 at the 99th percentile, and <end_of_image> .41.
"""

from __future__ import annotations

import numpy as np

from medge.checkpoint import Checkpoint
from medge.runtimes.vocabulary import VOCABULARY, Vocabulary
from medge.spec import FloatArray

RESERVED = range(5986, 6242)
"""Gemma's last `<unusedN>`: the ones that nobody gives a meaning."""
UNTRAINED = 0.9
"""Cosine to the mean of the reserved tokens, from which on a token counts as never met."""
REMEDY = "Fetch weights of 2025-07-09 or later: answers about images are worse without it"


def image_mark_flaw(checkpoint: Checkpoint) -> str:
    """What is wrong with the end-of-image token; empty where nothing is, or where nothing can be told.

    Raises:
        WeightsError, CorruptError: the tokenizer is missing or unsound.
    """
    spec = checkpoint.chat_spec
    if spec.image is None:
        return ""
    vocabulary, mark = Vocabulary(checkpoint.root / VOCABULARY), spec.chat.image_end
    id = vocabulary.find(mark)
    if id is None:
        return f"the vocabulary has no {mark}. {REMEDY}"
    reserved = [found for n in RESERVED if (found := vocabulary.find(f"<unused{n}>")) is not None]
    if len(reserved) < 2 or not _untrained(checkpoint, id, reserved):
        return ""
    return f"the embedding of {mark} is that of a token that no training has met. {REMEDY}"


def _untrained(checkpoint: Checkpoint, id: int, reserved: list[int]) -> bool:
    name = next(name for name in checkpoint.chat_spec.tensors if name.endswith("embed_tokens.weight"))
    table = checkpoint.entries[name]
    if not table.path.is_file():  # a shard that comes when it is read
        return False
    rows = _unit(np.concatenate([table.rows(i, i + 1) for i in (*reserved, id)]))
    cosines = rows @ _unit(rows[:-1].mean(0, keepdims=True))[0]
    return bool(np.median(cosines[:-1]) > UNTRAINED < cosines[-1])  # random weights have no cluster


def _unit(rows: FloatArray) -> FloatArray:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12), np.float32)
