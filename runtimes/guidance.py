"""JSON Schemas and grammars through llguidance, for every backend that has no grammars of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medge.errors import UsageError, require
from medge.runtimes.generate import GenerateOptions
from medge.runtimes.json_schema import LISTS_OF_SCHEMAS, NAMED_SCHEMAS, SCHEMAS, check_schema
from medge.runtimes.loop import Sampler
from medge.runtimes.prefix import Decoder
from medge.runtimes.sampler import ArraySampler
from medge.runtimes.vocabulary import Vocabulary
from medge.spec import ChatFormat

_LIMITS = {"whitespace_pattern": r"( |\n[ \t]{0,20})?"}
"""As llama.cpp's grammars have it: JSON allows any amount, and a small model may go on with nothing else."""


def array_sampler(vocabulary: Vocabulary, chat: ChatFormat, decoder: Decoder) -> Callable[[GenerateOptions], Sampler]:
    """How an engine without grammars of its own makes its samplers."""
    guide = Guide(vocabulary, chat)
    return lambda options: ArraySampler(decoder.logits, options, guide.constraint(options))


_INNER = (SCHEMAS | LISTS_OF_SCHEMAS) - {"allOf"}


class Guide:
    """One vocabulary, ready for grammars: built with the first, since it takes a second."""

    def __init__(self, vocabulary: Vocabulary, chat: ChatFormat) -> None:
        self._vocabulary, self._chat = vocabulary, chat
        self._tokenizer: Any = None

    def constraint(self, options: GenerateOptions) -> GuidedConstraint | None:
        """What the options' schema or grammar allows; None where they have neither.

        Raises:
            MissingExtraError: llguidance is not installed.
            UsageError: the schema or the grammar cannot be used, with the reason.
        """
        if options.schema is None and options.grammar is None:
            return None
        library: Any = require("llguidance", "chat")
        matcher = library.LLMatcher(self._ready(library), _grammar(library, options), log_level=0)
        if matcher.is_error():
            what = "grammar" if options.schema is None else "JSON Schema"
            raise UsageError(f"The {what} cannot be used: {_first_line(matcher.get_error())}")
        return GuidedConstraint(matcher, self._vocabulary.vocabulary_size)

    def _ready(self, library: Any) -> Any:
        if self._tokenizer is None:
            ends = sorted({self._vocabulary.special(text) for text in self._chat.stop})
            text = self._vocabulary.path.read_text(encoding="utf-8")
            self._tokenizer = library.LLTokenizer(text, n_vocab=self._vocabulary.vocabulary_size, eos_token=ends)
        return self._tokenizer


class GuidedConstraint:
    """One answer's place in a grammar."""

    def __init__(self, matcher: Any, size: int) -> None:
        self._matcher, self._size = matcher, size

    def allowed(self) -> NDArray[np.bool_]:
        """See `Constraint.allowed`. An end of turn is among them where the answer may end."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, bitorder="little")[: self._size].astype(bool)

    def accept(self, token: int) -> None:
        """See `Constraint.accept`."""
        self._matcher.consume_token(token)


def _grammar(library: Any, options: GenerateOptions) -> str:
    if options.schema is not None:
        check_schema(options.schema)
        return str(library.LLMatcher.grammar_from_json_schema(_closed(options.schema), defaults=_LIMITS))
    if not (options.grammar or "").strip():
        raise UsageError("The grammar is empty", "Give GBNF with a rule 'root'")
    converter: Any = require("llguidance.gbnf_to_lark", "chat")
    try:
        return str(library.LLMatcher.grammar_from_lark(converter.gbnf_to_lark(options.grammar)))
    except Exception as error:  # the converter raises nothing narrower
        raise UsageError(
            f"The grammar cannot be read: {_first_line(str(error))}", "Give GBNF with a rule 'root'"
        ) from None


def _closed(schema: Any) -> Any:
    """A schema whose objects have no properties but those it names, unless it says otherwise.

    What it gives fits the schema as it stands, and llama.cpp's grammars do the same: a model would else go on to make
    up properties. Parts of an `allOf` stay open, since each of them would forbid what the others name.
    """
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    inner = {key: _closed(value) if key in _INNER else value for key, value in schema.items()}
    for key in NAMED_SCHEMAS & schema.keys():
        if isinstance(schema[key], Mapping):
            inner[key] = {name: _closed(one) for name, one in schema[key].items()}
    opened = {"additionalProperties", "patternProperties", "allOf", "$ref"}
    return inner if "properties" not in schema or opened & schema.keys() else {**inner, "additionalProperties": False}


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "no reason given"
