"""Names in medge's `siglip` GGUF layout: one table for what writes it and what runs it. See docs/gguf.md.

After llama.cpp's `clip` conventions (tools/mtmd/clip-impl.h) where they have a name; the pooling heads and the
scoring constants, which they have not, follow in the same style.
"""

from __future__ import annotations

import re

ARCHITECTURE = "clip"
PROJECTOR = ("mm.0", "mm.1")
"""llama.cpp's loader wants an MLP behind every tower. This one gives back what it gets, since for any form of GELU
gelu(x) - gelu(-x) = x: its layers are [I; -I] and [I, -I]. medge's runtime does not read it."""

_TOWERS = {"vision_model": "v", "text_model": "t"}
_MODULES = (
    (r"embeddings\.patch_embedding", "patch_embd"),
    (r"embeddings\.position_embedding", "position_embd"),
    (r"embeddings\.token_embedding", "token_embd"),
    (r"post_layernorm|final_layer_norm", "post_ln"),
    (r"head", "head"),
    (r"head\.attention\.scores", "head.attn_scores"),
    (r"head\.attention\.(q|k|v)_proj", r"head.attn_\1"),
    (r"head\.attention\.out_proj", "head.attn_out"),
    (r"head\.layernorm", "head.ln"),
    (r"head\.mlp\.fc1", "head.ffn_up"),
    (r"head\.mlp\.fc2", "head.ffn_down"),
    (r"encoder\.layers\.(\d+)\.layer_norm(1|2)", r"blk.\1.ln\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.(q|k|v)_proj", r"blk.\1.attn_\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj", r"blk.\1.attn_out"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc1", r"blk.\1.ffn_up"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc2", r"blk.\1.ffn_down"),
)
"""Module below its tower -> its name in the file."""


def tensor_name(at: str, kind: str) -> str:
    """The file's name of a module's "weight" or "bias": ("vision_model.head.layernorm", "bias") -> "v.head.ln.bias".

    Raises:
        KeyError: the layout has no such module.
    """
    tower, _, module = at.partition(".")
    for pattern, name in _MODULES:
        if found := re.fullmatch(pattern, module):
            return f"{_TOWERS[tower]}.{found.expand(name)}.{kind}"
    raise KeyError(at)
