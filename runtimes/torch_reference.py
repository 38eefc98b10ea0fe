"""The reference: transformers' own model on torch, fp16 on a GPU, fp32 on a CPU, always named.

The only runtime that imports torch. Weights come from `Checkpoint`, tensor by tensor, so that a tower costs
its own size and no copy.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medge.checkpoint import Checkpoint
from medge.errors import UsageError, require
from medge.runtimes.base import RunOptions, Tensors
from medge.runtimes.embed import IMAGE, Embedder
from medge.spec import FloatArray, Variant


def open_reference(
    checkpoint: Checkpoint | str | Path,
    *,
    variant: Variant | None = None,
    device: str | None = None,
    dtype: str | None = None,
    options: RunOptions | None = None,
) -> Embedder:
    """An Embedder over the checkpoint itself.

    `device` is "cpu" or "cuda" (default: cuda where there is one); `dtype` is "fp32", "fp16" or "bf16"
    (default: fp16 on cuda, fp32 on the cpu).

    Raises:
        MissingExtraError: torch or transformers is not installed.
        UsageError: cuda was asked for and there is none.
    """
    torch = require_torch()
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint.open(checkpoint)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("There is no CUDA device here", "Pass --device cpu")
    dtype = dtype or ("fp16" if device == "cuda" else "fp32")
    if options and options.threads:
        torch.set_num_threads(options.threads)
    spec = checkpoint.spec
    return Embedder(
        partial(TorchSession, checkpoint, device=device, dtype=dtype),
        name=f"torch {torch.__version__} {_device_name(torch, device)} {dtype}",
        image=spec.image.model_copy(update={"variant": variant}) if variant else spec.image,
        tokenizer=(checkpoint.tokenizer_file(), spec.tokenizer),
        scalars=checkpoint.scalars(),
        root=checkpoint.root,
        batch_size=8 if device == "cuda" else 1,
    )


def require_torch() -> Any:
    """torch, with transformers ready beside it.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    torch = require("torch", "export")
    # transformers imports torchao where it is installed, and torchao's import makes torch log a deprecation.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    require("transformers", "export")
    return torch


def _device_name(torch: Any, device: str) -> str:
    return str(torch.cuda.get_device_name()) if device == "cuda" else device


class TorchSession:
    """One tower of a SiglipModel."""

    def __init__(self, checkpoint: Checkpoint, part: str, *, device: str, dtype: str, onednn: bool = True) -> None:
        self._torch = torch = require_torch()
        self._device = device
        self._dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
        self._output = "image_embeds" if part == IMAGE else "text_embeds"
        self.module = _load(checkpoint, part, device, self._dtype)
        fp32_on_cpu = device == "cpu" and dtype == "fp32" and part == IMAGE  # a prompt is too short to pay for it
        if onednn and fp32_on_cpu and torch.backends.mkldnn.is_available():
            _use_onednn(self.module)

    def run(self, inputs: Tensors) -> dict[str, FloatArray]:
        """The tower's pooled output."""
        torch = self._torch
        values = {
            name: torch.from_numpy(np.ascontiguousarray(value)).to(self._device) for name, value in inputs.items()
        }
        values = {name: v.to(self._dtype) if v.is_floating_point() else v for name, v in values.items()}
        with torch.inference_mode():
            pooled = self.module(**values).pooler_output
        return {self._output: pooled.float().cpu().numpy()}


def _load(checkpoint: Checkpoint, part: str, device: str, dtype: Any) -> Any:
    """Build on the meta device, then assign each tensor: no second copy of the weights ever exists."""
    import torch
    from transformers import SiglipConfig, SiglipTextModel, SiglipVisionModel

    config = SiglipConfig.from_dict(dict(checkpoint.spec.config))
    with torch.device("meta"):
        if part == IMAGE:
            model, prefix = SiglipVisionModel(config.vision_config), "vision_model."
        else:
            model, prefix = SiglipTextModel(config.text_config), "text_model."
    state = {
        name: torch.from_numpy(checkpoint.read(name)).to(device, dtype)
        for name in checkpoint.spec.tensors
        if name.startswith(prefix)
    }
    model.load_state_dict(state, assign=True)
    embeddings = model.vision_model.embeddings if part == IMAGE else model.text_model.embeddings
    count = embeddings.position_embedding.num_embeddings
    embeddings.position_ids = torch.arange(count, device=device).expand(1, -1)  # a buffer outside the checkpoint
    return model.eval()


def _use_onednn(module: Any) -> None:
    """Linear layers through oneDNN: the same fp32 products, twice as fast as MKL's on processors it does not favour."""
    import torch
    from torch.utils.mkldnn import MkldnnLinear

    for name, child in module.named_children():
        if type(child) is torch.nn.Linear:
            with torch.no_grad():
                setattr(module, name, MkldnnLinear(child, torch.float32))
        else:
            _use_onednn(child)
