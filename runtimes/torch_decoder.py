"""transformers' own Gemma 3 in torch as a decoder and an image tower of the loop that all generators share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from medge.errors import CorruptError, require
from medge.runtimes.prefix import Pixels
from medge.runtimes.preprocess import normalized
from medge.runtimes.watch import Watch
from medge.spec import FloatArray, ImageSpec


class _LeftError(Exception):
    """Raised within a forward pass, to leave it."""


class TorchModel:
    """A model whose layers ask whether to go on."""

    def __init__(self, model: Any, device: str, watch: Watch) -> None:
        self.torch: Any = require("torch", "export")
        self.model, self.device, self.watch = model, device, watch
        self.dtype = next(model.parameters()).dtype
        for layer in self._layers():
            layer.register_forward_pre_hook(self._ask)

    def _layers(self) -> Iterator[Any]:
        body = self.model.model
        yield from getattr(body, "language_model", body).layers
        if hasattr(body, "vision_tower"):
            yield from body.vision_tower.vision_model.encoder.layers

    def _ask(self, *_: Any) -> None:
        if self.watch():
            raise _LeftError

    @contextmanager
    def running(self) -> Iterator[list[bool]]:
        """A forward pass within; what it yields holds an item once the pass was left."""
        left: list[bool] = []
        with self.torch.inference_mode():
            try:
                yield left
            except _LeftError:
                left.append(True)

    def finite(self, values: Any) -> FloatArray:
        """As a float32 array.

        Raises:
            CorruptError: there are values that are no numbers.
        """
        found: FloatArray = values.float().cpu().numpy()
        if not np.isfinite(found).all():
            raise CorruptError("The checkpoint gives NaN or infinity", "Use a sound checkpoint")
        return found


class TorchDecoder:
    """A `Decoder`. Keys and values are kept in full, so that any earlier place can be returned to."""

    def __init__(self, model: TorchModel) -> None:
        self._model = model
        self._body = getattr(model.model.model, "language_model", model.model.model)
        self._rows: FloatArray = np.empty((0, 0), np.float32)
        self._masks: Any = require("transformers.masking_utils", "export")
        self.clear()

    def keep(self, length: int) -> bool:
        """See `Decoder.keep`."""
        if not length or not self._whole:
            self.clear()
            return False
        self._cache.crop(length)
        return True

    def clear(self) -> None:
        """See `Decoder.clear`."""
        self._cache: Any = require("transformers", "export").DynamicCache()
        self._whole = True

    def step(self, token: int) -> None:
        """See `Decoder.step`."""
        self.tokens([token], 1)

    def tokens(self, ids: Sequence[int], outputs: int = 0) -> bool:
        """See `Decoder.tokens`."""
        found = self._model.torch.tensor([list(ids)], device=self._model.device)
        with self._model.torch.inference_mode():
            embeddings = self._model.model.get_input_embeddings()(found)
        return self._append(embeddings, outputs, image=False)

    def image(self, embeddings: FloatArray, outputs: int = 0) -> bool:
        """See `Decoder.image`."""
        rows = self._model.torch.from_numpy(embeddings[None]).to(self._model.device, self._model.dtype)
        return self._append(rows, outputs, image=True)

    def logits(self) -> FloatArray:
        """See `Decoder.logits`."""
        row: FloatArray = self._rows[-1].copy()
        return row

    def block(self, count: int) -> FloatArray:
        """See `Decoder.block`."""
        return self._rows[-count:].copy()

    def close(self) -> None:
        """See `Decoder.close`."""
        self.clear()

    def _append(self, embeddings: Any, outputs: int, *, image: bool) -> bool:
        first = self._cache.get_seq_length()
        positions = self._model.torch.arange(first, first + embeddings.shape[1], device=self._model.device)
        with self._model.running() as left:
            state = self._body(
                inputs_embeds=embeddings,
                attention_mask=self._mask(embeddings, positions, _within(first) if image else None),
                cache_position=positions,
                past_key_values=self._cache,
                use_cache=True,
            ).last_hidden_state[0]
            if outputs:
                self._rows = self._model.finite(self._model.model.lm_head(state[-outputs:]))
        self._whole = not left
        return self._whole

    def _mask(self, embeddings: Any, positions: Any, among: Callable[..., Any] | None) -> dict[str, Any]:
        """transformers' own masks, and what may be seen beyond them."""
        given = {
            "config": self._body.config,
            "input_embeds": embeddings,
            "attention_mask": None,
            "cache_position": positions,
            "past_key_values": self._cache,
            "position_ids": positions[None],
        }
        if among is not None:
            given["or_mask_function"] = among
        return {
            "full_attention": self._masks.create_causal_mask(**given),
            "sliding_attention": self._masks.create_sliding_window_causal_mask(**given),
        }


def _within(first: int) -> Callable[..., Any]:
    """An image's tokens see each other: all from its first on, since they are computed at once."""
    return lambda batch, head, query, key: key >= first


class TorchVision:
    """An `Encoder`."""

    def __init__(self, model: TorchModel, image: ImageSpec) -> None:
        self._model, self._image = model, image

    def encode(self, pixels: Pixels) -> FloatArray | None:
        """See `Encoder.encode`."""
        values = self._model.torch.from_numpy(normalized(pixels, self._image)[None])
        with self._model.running() as left:
            found = self._model.model.model.get_image_features(values.to(self._model.device, self._model.dtype))[0]
        return None if left else self._model.finite(found)

    def close(self) -> None:
        """See `Encoder.close`."""
