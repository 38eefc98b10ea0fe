"""The reference of chat models: transformers' own Gemma 3 on torch, behind the interface of every generator.

bf16 for large checkpoints, as they are published, and fp32 for small ones. Never fp16: Gemma 3's residual stream
passes 65,504 (measured: 103,795 on the real 270M), and what is infinite there is NaN a layer later.

An image goes through medge's own preprocessing, which equals Gemma3ImageProcessor to the last level.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medge.checkpoint import Checkpoint
from medge.errors import UnsupportedError, UsageError, require
from medge.runtimes.base import RunOptions
from medge.runtimes.chat import IMAGE_TOKEN, ChatTemplate, Prompter, thought_marks
from medge.runtimes.generate import (
    GenerateOptions,
    Message,
    Prompt,
    Reply,
    Tally,
    TextStream,
    Token,
    context_size,
    rated,
)
from medge.runtimes.preprocess import preprocess
from medge.runtimes.torch_checkpoint import Vocabulary, chat_template, load
from medge.spec import FloatArray

FP32_PARAMETERS = 1_000_000_000
"""Up to so many weights fp32 is the default: 4 GB."""
_ROWS = 128
"""Logits of so many tokens at once: 134 MB over Gemma's vocabulary."""


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


class _CancelledError(Exception):
    """Raised within a forward pass, to leave it."""


