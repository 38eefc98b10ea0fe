"""What every generator shares: messages in, a stream of tokens out, and how their bytes become text.

A backend implements `Generator`. Sampling is defined once, in the order of transformers' processors: top-k,
temperature, top-p, min-p, then a draw by seed. Log-probabilities are the model's own: before temperature, before any
truncation, before a grammar. The text of a reply is made here, so that every backend cuts stop strings and joins
the bytes of a character in one way.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from medge.errors import UsageError
from medge.runtimes.base import RunOptions
from medge.runtimes.images import ImageLike, Picture
from medge.spec import ChatFormat, FloatArray, ImageSpec

_CONTENT = (str, bytes, Path, PIL.Image.Image, np.ndarray, Picture)
Role = Literal["system", "user", "assistant"]
Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class ChatRunOptions(RunOptions):
    """How to run a generator."""

    context: int | None = None
    """Tokens that prompt and answer may have together. None is DEFAULT_CONTEXT, or the model's own if that is less:
    the cache is allocated at once, and a model made for 131,072 tokens would take gigabytes for a short chat."""


DEFAULT_CONTEXT = 8192


@dataclass(frozen=True)
class Message:
    """One turn: texts and images in the order in which they are meant.

    Raises:
        UsageError: no such role, or content that is neither text nor image.
    """

    role: Role
    content: tuple[str | ImageLike, ...]
    """A `str` is text, never a path: pass a `Path` for a file."""

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise UsageError(f"'{self.role}' is no role of a message", f"Roles: {', '.join(get_args(Role))}")
        if not isinstance(self.content, tuple):  # a bare str would fall apart into its characters
            raise UsageError("A message's content is no tuple", "Write Message('user', ('What is this?', image))")
        for item in self.content:
            if not isinstance(item, _CONTENT):
                raise UsageError(f"A message holds a {type(item).__name__}", "Give texts (str), and images or a Path")


@dataclass(frozen=True)
class GenerateOptions:
    """How to answer. The defaults are greedy and so the same every time.

    Raises:
        UsageError: a value outside its range, or both a schema and a grammar.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    """0 is greedy: the options down to `seed` then have no effect."""
    top_k: int = 64
    """0 keeps all."""
    top_p: float = 0.95
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    """The answer ends before the first of them; the chat format's own ends need not be named."""
    schema: Mapping[str, Any] | None = None
    """A JSON Schema that the answer must fit."""
    grammar: str | None = None
    """A grammar in GBNF with a rule `root`."""
    logprobs: int = 0
    """How many of the likeliest tokens to give with each token, with its own log-probability; 0 gives neither."""

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:  # NaN is in no range
                raise UsageError(f"{name} is {value}", f"Give a value from {low} to {high}")
        if any(not text for text in self.stop):
            raise UsageError("A stop string is empty")
        if self.schema is not None and self.grammar is not None:
            raise UsageError("Both a JSON Schema and a grammar are given", "Give one of them")

    @property
    def constrained(self) -> bool:
        """Whether every token must fit a schema or grammar: then all is answer, and no thought comes before."""
        return self.schema is not None or self.grammar is not None


_RANGES: dict[str, tuple[float, float]] = {
    "max_tokens": (1, 1_000_000),
    "temperature": (0, 100),
    "top_k": (0, 1_000_000),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "seed": (0, 2**32 - 2),  # llama.cpp takes 2**32 - 1 for "a random one"
    "logprobs": (0, 100),
}


@dataclass(frozen=True)
class Token:
    """One token. The texts of all that are no thought, joined, are the answer."""

    id: int
    text: str
    """Empty where a character's bytes are not complete yet."""
    logprob: float | None = None
    """Natural logarithm of its probability under the model."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest ids at this place with their log-probabilities, best first."""
    thought: bool = False
    """Part of what the model thinks before it answers, the marks around it included."""


PHASES = ("vision", "prefill", "decode")


@dataclass
class Tally:
    """What a reply took; it grows while the reply runs."""

    prompt_tokens: int = 0
    """Tokens of the rendered prompt, an image's included."""
    reused_tokens: int = 0
    """Of these, how many stood in the cache of an earlier turn and were not computed again."""
    images_encoded: int = 0
    """Images that went through the vision tower for this reply."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    """By phase: vision, prefill, decode."""
    finish: Finish | None = None
    """Why the reply ended: an end of turn or stop string, the token limit or a full context, or `cancelled`."""


class Reply(Iterator[Token]):
    """The tokens of one answer, as they come; `tally` says what they took."""

    def __init__(self, tokens: Iterator[Token], tally: Tally) -> None:
        self._tokens = tokens
        self.tally = tally

    def __next__(self) -> Token:
        return next(self._tokens)


def context_size(options: RunOptions | None, chat: ChatFormat) -> int:
    """Tokens that prompt and answer may have together.

    Raises:
        UsageError: more than the model was made for, or too few to answer in.
    """
    asked = options.context if isinstance(options, ChatRunOptions) else None
    size = min(DEFAULT_CONTEXT, chat.context) if asked is None else asked
    if not 1 < size <= chat.context:
        raise UsageError(f"A context of {size:,} tokens", f"The model takes 2 to {chat.context:,}")
    return size


@dataclass(frozen=True)
class Generation:
    """A whole answer."""

    text: str
    thought: str
    """What the model thought before; empty where it did not. No part of the answer, nor of a later prompt."""
    tokens: tuple[Token, ...]
    finish: Finish
    prompt_tokens: int
    reused_tokens: int
    images_encoded: int
    seconds: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Prompt:
    """A rendered chat: the ids that transformers' processor gives, and the images that fill its image tokens."""

    ids: tuple[int, ...]
    images: tuple[Picture, ...] = ()


