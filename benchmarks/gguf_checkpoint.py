"""A Gemma 3 text model in GGUF unfolded into a Hugging Face checkpoint: a reference where weights exist in GGUF only.

The numbers are the file's own, in float32: a block's float16 scale times its integer needs more digits than bfloat16
has. What the original weights were is lost; differences are to be read against this checkpoint.

Weights that were quantized lie on their blocks' grids, and quantizing them again into the same blocks finds the grid
and loses nothing, which would flatter every scheme. So the channels can be shuffled: residual stream, MLP and values
in another order compute the same, and no block has the neighbours that it was made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medge.errors import CorruptError, require
from medge.manifest import write_json
from medge.models import gemma3
from medge.spec import FloatArray
from medge.staging import staged
from medge.tensorfile import write

Indices = NDArray[np.int64]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_FIELDS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "sliding_window": "attention.sliding_window",
    "rope_theta": "rope.freq_base",
}
"""config.json's name -> GGUF's, below "gemma3."."""
_ROPE_SCALING = "gemma3.rope.scaling.type"


def unfold(path: Path, tokenizer: Path, out: Path, *, shuffle: int | None = None) -> None:
    """Write the checkpoint folder `out`: weights, config, and the files of `tokenizer`, a folder.

    `shuffle` seeds another order of the channels; None keeps the file's.

    Raises:
        MissingExtraError: gguf is not installed.
        CorruptError: the file is no Gemma 3 text model, or one that this cannot read.
        UsageError: `out` exists.
    """
    reader: Any = require("gguf", "gguf").GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    config = _config(path, keys, int(tensors["token_embd.weight"].shape[1]))
    shapes = dict(gemma3.text_spec(config, id=path.stem).tensors)
    names, order = _names(shapes, config["num_hidden_layers"]), _order(config, shuffle)
    if missing := [stored for stored in names.values() if stored not in tensors]:
        raise CorruptError(f"{path} lacks '{missing[0]}'", "Fetch it again")
    with staged(out) as folder:
        write_json(folder / "config.json", config)
        for name in (*TOKENIZER_FILES, *(file.name for file in tokenizer.glob("chat_template.jinja"))):
            (folder / name).write_bytes((tokenizer / name).read_bytes())
        write(folder / "model.safetensors", shapes, lambda name: _placed(name, _values(tensors[names[name]]), order))


def _config(path: Path, keys: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    """config.json. What GGUF leaves to llama.cpp's knowledge of the architecture is the Gemma 3 report's."""
    if keys.get("general.architecture") != "gemma3" or keys.get(_ROPE_SCALING, "none") != "none":
        raise CorruptError(f"{path} is no Gemma 3 text model without scaled positions", "Use the pinned file")
    stored = {name: keys[f"gemma3.{key}"] for name, key in _FIELDS.items()}
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **stored,
        "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": stored["head_dim"],
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": [1, 106],
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }


def _names(shapes: Mapping[str, tuple[int, ...]], blocks: int) -> dict[str, str]:
    """The checkpoint's name of each tensor -> GGUF's."""
    gguf: Any = require("gguf", "gguf")
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, blocks)
    return {name: table.get_name(name, try_suffixes=(".weight",)) for name in shapes}


def _values(tensor: Any) -> FloatArray:
    """(rows, columns) float32. GGUF's gains of norms hold the 1 that Gemma's formula adds."""
    quants: Any = require("gguf.quants", "gguf")
    values = quants.dequantize(tensor.data, tensor.tensor_type)
    return np.asarray(values - np.float32(1) if "norm" in tensor.name else values, np.float32)


_AXES = {
    "embed_tokens": (None, "residual"),
    "q_proj": (None, "residual"),
    "k_proj": (None, "residual"),
    "v_proj": ("values", "residual"),
    "o_proj": ("residual", "heads"),
    "gate_proj": ("mlp", "residual"),
    "up_proj": ("mlp", "residual"),
    "down_proj": ("residual", "mlp"),
    "q_norm": (None,),
    "k_norm": (None,),
}
"""Which channels each axis of a tensor runs over, where they may be reordered; all other tensors are norms of the
residual stream. Rotations pair the channels of queries and keys, which therefore stay."""


def _order(config: Mapping[str, Any], seed: int | None) -> dict[str | None, Indices | slice]:
    """Channels -> their new order; None: the one they have."""
    kept: dict[str | None, Indices | slice] = dict.fromkeys([None, "residual", "mlp", "values", "heads"], slice(None))
    if seed is None:
        return kept
    rng, head = np.random.default_rng(seed), config["head_dim"]
    within = rng.permutation(head)  # the same in every head, since several query heads share one of values
    return kept | {
        "residual": rng.permutation(config["hidden_size"]),
        "mlp": rng.permutation(config["intermediate_size"]),
        "values": (np.arange(config["num_key_value_heads"])[:, None] * head + within).ravel(),
        "heads": (np.arange(config["num_attention_heads"])[:, None] * head + within).ravel(),
    }


def _placed(name: str, values: FloatArray, order: Mapping[str | None, Indices | slice]) -> FloatArray:
    axes = next((axes for kind, axes in _AXES.items() if kind in name), ("residual",))
    for axis, channels in enumerate(axes):
        values = values[(slice(None),) * axis + (order[channels],)]
    return values
