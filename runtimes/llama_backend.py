"""Chat models in GGUF on llama.cpp, which owns its loop: the Generator over it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from medge.errors import ContextError, CorruptError, UsageError
from medge.manifest import Artifact
from medge.runtimes.base import RunOptions
from medge.runtimes.chat import IMAGE_TOKEN, ChatTemplate
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
from medge.runtimes.images import load_image
from medge.runtimes.llama_context import Context, Watch, never
from medge.runtimes.llama_model import Model
from medge.runtimes.llama_prefix import Cell, Pixels, Prefix, image_hash
from medge.runtimes.llama_sampler import Sampler
from medge.runtimes.llama_vision import Vision, check_tower
from medge.runtimes.onnx_backend import physical_cores
from medge.runtimes.preprocess import resize
from medge.spec import ChatFormat, FloatArray

DECODER, VISION = "decoder", "vision"


@dataclass(frozen=True)
class _Plan:
    """A checked prompt: what stands where, its last token apart, and the pixels of its images."""

    cells: list[Cell]
    last: int
    pixels: Mapping[str, Pixels]
    tokens: int


class LlamaGenerator:
    """A `Generator`. Weights stay mapped from the file. Not a medical device."""

    def __init__(self, artifact: Artifact, options: RunOptions) -> None:
        """Open a chat artifact.

        Raises:
            MissingExtraError: llama-cpp-python is not installed.
            UsageError: a context outside what the model was made for, or more than memory holds.
            CorruptError: the artifact contradicts itself, or llama.cpp cannot load it.
        """
        self._chat = chat = _chat(artifact)
        self.image = artifact.manifest.image if VISION in artifact.manifest.parts else None
        self.image_tokens = chat.image_tokens
        self.context = context_size(options, chat)
        self._template = ChatTemplate.open(artifact.file(chat.template), chat)
        self._model = Model(artifact.part_path(DECODER))
        self.name = _name(self._model)
        self._stop = {self._model.special(text) for text in chat.stop}
        self._image_id = self._model.special(IMAGE_TOKEN) if self.image else -1
        self._watch = Watch()
        threads = options.threads or physical_cores()
        self._native = Context(self._model, self.context, threads, self._watch, chat.image_tokens if self.image else 0)
        self._prefix = Prefix(self._native, self._tower(artifact, threads), chat.image_tokens, self._watch)
        self._turn = 0

    def _tower(self, artifact: Artifact, threads: int) -> Callable[[], Vision] | None:
        """The tower, loaded with the first image: who asks about text alone needs none."""
        if self.image is None:
            return None
        path = artifact.part_path(VISION)
        check_tower(path, self.image.size)
        return partial(Vision, path, self._model, threads, self.image_tokens, self._watch)

    def generate(
        self,
        messages: Sequence[Message],
        options: GenerateOptions | None = None,
        *,
        cancelled: Callable[[], bool] = never,
    ) -> Reply:
        """See `Generator.generate`."""
        options = options or GenerateOptions()
        plan = self._plan(self.prompt(messages))
        sampler = Sampler(self._model, options)
        tally = Tally(prompt_tokens=plan.tokens)
        return Reply(self._answer(self._begin(cancelled), plan, sampler, options, tally), tally)

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """See `Generator.prompt`."""
        texts, images = self._template.pieces(messages)
        if images and self.image is None:
            raise UsageError(
                "An image is given and the model has no image tower", "Use a multimodal model, or leave the image out"
            )
        pictures = tuple(load_image(image) for image in images)
        ids = self.tokenize(texts[0])
        for text in texts[1:]:
            ids += [self._image_id] * self.image_tokens + self.tokenize(text)
        return Prompt(tuple(ids), pictures)

    def tokenize(self, text: str) -> list[int]:
        """See `Generator.tokenize`."""
        self._check_open()
        return self._model.tokenize(text)

    def logits(self, prompt: Prompt) -> Iterator[FloatArray]:
        """See `Generator.logits`."""
        plan = self._plan(prompt)
        turn = self._begin(never)
        for block in self._prefix.blocks([*plan.cells, plan.last], plan.pixels):
            yield block
            self._check_turn(turn)

    def forget(self) -> None:
        """See `Generator.forget`."""
        self._begin(never)
        self._prefix.forget()

    def close(self) -> None:
        """See `Generator.close`."""
        self._turn = -1
        for part in (self._prefix, self._native, self._model):
            part.close()

    def _plan(self, prompt: Prompt) -> _Plan:
        """Images in place of their tokens, and whether all of it fits."""
        tokens = len(prompt.ids)
        if tokens >= self.context:
            raise ContextError(
                f"The prompt has {tokens:,} tokens ({len(prompt.images)} images of {self.image_tokens});"
                f" {self.context - 1:,} fit beside an answer",
                f"Shorten it, or open the artifact with a larger context: the model's own is {self._chat.context:,}",
            )
        spec = self.image
        pixels = [resize(picture, spec) for picture in prompt.images] if spec else []
        hashes = [image_hash(each) for each in pixels]
        *cells, last = self._cells(prompt, hashes) or [""]
        if isinstance(last, str):
            raise UsageError("A prompt ends in a text token")
        return _Plan(cells, last, dict(zip(hashes, pixels, strict=True)), tokens)

    def _cells(self, prompt: Prompt, hashes: Sequence[str]) -> list[Cell]:
        if not all(0 <= i < self._model.vocabulary_size for i in prompt.ids):
            raise UsageError(f"A token of the prompt is none of the model's {self._model.vocabulary_size:,}")
        cells: list[Cell] = []
        remaining = iter(hashes)
        for is_image, run in groupby(prompt.ids, self._image_id.__eq__):
            ids = list(run)
            whole, rest = divmod(len(ids), self.image_tokens) if is_image else (0, 0)
            places = [next(remaining, "") for _ in range(whole)]
            if rest or "" in places:
                raise UsageError("The prompt's image tokens are not those of its images")
            cells += places if is_image else ids
        if next(remaining, ""):
            raise UsageError("The prompt has more images than places for them")
        return cells

    def _begin(self, cancelled: Callable[[], bool]) -> int:
        """A new turn on the one context; the one before may not go on."""
        self._check_open()
        self._turn += 1
        self._watch.begin(cancelled)
        return self._turn

    def _check_open(self) -> None:
        if self._turn < 0:
            raise UsageError("The generator is closed", "Open the artifact again")

    def _check_turn(self, turn: int) -> None:
        if turn != self._turn:
            raise UsageError("A later reply has begun on this generator, or it is closed", "Take one reply at a time")

    def _answer(
        self, turn: int, plan: _Plan, sampler: Sampler, options: GenerateOptions, tally: Tally
    ) -> Iterator[Token]:
        stream = TextStream(options.stop)
        try:
            self._check_turn(turn)
            if not self._prefix.fill(plan.cells, plan.last, plan.pixels, tally):
                tally.finish = "cancelled"
                return
            self._native.logits()  # a model that gives no numbers is found here, and not sampled from
            limit = min(options.max_tokens, self.context - plan.tokens)
            for token in self._sampled(sampler, limit, options.logprobs, tally):
                yield from stream.push(token, self._model.piece(token.id))
                self._check_turn(turn)
                if stream.stopped:
                    tally.finish = "stop"
                    return
            yield from stream.flush()
        finally:
            sampler.close()

    def _sampled(self, sampler: Sampler, limit: int, logprobs: int, tally: Tally) -> Iterator[Token]:
        """Tokens until the turn ends; each is computed when the one after it is asked for."""
        start = time.perf_counter()
        for count in range(1, limit + 1):
            chosen = sampler.sample(self._native)
            if chosen is None or chosen in self._stop or self._model.ends(chosen):
                tally.finish = "stop"
                return
            token = rated(chosen, self._native.logits(), logprobs) if logprobs else Token(chosen, "")
            sampler.accept(chosen)
            tally.seconds["decode"] += time.perf_counter() - start
            if count == limit:
                tally.finish = "length"
            yield token
            if count == limit:
                return
            if self._watch.check():
                tally.finish = "cancelled"
                return
            start = time.perf_counter()
            self._prefix.append(chosen)


def _chat(artifact: Artifact) -> ChatFormat:
    manifest = artifact.manifest
    if manifest.chat is None:
        raise CorruptError(f"{artifact.root} states no chat format", "Export it again")
    if VISION in manifest.parts and manifest.image is None:
        raise CorruptError(f"{artifact.root} has an image tower and states no image size", "Export it again")
    return manifest.chat


def _name(model: Model) -> str:
    device = "gpu" if model.api.llama_supports_gpu_offload() else "cpu"
    return f"llama.cpp (llama-cpp-python {model.api.__version__}) {device}"