class TorchGenerator:
    """A `Generator`. Every reply is computed anew: it keeps nothing of earlier prompts. Not a medical device."""

    def __init__(self, checkpoint: Checkpoint, *, device: str, dtype: str, context: int) -> None:
        """See `open_reference`."""
        self._torch: Any = require("torch", "export")
        spec = checkpoint.chat_spec
        self.name = f"torch {self._torch.__version__} {self._device_name(device)} {dtype}"
        self.context, self.image, self.image_tokens = context, spec.image, spec.chat.image_tokens
        self._device = device
        template = ChatTemplate(chat_template(checkpoint.root, spec.chat.template), spec.chat)
        self._vocabulary = Vocabulary(checkpoint.root)
        self._stop = {self._vocabulary.special(text) for text in spec.chat.stop}
        self._image_id = self._vocabulary.special(IMAGE_TOKEN) if spec.image else -1
        self._thought = thought_marks(self._vocabulary.tokenize)
        self._prompter = Prompter(
            template, self._vocabulary.tokenize, self._image_id, self.image_tokens, context, spec.chat.context
        )
        self._dtype = {"fp32": self._torch.float32, "bf16": self._torch.bfloat16}[dtype]
        self._model = load(checkpoint, device, self._dtype)
        self._cancelled: Callable[[], bool] = _never
        for layer in _layers(self._model):
            layer.register_forward_pre_hook(self._watch)
        self._turn = 0

    def generate(
        self,
        messages: Sequence[Message],
        options: GenerateOptions | None = None,
        *,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Reply:
        """See `Generator.generate`.

        Raises:
            UnsupportedError: a schema or a grammar, which the reference does not enforce.
        """
        options = options or GenerateOptions()
        if options.constrained:
            raise UnsupportedError("The torch reference enforces no schema or grammar", "Use a GGUF artifact")
        prompt = self.prompt(messages)
        self._check(prompt)
        tally = Tally(prompt_tokens=len(prompt.ids))
        return Reply(self._answer(self._begin(cancelled), prompt, options, tally), tally)

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """See `Generator.prompt`."""
        return self._prompter(messages)

    def tokenize(self, text: str) -> list[int]:
        """See `Generator.tokenize`."""
        return self._vocabulary.tokenize(text)

    def logits(self, prompt: Prompt) -> Iterator[FloatArray]:
        """See `Generator.logits`."""
        self._check(prompt)
        turn = self._begin(_never)
        with self._torch.inference_mode():
            hidden = self._hidden(prompt, self._features(prompt, Tally()))
        for start in range(0, hidden.shape[0], _ROWS):
            self._check_turn(turn)
            yield self._logits(hidden[start : start + _ROWS])

    def forget(self) -> None:
        """See `Generator.forget`."""
        self._begin(_never)

    def close(self) -> None:
        """See `Generator.close`."""
        self._model, self._turn = None, -1

    def _device_name(self, device: str) -> str:
        return str(self._torch.cuda.get_device_name()) if device == "cuda" else device

    def _check(self, prompt: Prompt) -> None:
        self._prompter.check_fits(prompt)
        if prompt.ids.count(self._image_id) != len(prompt.images) * self.image_tokens:
            raise UsageError("The prompt's image tokens are not those of its images")
        if not prompt.ids or prompt.ids[-1] == self._image_id:
            raise UsageError("A prompt ends in a text token")

    def _begin(self, cancelled: Callable[[], bool]) -> int:
        if self._turn < 0:
            raise UsageError("The generator is closed", "Open the checkpoint again")
        self._turn += 1
        self._cancelled = cancelled
        return self._turn

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise UsageError("A later reply has begun on this generator, or it is closed", "Take one reply at a time")

    def _watch(self, *_: Any) -> None:
        if self._cancelled():
            raise _CancelledError

    def _answer(self, turn: int, prompt: Prompt, options: GenerateOptions, tally: Tally) -> Iterator[Token]:
        stream = TextStream(options.stop, self._thought)
        limit = min(options.max_tokens, self.context - len(prompt.ids))
        self._check_turn(turn)
        for token in self._sampled(prompt, options, limit, tally):
            yield from stream.push(token, self._vocabulary.piece(token.id))
            self._check_turn(turn)
            if stream.stopped:
                tally.finish = "stop"
                return
        yield from stream.flush()

    def _sampled(self, prompt: Prompt, options: GenerateOptions, limit: int, tally: Tally) -> Iterator[Token]:
        """Tokens until the turn ends; each is computed when the one after it is asked for."""
        choose = Chooser(options)
        try:
            cache, logits = self._prefill(prompt, tally)
            for count in range(1, limit + 1):
                chosen = choose(logits)
                if chosen in self._stop:
                    tally.finish = "stop"
                    return
                tally.finish = "length" if count == limit else None
                yield rated(chosen, logits, options.logprobs) if options.logprobs else Token(chosen, "")
                if count < limit:
                    logits = self._step(chosen, cache, tally)
        except _CancelledError:
            tally.finish = "cancelled"

    def _prefill(self, prompt: Prompt, tally: Tally) -> tuple[Any, FloatArray]:
        """The filled cache of keys and values, and (vocabulary,) logits after the prompt."""
        cache = require("transformers", "export").DynamicCache(config=self._model.config)
        with self._torch.inference_mode():
            features = self._features(prompt, tally)
            with _timed(tally, "prefill"):
                hidden = self._hidden(prompt, features, cache)
                logits: FloatArray = self._logits(hidden[-1:])[0]
        return cache, logits

    def _step(self, token: int, cache: Any, tally: Tally) -> FloatArray:
        with self._torch.inference_mode(), _timed(tally, "decode"):
            ids = self._torch.tensor([[token]], device=self._device)
            state = self._model.model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
            logits: FloatArray = self._logits(state[0])[0]
        return logits

    def _features(self, prompt: Prompt, tally: Tally) -> Any:
        """(images · tokens, D) embeddings of the images, or None without any. One at a time: memory stays one high."""
        if not prompt.images or self.image is None:
            return None
        rows = []
        with _timed(tally, "vision"):
            for picture in prompt.images:
                pixels = self._torch.from_numpy(preprocess(picture, self.image)[None]).to(self._device, self._dtype)
                rows.append(self._model.model.get_image_features(pixels)[0])
                tally.images_encoded += 1
        return self._torch.cat(rows)

    def _hidden(self, prompt: Prompt, features: Any, cache: Any = None) -> Any:
        """(N, D) final states of a whole prompt: in one pass, since an image's tokens see those after them."""
        torch, body = self._torch, self._model.model
        ids = torch.tensor([prompt.ids], device=self._device)
        is_image = ids == self._image_id
        embeds = self._model.get_input_embeddings()(ids.masked_fill(is_image, 0))
        extra: dict[str, Any] = {}
        if features is not None:
            embeds = embeds.masked_scatter(is_image[..., None], features.to(embeds.dtype))
            extra["token_type_ids"] = is_image.long()
        state = body(inputs_embeds=embeds, past_key_values=cache, use_cache=cache is not None, **extra)
        return state.last_hidden_state[0]

    def _logits(self, hidden: Any) -> FloatArray:
        with self._torch.inference_mode():
            logits: FloatArray = self._model.lm_head(hidden).float().cpu().numpy()
        return logits


class Chooser:
    """Draws tokens as generate.py defines it, with transformers' own processors."""

    def __init__(self, options: GenerateOptions) -> None:
        self._torch: Any = require("torch", "export")
        self._greedy = options.temperature == 0
        self._warpers = [] if self._greedy else list(_warpers(options))
        self._random = self._torch.Generator().manual_seed(options.seed)

    def __call__(self, logits: FloatArray) -> int:
        """The next token by (vocabulary,) logits."""
        if self._greedy:
            return int(logits.argmax())
        scores = self._torch.from_numpy(logits)[None]
        for warper in self._warpers:
            scores = warper(None, scores)
        return int(self._torch.multinomial(scores.softmax(-1), 1, generator=self._random))


def _warpers(options: GenerateOptions) -> Iterator[Any]:
    kinds = require("transformers", "export")
    if options.top_k:
        yield kinds.TopKLogitsWarper(options.top_k)
    yield kinds.TemperatureLogitsWarper(float(options.temperature))
    if options.top_p < 1:
        yield kinds.TopPLogitsWarper(float(options.top_p))
    if options.min_p:
        yield kinds.MinPLogitsWarper(options.min_p)


def _layers(model: Any) -> Iterator[Any]:
    """Where a forward pass is asked whether to go on."""
    body = model.model
    yield from getattr(body, "language_model", body).layers
    if hasattr(body, "vision_tower"):
        yield from body.vision_tower.vision_model.encoder.layers


def _never() -> bool:
    return False


@contextmanager
def _timed(tally: Tally, phase: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        tally.seconds[phase] += time.perf_counter() - start
