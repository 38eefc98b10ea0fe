"""The reference of chat models: transformers' own Gemma 3 on torch, behind the interface of every generator.

bf16 for large checkpoints, as they are published, and fp32 for small ones. Never fp16: Gemma 3's residual stream
passes 65,504 (measured: 103,795 on the real 270M), and what is infinite there is NaN a layer later.

An image goes through medge's own preprocessing, which equals Gemma3ImageProcessor to the last level.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from medge.checkpoint import Checkpoint
from medge.errors import UnsupportedError, UsageError, require
from medge.runtimes.base import RunOptions
from medge.runtimes.chat import ChatTemplate
from medge.runtimes.generate import context_size
from medge.runtimes.guidance import array_sampler
from medge.runtimes.loop import Engine, LoopGenerator
from medge.runtimes.torch_checkpoint import load
from medge.runtimes.torch_decoder import TorchDecoder, TorchModel, TorchVision
from medge.runtimes.vocabulary import VOCABULARY, Vocabulary
from medge.runtimes.watch import Watch

FP32_PARAMETERS = 1_000_000_000
"""Up to so many weights fp32 is the default: 4 GB."""


def open_reference(
    checkpoint: Checkpoint | str | Path,
    *,
    device: str | None = None,
    dtype: str | None = None,
    options: RunOptions | None = None,
) -> TorchGenerator:
    """A Generator over the checkpoint itself.

    `device` is "cpu" or "cuda" (default: cuda where there is one); `dtype` is "fp32" or "bf16" (default: fp32 up to
    `FP32_PARAMETERS`, bf16 above).

    Raises:
        MissingExtraError: torch, transformers or accelerate is not installed.
        UsageError: cuda was asked for and there is none, or a context that the model was not made for.
        UnsupportedError: fp16, in which Gemma 3 overflows, or the checkpoint is no chat model.
        WeightsError, CorruptError: the checkpoint is incomplete or unsound.
    """
    torch: Any = require("torch", "export")
    # transformers imports torchao where it is installed, and torchao's import makes torch log a deprecation.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    require("transformers", "export")
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint.open(checkpoint)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("There is no CUDA device here", "Pass --device cpu")
    dtype = dtype or ("fp32" if checkpoint.chat_spec.parameters <= FP32_PARAMETERS else "bf16")
    if dtype == "fp16":
        raise UnsupportedError("Gemma 3 overflows in fp16: its activations pass 65,504", "Use bf16 or fp32")
    if options and options.threads:
        torch.set_num_threads(options.threads)
    return TorchGenerator(
        checkpoint, device=device, dtype=dtype, context=context_size(options, checkpoint.chat_spec.chat)
    )


class TorchGenerator(LoopGenerator):
    """A `Generator`. Not a medical device."""

    def __init__(self, checkpoint: Checkpoint, *, device: str, dtype: str, context: int) -> None:
        """See `open_reference`."""
        torch: Any = require("torch", "export")
        spec = checkpoint.chat_spec
        device_name = torch.cuda.get_device_name() if device == "cuda" else device
        template = ChatTemplate(checkpoint.chat_template(), spec.chat)
        self._model = load(checkpoint, device, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
        vocabulary = Vocabulary(checkpoint.root / VOCABULARY, self._model.lm_head.out_features)
        model = TorchModel(self._model, device, Watch())
        decoder, tower = TorchDecoder(model), partial(TorchVision, model, spec.image) if spec.image else None
        name, sampler = (
            f"torch {torch.__version__} {device_name} {dtype}",
            array_sampler(vocabulary, spec.chat, decoder),
        )
        engine = Engine(name, vocabulary, decoder, tower, sampler, model.watch)
        super().__init__(spec.chat, spec.image, template, context, engine)

    def close(self) -> None:
        """See `Generator.close`."""
        super().close()
        self._model = None