class Generator(Protocol):
    """A model that answers. One reply at a time: starting another ends the one before. Not a medical device."""

    name: str
    """For reports: engine, version and device."""
    context: int
    """Tokens that prompt and answer may have together."""
    image: ImageSpec | None
    """How images are prepared; None where the model reads none."""
    image_tokens: int
    """Tokens that an image takes, without its marks."""

    def generate(
        self,
        messages: Sequence[Message],
        options: GenerateOptions | None = None,
        *,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Reply:
        """Answer the last message. All checks are made here; work starts with the first `next`.

        `cancelled` is asked often, also within a long step; once true, the reply ends.

        Raises:
            UsageError: what the model cannot take: the messages, an image, more tokens than the context has.
        """
        ...

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """What `generate` would feed for these messages."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, special tokens read as such, nothing added."""
        ...

    def logits(self, prompt: Prompt) -> Iterator[FloatArray]:
        """Blocks of (rows, vocabulary) float32, in order: for each id of the prompt, the logits of its successor.

        In blocks, because the logits of 4,096 tokens over Gemma's vocabulary are 4.3 GB.
        """
        ...

    def forget(self) -> None:
        """Drop what is cached of earlier prompts."""
        ...

    def close(self) -> None:
        """Give the memory back; the generator is of no use after."""
        ...


def complete(
    generator: Generator,
    messages: Sequence[Message],
    options: GenerateOptions | None = None,
    *,
    cancelled: Callable[[], bool] = lambda: False,
) -> Generation:
    """The whole answer.

    Raises:
        UsageError: as `Generator.generate`.
    """
    reply = generator.generate(messages, options, cancelled=cancelled)
    return whole(list(reply), reply.tally)


_CHANNEL = "thought\n"
"""What stands right after the mark that begins a thought: the channel's name."""


def answer_text(tokens: Iterable[Token]) -> str:
    """What is said in some tokens, thoughts left out."""
    return "".join(token.text for token in tokens if not token.thought)


def thought_text(tokens: Iterable[Token]) -> str:
    """What was thought before it was said; empty where nothing was."""
    return "".join(token.text for token in tokens if token.thought).removeprefix(_CHANNEL).strip()


def whole(tokens: Sequence[Token], tally: Tally) -> Generation:
    """The answer that a finished reply gave."""
    return Generation(
        text=answer_text(tokens),
        thought=thought_text(tokens),
        tokens=tuple(tokens),
        finish=tally.finish or "cancelled",  # whoever stops asking has cancelled
        prompt_tokens=tally.prompt_tokens,
        reused_tokens=tally.reused_tokens,
        images_encoded=tally.images_encoded,
        seconds=dict(tally.seconds),
    )


class TextStream:
    """Bytes of tokens to text, token by token: whole characters only, and nothing of a stop string.

    A token is held back while its text might still turn out to begin a stop string, and is given out with its own
    text after, so that a token's text is always that token's. A thought is marked as such, and no stop string ends it.
    """

    def __init__(self, stop: Sequence[str] = (), thought: tuple[int, int] | None = None) -> None:
        """`thought`: ids of the tokens that begin and end one."""
        self._stop, self._thought = stop, thought
        self._thinking = False
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._held: deque[Token] = deque()
        self._text = ""  # of the held tokens
        self.stopped = False
        """A stop string was met; the stream takes no more."""

    def push(self, token: Token, piece: bytes) -> Iterator[Token]:
        """Take a token and its bytes; give the tokens whose text is now certain."""
        text = self._decode(piece)
        if self._is_thought(token.id):
            yield from self._release(len(self._text))
            yield replace(token, text=text, thought=True)
            return
        self._held.append(replace(token, text=text))
        self._text += text
        at = min((i for i in map(self._text.find, self._stop) if i >= 0), default=-1)
        if at >= 0:
            self.stopped = True
            yield from self._release(at, cut=True)
        else:
            yield from self._release(len(self._text) - self._undecided())

    def _is_thought(self, token: int) -> bool:
        """Whether a token belongs to a thought, as both of its marks do."""
        begin, end = self._thought or (None, None)
        before = self._thinking
        self._thinking = (before or token == begin) and token != end
        return before or self._thinking

    def flush(self) -> Iterator[Token]:
        """The rest, at the end of an answer that met no stop string; of a character cut short nothing remains."""
        if not self.stopped:
            yield from self._release(len(self._text))

    def _undecided(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        lengths = range(min(len(self._text), max(map(len, self._stop), default=0)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._text[-n:]) for stop in self._stop)), 0)

    def _release(self, length: int, *, cut: bool = False) -> Iterator[Token]:
        """Tokens that lie within the first `length` characters; with `cut`, also the part of one that begins there."""
        while self._held and len(self._held[0].text) <= length and (length or not cut):
            token = self._held.popleft()
            self._text, length = self._text[len(token.text) :], length - len(token.text)
            yield token
        if cut and length and self._held:
            yield replace(self._held.popleft(), text=self._text[:length])


def log_softmax(logits: FloatArray) -> FloatArray:
    """(…, vocabulary) logits to natural log-probabilities, stable for any finite input."""
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted, dtype=np.float64).sum(-1, keepdims=True)), np.float32)


def rated(token: int, logits: FloatArray, top: int) -> Token:
    """A token with its log-probability and the `top` likeliest at its place, from (vocabulary,) logits."""
    logprobs = log_softmax(logits)
    best = np.argpartition(logprobs, -top)[-top:]
    order: NDArray[np.intp] = best[np.lexsort((best, -logprobs[best]))]
    pairs = tuple((int(i), float(logprobs[i])) for i in order)
    return Token(token, "", float(logprobs[token]), pairs)
