"""Schemas that contradict themselves, or repeat more than a grammar can hold."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medge.errors import UsageError
from medge.runtimes.json_schema import MAX_REPEATS, check_schema
from medge.runtimes.llama_sampler import gbnf

INTEGER = {"type": "integer"}


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {},
        {"type": "object", "properties": {"a": INTEGER}, "required": ["a"], "additionalProperties": False},
        {"type": "object", "required": ["b"]},
        {"type": ["string", "null"], "enum": ["a", None]},
        {"type": "number", "enum": [1, 2.5], "minimum": 0, "maximum": 0},
        {"type": "integer", "const": 2.0},
        {"type": "array", "items": INTEGER, "minItems": MAX_REPEATS, "maxItems": MAX_REPEATS},
        {"allOf": [{"type": "number"}, {"type": "integer"}, {"title": "any"}]},
        {"type": "string", "pattern": "^[a-z]{1,8}(-[0-9]{2}){3}$"},
    ],
)
def test_what_can_be_fitted(schema: Any) -> None:
    check_schema(schema)


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        (3, "is no object"),
        ({"items": 3}, "is no object"),
        ({"minItems": -1}, "'minItems' that is no count"),
        ({"maxLength": "5"}, "'maxLength' that is no count"),
        ({"maxItems": True}, "'maxItems' that is no count"),
        ({"maxItems": MAX_REPEATS + 1}, "maxItems 1,001, and no more than 1,000"),
        ({"minLength": 5, "maxLength": 2}, "contradicts itself: minLength 5 is above maxLength 2"),
        ({"minimum": 0.5, "maximum": 0.25}, "contradicts itself: minimum 0.5"),
        ({"minimum": "low"}, "'minimum' or 'maximum' that is no number"),
        ({"type": "sting"}, "a type that is none of object"),
        ({"type": ["string", 3]}, "a type that is none of object"),
        ({"type": "string", "allOf": [INTEGER]}, "nothing is of all the types"),
        ({"allOf": [{"type": "string"}, {"type": "object"}]}, "nothing is of all the types"),
        ({"enum": []}, "'enum' without values"),
        ({"enum": "a"}, "'enum' without values"),
        ({"type": "integer", "enum": [1, "a"]}, "not of type integer"),
        ({"type": "boolean", "const": 1}, "not of type boolean"),
        ({"type": "integer", "const": True}, "not of type integer"),
        ({"enum": ["a"], "const": "b"}, "its const is none of its enum"),
        ({"properties": []}, "'properties' that are no object"),
        ({"required": "a"}, "'required' that is no list"),
        ({"properties": {}, "required": ["a"], "additionalProperties": False}, "requires 'a' and allows no such"),
        ({"pattern": 3}, "'pattern' that is no text"),
        ({"pattern": "^a{100000}$"}, "a pattern that repeats"),
        ({"pattern": "^(a{0,100}){99}$"}, "a pattern that repeats"),
        ({"$defs": {"a": {"anyOf": [{"properties": {"b": {"enum": []}}}]}}}, "'enum' without values"),
    ],
)
def test_what_nothing_fits(schema: Any, fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        check_schema(schema)


def test_no_grammar_is_made_of_one() -> None:
    with pytest.raises(UsageError, match="contradicts itself"):
        gbnf({"type": "string", "minLength": 5, "maxLength": 2})


KEYWORDS = st.sampled_from([
    "type", "enum", "const", "properties", "required", "additionalProperties", "items", "prefixItems", "anyOf", "allOf",
    "minItems", "maxItems", "minLength", "maxLength", "minimum", "maximum", "pattern", "$ref", "$defs", "string",
])  # fmt: skip
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | KEYWORDS | st.sampled_from(["{", "a{3,1}", "{9}"])


@given(st.recursive(VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYWORDS, inner, max_size=4)))
def test_any_json_is_taken_or_refused(schema: Any) -> None:
    with contextlib.suppress(UsageError):
        check_schema(schema)
