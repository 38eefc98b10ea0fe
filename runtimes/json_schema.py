"""JSON Schemas before they become grammars: where schemas stand in one, and which of them nothing should be asked of.

A schema that contradicts itself gives answers that break it, since a grammar follows whichever half its converter
read first. One with large repetitions costs more than its answer: llama.cpp's parser overflows the stack, and takes
the process with it, at a hundred thousand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from medge.errors import UsageError

SCHEMAS = {"additionalProperties", "items"}
"""Keywords whose value is a schema."""
LISTS_OF_SCHEMAS = {"anyOf", "oneOf", "allOf", "prefixItems"}
NAMED_SCHEMAS = {"properties", "$defs", "definitions"}
MAX_REPEATS = 1000
"""Of items, characters, or a pattern's quantifiers multiplied; llama.cpp's own limit is about 2,000 rules."""

_RANGES = (
    ("minItems", "maxItems"),
    ("minLength", "maxLength"),
    ("minimum", "maximum"),
    ("minProperties", "maxProperties"),
)
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, Mapping),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "integer": lambda value: not isinstance(value, bool) and isinstance(value, int | float) and value % 1 == 0,
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}


def inner_schemas(keyword: str, value: Any) -> Iterator[Any]:
    """The schemas directly below a keyword."""
    if keyword in LISTS_OF_SCHEMAS and isinstance(value, list):
        yield from value
    elif keyword in NAMED_SCHEMAS and isinstance(value, Mapping):
        yield from value.values()
    elif keyword in SCHEMAS:
        yield value


def check_schema(schema: Any, name: str = "The JSON Schema") -> None:
    """Refuse a schema that contradicts itself, or repeats too much, anywhere in it.

    What only shows when the whole is solved (two patterns that exclude each other) is not found.

    Raises:
        UsageError: with the contradiction, or the limit.
    """
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise UsageError(f"{name} is no object", "Give one like {'type': 'object', 'properties': {…}}")
    for fault in _faults(schema):
        raise UsageError(f"{name} {fault}", "Correct it")
    for keyword, value in schema.items():
        for inner in inner_schemas(keyword, value):
            check_schema(inner, name)


def _faults(schema: Mapping[str, Any]) -> Iterator[str]:
    yield from _bad_numbers(schema)
    yield from _bad_types(schema)
    yield from _bad_values(schema)
    yield from _bad_required(schema)
    yield from _bad_pattern(schema.get("pattern"))


def _bad_numbers(schema: Mapping[str, Any]) -> Iterator[str]:
    for key in _COUNTS:
        count = schema.get(key, 0)
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            yield f"has a '{key}' that is no count"
        elif count > MAX_REPEATS:
            yield f"has {key} {count:,}, and no more than {MAX_REPEATS:,} can be enforced"
    for low, high in _RANGES:
        least, most = schema.get(low, -math.inf), schema.get(high, math.inf)
        if not (_TYPES["number"](least) and _TYPES["number"](most)):
            yield f"has a '{low}' or '{high}' that is no number"
        elif least > most:
            yield f"contradicts itself: {low} {least} is above {high} {most}"


def _bad_types(schema: Mapping[str, Any]) -> Iterator[str]:
    if not all(isinstance(kind, str) and kind in _TYPES for kind in _types(schema)):
        yield f"has a type that is none of {', '.join(_TYPES)}"
        return
    parts = schema.get("allOf")
    kinds = [set(_types(part)) for part in parts if isinstance(part, Mapping)] if isinstance(parts, list) else []
    kinds = [kind | ({"integer"} if "number" in kind else set()) for kind in (*kinds, set(_types(schema))) if kind]
    if kinds and not set.intersection(*kinds):
        yield "contradicts itself: nothing is of all the types that allOf asks for"


def _types(schema: Mapping[str, Any]) -> list[Any]:
    kinds = schema.get("type", [])
    return kinds if isinstance(kinds, list) else [kinds]


def _bad_values(schema: Mapping[str, Any]) -> Iterator[str]:
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values is None:
        return
    if not isinstance(values, list) or not values:
        yield "has an 'enum' without values"
    elif (kinds := _types(schema)) and not all(any(_TYPES[kind](value) for kind in kinds) for value in values):
        yield f"contradicts itself: a value of its enum or const is not of type {', '.join(kinds)}"
    elif "const" in schema and schema["const"] not in values:
        yield "contradicts itself: its const is none of its enum"


def _bad_required(schema: Mapping[str, Any]) -> Iterator[str]:
    required, properties = schema.get("required", []), schema.get("properties", {})
    if not isinstance(properties, Mapping):
        yield "has 'properties' that are no object"
    elif not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        yield "has a 'required' that is no list of names"
    elif schema.get("additionalProperties") is False and (missing := [n for n in required if n not in properties]):
        yield f"contradicts itself: it requires '{missing[0]}' and allows no such property"


def _bad_pattern(pattern: Any) -> Iterator[str]:
    if pattern is None:
        return
    if not isinstance(pattern, str):
        yield "has a 'pattern' that is no text"
        return
    bounds = (max(map(int, filter(None, found)), default=1) for found in re.findall(r"\{(\d*),?(\d*)\}", pattern))
    if math.prod(max(bound, 1) for bound in bounds) > MAX_REPEATS:
        yield f"has a pattern that repeats more than {MAX_REPEATS:,} times"
