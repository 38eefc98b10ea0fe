"""Gemma's tokenizer.json as GGUF's keys, so that llama.cpp gives the same ids.

llama.cpp merges by score, the tokenizers library by merge rank; Gemma's ids rise with the rank, so -id serves.

One difference is left, here as in llama.cpp's own converter. Added tokens for runs of spaces are spelled "▁▁" (U+2581)
in tokenizer.json; tokenizers finds these very characters in a text, llama.cpp only spaces. So the ids of a text that
holds "▁" beside another "▁" or a space are not the same; what they spell is, but for "▁" and space.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from medge.checkpoint import Checkpoint
from medge.errors import CorruptError, WeightsError
from medge.export.gguf_keys import Key
from medge.runtimes.gguf_file import ValueType
from medge.shards import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's llama_token_type."""
_TURNS = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>")
"""Marked as plain added tokens in some checkpoints; they steer the model all the same."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_OTHERS_SCORE = -1000.0


def vocabulary(checkpoint: Checkpoint, size: int) -> Iterator[Key]:
    """The tokenizer section, `size` pieces long.

    Raises:
        WeightsError: tokenizer.json is missing.
        CorruptError: it is no tokenizer of this model.
    """
    pieces, scores, types, ids = _pieces(checkpoint, size)
    yield Key("tokenizer.ggml.model", ValueType.STRING, "llama")
    yield Key("tokenizer.ggml.pre", ValueType.STRING, "default")
    yield Key("tokenizer.ggml.tokens", ValueType.STRING, pieces)
    yield Key("tokenizer.ggml.scores", ValueType.FLOAT32, scores)
    yield Key("tokenizer.ggml.token_type", ValueType.INT32, types)
    named = {"bos": "<bos>", "eos": "<end_of_turn>", "eot": "<end_of_turn>", "unknown": "<unk>", "padding": "<pad>"}
    for key, token in named.items():
        if token in ids:
            yield Key(f"tokenizer.ggml.{key}_token_id", ValueType.UINT32, ids[token])
    yield Key("tokenizer.ggml.add_bos_token", ValueType.BOOL, True)
    yield Key("tokenizer.ggml.add_eos_token", ValueType.BOOL, False)
    yield Key("tokenizer.ggml.add_space_prefix", ValueType.BOOL, False)
    yield Key("tokenizer.chat_template", ValueType.STRING, checkpoint.chat_template())


def _pieces(checkpoint: Checkpoint, size: int) -> tuple[list[str], list[float], list[int], dict[str, int]]:
    path = checkpoint.root / "tokenizer.json"
    if not path.is_file():
        raise WeightsError(f"{path} is missing", "Copy it from the model's page beside the weights")
    document = read_json(path)
    try:
        # The image token is in text-only checkpoints' tokenizers too, one past the last row of their embedding.
        added = [one for one in document["added_tokens"] if int(one["id"]) < size]
        ids = {str(text): int(i) for text, i in document["model"]["vocab"].items()}
        ids |= {str(one["content"]): int(one["id"]) for one in added}
    except (KeyError, TypeError, ValueError):
        raise CorruptError(f"{path} is no tokenizer of the tokenizers library", "Download it again") from None
    if max(ids.values()) >= size:
        raise CorruptError(f"{path} has more tokens than the {size} of config.json", "Is it this model's?")
    pieces, scores = [f"[PAD{i}]" for i in range(size)], [_OTHERS_SCORE] * size
    types = [UNUSED] * size
    for text, i in ids.items():
        pieces[i], scores[i], types[i] = text, -float(i), BYTE if _BYTE.fullmatch(text) else NORMAL
    for one in added:
        _add(one, pieces, scores, types)
    types[ids["<unk>"]] = UNKNOWN
    return pieces, scores, types, ids


def _add(one: dict[str, Any], pieces: list[str], scores: list[float], types: list[int]) -> None:
    """An added token: matched in the text before any merging."""
    text, i = str(one["content"]), int(one["id"])
    control = bool(one.get("special")) or text in _TURNS
    pieces[i] = text if control else text.replace("▁", " ")
    scores[i], types[i] = _OTHERS_SCORE, CONTROL if control else USER_DEFINED
