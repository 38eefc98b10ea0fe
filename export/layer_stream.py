"""A Gemma 3 forward pass that holds one decoder layer at a time: calibration of a model larger than the memory.

The computation is transformers' own, layer for layer; only who holds the weights is ours. Masks and rotations come
from a pass through transformers' model with layers that compute nothing and note what they were given. The image
tower is the same 0.8 GB (bf16) in every model of the family, and is held whole while it encodes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from medge.checkpoint import Checkpoint
from medge.errors import require
from medge.models.gemma3 import TEXT_PREFIX
from medge.models.gemma3_graph import PROJECTOR, TOWER
from medge.quantize.ggml_blocks import widened
from medge.runtimes.generate import Prompt
from medge.runtimes.preprocess import preprocess

OnInput = Callable[[str, Any], None]
"""on_input(tensor, x): a linear layer's weight, by the checkpoint's name, and what it multiplies, a torch (..., in)."""
_READ = 16_777_216
"""Embedding values read at once: 64 MB as float32."""


def forward(
    checkpoint: Checkpoint,
    prompts: Sequence[Prompt],
    dtype: str,
    on_input: OnInput,
    on_step: Callable[[int], None] = lambda done: None,
) -> list[Any]:
    """(tokens, D) final states of each prompt, as torch tensors: the output matrix times them are the logits.

    `dtype` is "fp32" or "bf16". `on_step(1)` is called after each image and each decoder layer.

    Raises:
        MissingExtraError: torch, transformers or accelerate is not installed.
        CorruptError: a weight is not finite.
    """
    torch: Any = require("torch", "export")
    # transformers imports torchao where it is installed, and torchao's import makes torch log a deprecation.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    with torch.inference_mode():
        return _Pass(checkpoint, dtype, on_input).run(prompts, on_step)


def steps(checkpoint: Checkpoint, prompts: Sequence[Prompt]) -> int:
    """How often `forward` calls `on_step`."""
    config = checkpoint.chat_spec.config
    layers: int = config.get("text_config", config)["num_hidden_layers"]
    return layers + sum(len(prompt.images) for prompt in prompts)


class _Pass:
    """One pass of some prompts."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, on_input: OnInput) -> None:
        self._torch: Any = require("torch", "export")
        self._checkpoint, self._on_input = checkpoint, on_input
        self._dtype = {"fp32": self._torch.float32, "bf16": self._torch.bfloat16}[dtype]
        self._image: Any = checkpoint.chat_spec.image
        self._prefix = TEXT_PREFIX if self._image else "model."
        self._model = self._empty()
        self._text = self._model.language_model if self._image else self._model

    def run(self, prompts: Sequence[Prompt], on_step: Callable[[int], None]) -> list[Any]:
        """Images, then embeddings, then layer after layer."""
        layers, self._text.layers = self._text.layers, _notes(self._torch)
        self._fill(self._text.norm, f"{self._prefix}norm.")
        features = self._features(prompts, on_step)
        self._text.embed_tokens.weight = self._embeddings(prompts)
        begun = [self._begin(prompt, found) for prompt, found in zip(prompts, features, strict=True)]
        hidden, given = [state for state, _ in begun], [arguments for _, arguments in begun]
        for i, layer in enumerate(layers):
            self._fill(layer, f"{self._prefix}layers.{i}.")
            self._watch(layer, f"{self._prefix}layers.{i}.")
            hidden = [layer(x, **kinds[layer.attention_type])[0] for x, kinds in zip(hidden, given, strict=True)]
            layer.to("meta")
            on_step(1)
        return [self._text.norm(x)[0] for x in hidden]

    def _empty(self) -> Any:
        """transformers' model without weights and without its output matrix."""
        transformers: Any = require("transformers", "export")
        kinds = (
            (transformers.Gemma3Model, transformers.Gemma3Config)
            if self._image
            else (transformers.Gemma3TextModel, transformers.Gemma3TextConfig)
        )
        with require("accelerate", "export").init_empty_weights(include_buffers=False):
            return kinds[0](kinds[1].from_dict(dict(self._checkpoint.chat_spec.config))).eval()

    def _fill(self, module: Any, prefix: str) -> None:
        """Give a module the checkpoint's weights below `prefix`."""
        state = {name: self._read(prefix + name) for name in module.state_dict()}
        module.load_state_dict(state, assign=True)

    def _read(self, name: str) -> Any:
        return self._torch.from_numpy(self._checkpoint.read(name)).to(self._dtype)

    def _watch(self, module: Any, prefix: str) -> None:
        """Report what every linear layer below a module multiplies."""
        for name, linear in module.named_modules():
            if isinstance(linear, self._torch.nn.Linear):
                tensor = f"{prefix}{name}.weight"
                linear.register_forward_pre_hook(lambda _, x, tensor=tensor: self._on_input(tensor, x[0]))

    def _features(self, prompts: Sequence[Prompt], on_step: Callable[[int], None]) -> list[Any]:
        """(images · tokens, D) of each prompt, None without images. Image after image: memory stays one high."""
        if not any(prompt.images for prompt in prompts):
            return [None] * len(prompts)
        parts = {TOWER: self._model.vision_tower, PROJECTOR: self._model.multi_modal_projector}
        for prefix, part in parts.items():
            self._fill(part, prefix)
            self._watch(part, prefix)
        found = [self._encoded(prompt, on_step) if prompt.images else None for prompt in prompts]
        for part in parts.values():
            part.to("meta")
        return found

    def _encoded(self, prompt: Prompt, on_step: Callable[[int], None]) -> Any:
        found = []
        for picture in prompt.images:
            pixels = self._torch.from_numpy(preprocess(picture, self._image)[None]).to(self._dtype)
            found.append(self._model.get_image_features(pixels)[0])
            on_step(1)
        return self._torch.cat(found)

    def _embeddings(self, prompts: Sequence[Prompt]) -> Any:
        """The rows of the embedding table that the prompts use, one after another; `_rows` says which is where."""
        name = f"{self._prefix}embed_tokens.weight"
        vocabulary, width = self._checkpoint.chat_spec.tensors[name]
        self._rows = np.unique(np.concatenate([prompt.ids for prompt in prompts]).clip(max=vocabulary - 1))
        step, found = max(1, _READ // width), []
        for i, rows in enumerate(self._checkpoint.raw_rows(name, step)):
            found.append(widened(rows[self._rows[self._rows // step == i] - i * step]))
        table = self._torch.from_numpy(np.concatenate(found)).to(self._dtype)
        return self._torch.nn.Parameter(table, requires_grad=False)

    def _begin(self, prompt: Prompt, features: Any) -> tuple[Any, dict[str, dict[str, Any]]]:
        """(1, tokens, D) embeddings, and what layers of either kind of attention are given beside them."""
        ids = self._torch.from_numpy(np.searchsorted(self._rows, prompt.ids))[None]
        embeds, extra = self._text.embed_tokens(ids), {}
        if features is not None:
            is_image = self._torch.tensor([prompt.ids]) == self._model.config.image_token_id
            embeds = embeds.masked_scatter(is_image[..., None], features.to(embeds.dtype))
            extra["token_type_ids"] = is_image.long()
        self._model(inputs_embeds=embeds, use_cache=False, **extra)
        return embeds, {note.attention_type: note.given for note in self._text.layers}


def _notes(torch: Any) -> Any:
    """A layer of each kind that computes nothing and keeps what it was given."""

    class Note(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, attention_type: str) -> None:
            super().__init__()
            self.attention_type = attention_type
            self.given: dict[str, Any] = {}

        def forward(self, hidden: Any, **given: Any) -> tuple[Any]:
            self.given = given
            return (hidden,)

    return torch.nn.ModuleList([Note("sliding_attention"), Note("full_attention")])
