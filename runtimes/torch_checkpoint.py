"""A chat checkpoint's files as torch and transformers need them: its weights.

Weights come as `Checkpoint` has proven them: bfloat16 is mapped from its file, so that a model opens in seconds and the
system may drop what it needs elsewhere; anything else is converted some rows at a time, without a second copy.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from medge.checkpoint import Checkpoint
from medge.errors import CorruptError, require
from medge.models.gemma3 import TEXT_PREFIX
from medge.models.gemma3_graph import PROJECTOR, TOWER

_READ = 16_777_216
"""Weights read at once: 64 MB as float32."""
_MODULES = {
    TEXT_PREFIX: "model.language_model.",
    TOWER: "model.vision_tower.",
    PROJECTOR: "model.multi_modal_projector.",
}
"""A checkpoint's prefix -> transformers' own."""


def load(checkpoint: Checkpoint, device: str, dtype: Any) -> Any:
    """Build without weights, then assign each tensor: no second copy of the weights ever exists."""
    transformers: Any = require("transformers", "export")
    accelerate: Any = require("accelerate", "export")
    spec = checkpoint.chat_spec
    kind, config = (
        (transformers.Gemma3ForConditionalGeneration, transformers.Gemma3Config)
        if spec.image
        else (transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig)
    )
    with accelerate.init_empty_weights(include_buffers=False):  # rotations and positions are no weights
        model = kind(config.from_dict(dict(spec.config)))
    state = {_module(name): _tensor(checkpoint, name, device, dtype) for name in spec.tensors}
    state["lm_head.weight"] = next(value for name, value in state.items() if name.endswith("embed_tokens.weight"))
    model.load_state_dict(state, assign=True)
    return model.to(device).eval()


def _module(name: str) -> str:
    prefix = next((prefix for prefix in _MODULES if name.startswith(prefix)), "")
    return _MODULES.get(prefix, "") + name.removeprefix(prefix)


def _tensor(checkpoint: Checkpoint, name: str, device: str, dtype: Any) -> Any:
    """A tensor in the model's precision: mapped from the file where that is bfloat16 too, else converted by rows."""
    torch: Any = require("torch", "export")
    shape = checkpoint.chat_spec.tensors[name]
    entry = checkpoint.entries[name]
    if entry.dtype == "BF16" and dtype == torch.bfloat16 and device == "cpu":
        bits = np.memmap(entry.path, np.int16, "c", entry.start, shape)  # copied on write: the file stays as it is
        mapped = torch.from_numpy(bits).view(torch.bfloat16)
        for rows in mapped.split(_rows_at_once(shape)):
            _check_finite(checkpoint, name, rows)
        return mapped
    tensor = torch.empty(shape, dtype=dtype, device=device)
    start = 0
    for raw in checkpoint.raw_rows(name, _rows_at_once(shape)):
        bfloat16 = raw.dtype == np.uint16
        part = torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16) if bfloat16 else torch.from_numpy(raw)
        _check_finite(checkpoint, name, part)
        tensor[start : start + len(part)] = part
        start += len(part)
    return tensor


def _rows_at_once(shape: tuple[int, ...]) -> int:
    return max(1, _READ // math.prod(shape[1:]))


def _check_finite(checkpoint: Checkpoint, name: str, values: Any) -> None:
    if not values.isfinite().all():
        raise CorruptError(f"'{name}' in {checkpoint.root} holds NaN or infinity", "Use a sound checkpoint")
