"""Function calling for a model that has no tokens for it: functions described in the prompt, calls read as JSON.

Gemma 3 was trained to take functions as text. The wording is Google's (ai.google.dev/gemma/docs/capabilities/
function-calling): an instruction, then the functions as JSON, in the system's turn; a call is the JSON object
{"name": …, "parameters": …} and nothing else. Where a call is required, the answer is constrained to that form; where
the model may choose, its answer is read: a call if it is one, with or without the Markdown fence that Gemma likes to
put around code, and a text otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from medge.errors import UsageError
from medge.runtimes.json_schema import check_schema
from medge.serve.errors import invalid
from medge.serve.limits import Limits
from medge.serve.requests import ChatRequest, Function, NamedTool, Schema

_INSTRUCTION = """You have access to functions. If you decide to invoke any of the function(s),
you MUST put it in the format of
{{"name": function name, "parameters": dictionary of argument name and its value}}

You SHOULD NOT include any other text in the response if you call a function
{functions}"""
_SEVERAL = """
To invoke several functions at once, answer with a JSON list of such objects."""
_MUST = """
You MUST invoke {names} now."""
_FENCE = re.compile(r"```[a-z_]*\s*\n(.*?)\n?\s*```", re.DOTALL)
_ARGUMENTS = ("parameters", "arguments")
"""The second is OpenAI's word, which models write too."""


@dataclass(frozen=True)
class Call:
    """A function that the model calls."""

    name: str
    arguments: str
    """JSON."""


@dataclass(frozen=True)
class Toolbox:
    """The functions of one request and how they may be used. An empty one changes nothing."""

    functions: tuple[Function, ...] = ()
    required: bool = False
    several: bool = True
    """Whether one answer may hold several calls."""

    @property
    def instruction(self) -> str:
        """What is put before the conversation; empty without functions."""
        if not self.functions:
            return ""
        shown = [function.model_dump(exclude={"strict"}) for function in self.functions]
        text = _INSTRUCTION.format(functions=json.dumps(shown, ensure_ascii=False))
        if self.required:
            return text + _MUST.format(names=" or ".join(function.name for function in self.functions))
        return text + _SEVERAL if self.several else text

    def schema(self, wanted: Schema | None) -> Schema | None:
        """What the answer is constrained to, given what a text answer must fit; None is nothing."""
        if self.required:
            return _union([_call(function) for function in self.functions])
        if wanted is None or not self.functions:
            return wanted
        return _union([*(_call(function) for function in self.functions), wanted])

    def read(self, answer: str) -> list[Call]:
        """The calls that an answer is; none where it is a text."""
        if not self.functions:
            return []
        try:
            found = json.loads(_unfenced(answer), parse_constant=_no_json)
        except (ValueError, RecursionError):
            return []
        calls = [self._read(each) for each in (found if isinstance(found, list) else [found])]
        known = [call for call in calls if call is not None]
        return known if len(known) == len(calls) and (self.several or len(known) == 1) else []

    def may_begin(self, text: str) -> bool:
        """Whether an answer that begins so may still be a call."""
        begun = text.lstrip()
        return bool(self.functions) and (not begun or begun[0] in "{[" or begun[:3] == "```"[: len(begun)])

    def _read(self, found: Any) -> Call | None:
        if not isinstance(found, dict) or not isinstance(found.get("name"), str):
            return None
        if found["name"] not in {function.name for function in self.functions}:
            return None
        arguments: Any = next((found[key] for key in _ARGUMENTS if key in found), {})
        if not isinstance(arguments, dict) or set(found) - {"name", *_ARGUMENTS}:
            return None
        return Call(found["name"], json.dumps(arguments, ensure_ascii=False))


def toolbox(request: ChatRequest, limits: Limits) -> Toolbox:
    """The functions that a request offers.

    Raises:
        ApiError: too many, one twice, a schema that contradicts itself, or a choice that names none of them.
    """
    functions = tuple(tool.function for tool in request.tools or ())
    _check(functions, limits)
    choice = request.tool_choice or "auto"
    several = request.parallel_tool_calls is not False
    if isinstance(choice, NamedTool):
        named = tuple(function for function in functions if function.name == choice.function.name)
        if not named:
            raise invalid(f"tool_choice names '{choice.function.name}', which is none of the tools", "tool_choice")
        return Toolbox(named, required=True, several=False)
    if choice == "required" and not functions:
        raise invalid("tool_choice is 'required' and no tools are given", "tool_choice")
    return Toolbox() if choice == "none" else Toolbox(functions, choice == "required", several)


def _check(functions: Sequence[Function], limits: Limits) -> None:
    if len(functions) > limits.tools:
        raise invalid(f"{len(functions)} tools are given; {limits.tools} are allowed", "tools")
    seen: set[str] = set()
    for i, function in enumerate(functions):
        where = f"tools.{i}.function"
        if function.name in seen:
            raise invalid(f"The tool '{function.name}' is given twice", where)
        seen.add(function.name)
        check_given_schema(function.parameters, f"{where}.parameters", limits)
        if function.parameters.get("type", "object") != "object":
            raise invalid("A function's parameters must be of type object", f"{where}.parameters", "invalid_schema")


def check_given_schema(schema: Schema, where: str, limits: Limits) -> None:
    """Refuse a schema that nothing should be asked of.

    Raises:
        ApiError: it contradicts itself, or is beyond the limits.
    """
    size = len(json.dumps(schema, separators=(",", ":")))
    if size > limits.schema_bytes:
        raise invalid(f"A schema has {size:,} bytes; {limits.schema_bytes:,} are allowed", where, "invalid_schema")
    try:
        check_schema(schema)
    except UsageError as error:
        raise invalid(str(error), where, "invalid_schema") from None


def written(call: Mapping[str, Any]) -> str:
    """A call as the model wrote it, for the conversation that it goes back into."""
    return json.dumps(call, ensure_ascii=False)


def result(name: str, content: str) -> str:
    """What a function gave, in the user's turn, as Gemma's examples show it."""
    return f"```tool_output\n{json.dumps({'name': name, 'content': content}, ensure_ascii=False)}\n```"


def _no_json(constant: str) -> NoReturn:
    """What Python's parser takes and JSON has not: NaN and the infinities."""
    raise ValueError(constant)


def _unfenced(answer: str) -> str:
    text = answer.strip()
    fenced = _FENCE.fullmatch(text)
    return fenced[1] if fenced else text


def _call(function: Function) -> Schema:
    parameters = _moved({"type": "object", **function.parameters}, "#/properties/parameters")
    properties = {"name": {"const": function.name}, "parameters": parameters}
    return {"type": "object", "properties": properties, "required": ["name", "parameters"]}


def _union(schemas: Sequence[Schema]) -> Schema:
    """Any of them. Each goes under a name of its own, and what it refers to within itself moves along."""
    names = [f"#/$defs/{i}" for i in range(len(schemas))]
    moved = {str(i): _moved(schema, name) for i, (schema, name) in enumerate(zip(schemas, names, strict=True))}
    return {"anyOf": [{"$ref": name} for name in names], "$defs": moved}


def _moved(schema: Any, root: str) -> Any:
    if isinstance(schema, list):
        return [_moved(each, root) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: root + value[1:] if key == "$ref" and isinstance(value, str) and value[:1] == "#" else _moved(value, root)
        for key, value in schema.items()
    }
