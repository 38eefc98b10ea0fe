"""The loop that every generator shares, but for the reference: prompt to cells, cells to the cache, tokens one by one.

What differs between engines comes as four things: a vocabulary, a decoder with its cache, an image tower, a sampler.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

from medge.errors import CorruptError, UsageError
from medge.manifest import Artifact
from medge.runtimes.chat import IMAGE_TOKEN, ChatTemplate, Prompter, thought_marks
from medge.runtimes.generate import GenerateOptions, Message, Prompt, Reply, Tally, TextStream, Token, rated
from medge.runtimes.prefix import Cell, Decoder, Encoder, Pixels, Prefix, image_hash
from medge.runtimes.preprocess import resize
from medge.runtimes.watch import Watch, never
from medge.spec import ChatFormat, FloatArray, ImageSpec

DECODER, VISION = "decoder", "vision"


class Vocabulary(Protocol):
    """Text to ids and back."""

    @property
    def vocabulary_size(self) -> int:
        """How many ids there are."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, special tokens read as such, nothing added.

        Raises:
            UsageError: the text holds a lone surrogate, which no UTF-8 can express.
        """
        ...

    def special(self, text: str) -> int:
        """The id of a special token.

        Raises:
            CorruptError: there is no such token.
        """
        ...

    def piece(self, token: int) -> bytes:
        """A token's bytes; none for special tokens. Part of a character where the token is a byte."""
        ...

    def ends(self, token: int) -> bool:
        """Whether the vocabulary itself says that a token ends a turn."""
        ...


class Sampler(Protocol):
    """Chooses one token after another; its random numbers begin at the seed."""

    def sample(self) -> int | None:
        """The next token by the decoder's last logits; None where a grammar leaves none."""
        ...

    def accept(self, token: int) -> None:
        """Move a grammar on by a token that is no end of turn."""
        ...

    def close(self) -> Any:
        """Give the memory back."""
        ...


@dataclass(frozen=True)
class Engine:
    """What runs one artifact."""

    name: str
    vocabulary: Vocabulary
    decoder: Decoder
    encoder: Callable[[], Encoder] | None
    """Opens the image tower, with the first image; None where the model reads none."""
    sampler: Callable[[GenerateOptions], Sampler]
    """Raises UsageError for a schema or a grammar that it cannot read."""
    watch: Watch


@dataclass(frozen=True)
class _Plan:
    """A checked prompt: what stands where, its last token apart, and the pixels of its images."""

    cells: list[Cell]
    last: int
    pixels: Mapping[str, Pixels]
    tokens: int


class LoopGenerator:
    """A `Generator` over an engine. Not a medical device."""

    def __init__(
        self, chat: ChatFormat, image: ImageSpec | None, template: ChatTemplate, context: int, engine: Engine
    ) -> None:
        """`image` is None where the model reads none; `context` is how many tokens the engine's cache holds."""
        self.name, self.context, self.image, self.image_tokens = engine.name, context, image, chat.image_tokens
        self._engine, self._watch = engine, engine.watch
        self._vocabulary, self._decoder = engine.vocabulary, engine.decoder
        self._stop = {self._vocabulary.special(text) for text in chat.stop}
        self._image_id = self._vocabulary.special(IMAGE_TOKEN) if image else -1
        self._thought = thought_marks(self._vocabulary.tokenize)
        self._prompter = Prompter(
            template, self._vocabulary.tokenize, self._image_id, chat.image_tokens, context, chat.context
        )
        self._prefix = Prefix(engine.decoder, engine.encoder, chat.image_tokens, engine.watch)
        self._turn = 0

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
        sampler = self._engine.sampler(options)
        tally = Tally(prompt_tokens=plan.tokens)
        return Reply(self._answer(self._begin(cancelled), plan, sampler, options, tally), tally)

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """See `Generator.prompt`."""
        self._check_open()
        return self._prompter(messages)

    def tokenize(self, text: str) -> list[int]:
        """See `Generator.tokenize`."""
        self._check_open()
        return self._vocabulary.tokenize(text)

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
        for part in (self._prefix, self._decoder):
            part.close()

    def _plan(self, prompt: Prompt) -> _Plan:
        """Images in place of their tokens, and whether all of it fits."""
        self._prompter.check_fits(prompt)
        spec = self.image
        pixels = [resize(picture, spec) for picture in prompt.images] if spec else []
        hashes = [image_hash(each) for each in pixels]
        *cells, last = self._cells(prompt, hashes) or [""]
        if isinstance(last, str):
            raise UsageError("A prompt ends in a text token")
        return _Plan(cells, last, dict(zip(hashes, pixels, strict=True)), len(prompt.ids))

    def _cells(self, prompt: Prompt, hashes: Sequence[str]) -> list[Cell]:
        if not all(0 <= i < self._vocabulary.vocabulary_size for i in prompt.ids):
            raise UsageError(f"A token of the prompt is none of the model's {self._vocabulary.vocabulary_size:,}")
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
        stream = TextStream(options.stop, None if options.constrained else self._thought)
        try:
            self._check_turn(turn)
            if not self._prefix.fill(plan.cells, plan.last, plan.pixels, tally):
                tally.finish = "cancelled"
                return
            self._decoder.logits()  # a model that gives no numbers is found here, and not sampled from
            limit = min(options.max_tokens, self.context - plan.tokens)
            for token in self._sampled(sampler, limit, options.logprobs, tally):
                yield from stream.push(token, self._vocabulary.piece(token.id))
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
            chosen = sampler.sample()
            if chosen is None or chosen in self._stop or self._vocabulary.ends(chosen):
                tally.finish = "stop"
                return
            token = rated(chosen, self._decoder.logits(), logprobs) if logprobs else Token(chosen, "")
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


@dataclass(frozen=True)
class Opened:
    """What every engine needs of a chat artifact."""

    chat: ChatFormat
    image: ImageSpec | None
    """None where the artifact has no image tower."""
    template: ChatTemplate

    @classmethod
    def of(cls, artifact: Artifact) -> Opened:
        """Read it.

        Raises:
            CorruptError: the artifact states no chat format, or has an image tower and states no image size.
        """
        manifest = artifact.manifest
        if manifest.chat is None:
            raise CorruptError(f"{artifact.root} states no chat format", "Export it again")
        if VISION in manifest.parts and manifest.image is None:
            raise CorruptError(f"{artifact.root} has an image tower and states no image size", "Export it again")
        template = ChatTemplate.open(artifact.file(manifest.chat.template), manifest.chat)
        return cls(manifest.chat, manifest.image if VISION in manifest.parts else None, template)
