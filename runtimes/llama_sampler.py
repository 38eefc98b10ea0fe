"""Choosing a token with llama.cpp's samplers, in transformers' order, under a grammar where one is given."""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

import numpy as np

from medge.errors import UsageError, require
from medge.runtimes.generate import GenerateOptions
from medge.runtimes.json_schema import LISTS_OF_SCHEMAS, NAMED_SCHEMAS, SCHEMAS, check_schema, inner_schemas
from medge.runtimes.llama_context import Context
from medge.runtimes.llama_model import Model

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""llama_token_data."""


class Sampler:
    """Chooses one token after another; its random numbers begin at the seed."""

    def __init__(self, model: Model, context: Context, options: GenerateOptions) -> None:
        """Build the chain.

        Raises:
            UsageError: llama.cpp cannot parse the grammar, or the JSON Schema says what no grammar enforces.
        """
        self._api, self._context = model.api, context
        self._grammar = _grammar(model, options)
        self._chain = self._api.llama_sampler_chain_init(self._api.llama_sampler_chain_default_params())
        for sampler in _samplers(self._api, options):
            self._api.llama_sampler_chain_add(self._chain, sampler)
        self.close = weakref.finalize(self, _free, self._api, [self._chain, self._grammar], model)

    def sample(self) -> int | None:
        """The next token by the context's last logits; None where the grammar leaves none.

        With a grammar, the choice is made without it first and only checked: a grammar that has to judge 262,144
        tokens costs more than the model does.
        """
        token = int(self._api.llama_sampler_sample(self._chain, self._context.handle, -1))
        if self._grammar is None:
            return token
        if not self._allowed(np.array([(token, 0, 0)], _CANDIDATE))[0]:
            chosen = self._constrained()
            if chosen is None:
                return None
            token = chosen
        return token

    def accept(self, token: int) -> None:
        """Move the grammar on by a token that is no end of turn."""
        if self._grammar is not None:
            self._api.llama_sampler_accept(self._grammar, token)

    def _allowed(self, candidates: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Apply the grammar, in place: what it forbids gets the logit -inf."""
        self._api.llama_sampler_apply(self._grammar, ctypes.byref(_view(self._api, candidates)))
        return np.asarray(candidates["logit"] > -np.inf)

    def _constrained(self) -> int | None:
        logits = self._context.logits()
        candidates = np.zeros(len(logits), _CANDIDATE)
        candidates["id"], candidates["logit"] = np.arange(len(logits)), logits
        candidates = candidates[self._allowed(candidates)]
        if not len(candidates):
            return None
        view = _view(self._api, candidates)
        self._api.llama_sampler_apply(self._chain, ctypes.byref(view))
        return int(view.data[view.selected].id)


def _samplers(api: Any, options: GenerateOptions) -> Iterator[Any]:
    """Top-k stands first for speed; it commutes with temperature."""
    if options.temperature == 0:
        yield api.llama_sampler_init_greedy()
        return
    if options.top_k:
        yield api.llama_sampler_init_top_k(options.top_k)
    yield api.llama_sampler_init_temp(options.temperature)
    if options.top_p < 1:
        yield api.llama_sampler_init_top_p(options.top_p, 1)
    if options.min_p:
        yield api.llama_sampler_init_min_p(options.min_p, 1)
    yield api.llama_sampler_init_dist(options.seed)


def _view(api: Any, candidates: np.ndarray[Any, Any]) -> Any:
    pointer = candidates.ctypes.data_as(ctypes.POINTER(api.llama_token_data))
    return api.llama_token_data_array(pointer, len(candidates), -1, False)


def _free(api: Any, samplers: list[Any], _: Model) -> None:
    for sampler in samplers:
        if sampler is not None:
            api.llama_sampler_free(sampler)


def _grammar(model: Model, options: GenerateOptions) -> Any:
    """llama.cpp's sampler for the grammar of the options, or None."""
    source = options.grammar if options.schema is None else gbnf(options.schema)
    if source is None:
        return None
    if not source.strip():
        raise UsageError("The grammar is empty", "Give GBNF with a rule 'root'")  # llama.cpp takes that for none
    try:
        data = source.encode()
    except UnicodeEncodeError:
        raise UsageError("The grammar holds bytes that are no UTF-8", "Give it as UTF-8") from None
    with _stderr() as said:
        sampler = model.api.llama_sampler_init_grammar(model.vocabulary, data, b"root")
        reason = _reason(said)
    if not sampler:
        raise UsageError(f"llama.cpp cannot read the grammar: {reason}", "Give GBNF with a rule 'root'")
    return sampler


def _reason(said: IO[bytes]) -> str:
    said.seek(0)
    found = re.search(rb"error parsing grammar: ([^\n]*)", said.read())
    return found[1].decode("utf-8", "replace") if found else "it has no rule 'root', or one that begins with itself"


@contextmanager
def _stderr() -> Iterator[IO[bytes]]:
    """What C prints on stderr within, instead of there: the grammar parser prints past the log."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)


_LIMITS = {"minItems", "maxItems", "minLength", "maxLength", "pattern", "format", "required", "enum", "const"}
_ANNOTATIONS = {"$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated"}
_KNOWN = {"type", "$ref"} | SCHEMAS | LISTS_OF_SCHEMAS | NAMED_SCHEMAS | _LIMITS | _ANNOTATIONS
_FORMATS = ("date", "time", "date-time", "uuid", "uuid1", "uuid2", "uuid3", "uuid4", "uuid5")


def gbnf(schema: Mapping[str, Any]) -> str:
    """A JSON Schema as a grammar, by llama-cpp-python's converter.

    The converter leaves out what it does not know; here that is refused, since an answer would break a limit that
    its caller relies on.

    Raises:
        UsageError: the schema contradicts itself, cannot be converted, or says what a grammar does not enforce.
    """
    check_schema(schema)
    for keyword in _keywords(schema):
        if keyword not in _KNOWN:
            raise UsageError(f"The JSON Schema uses '{keyword}', which no grammar enforces", "Remove it")
    converter: Any = require("llama_cpp.llama_grammar", "gguf")
    try:
        return str(converter.json_schema_to_gbnf(json.dumps(schema)))
    except Exception as error:  # assertions, lookups and recursion of a converter given any JSON
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"The JSON Schema cannot be used: {reason}") from None


def _keywords(schema: Any) -> Iterator[str]:
    """Every keyword of a schema and the schemas in it."""
    if not isinstance(schema, Mapping):
        if not isinstance(schema, bool):
            raise UsageError("The JSON Schema is no object", "Give one like {'type': 'object', 'properties': {…}}")
        return
    if isinstance(schema.get("format"), str) and schema["format"] not in _FORMATS:
        raise UsageError(
            f"The JSON Schema uses the format '{schema['format']}'", f"Known: {', '.join(sorted(_FORMATS))}"
        )
    for keyword, value in schema.items():
        yield keyword
        for inner in inner_schemas(keyword, value):
            yield from _keywords(inner)
