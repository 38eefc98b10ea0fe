"""Answers in OpenAI's forms: a whole completion, and the chunks of a streamed one."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from medge.runtimes.generate import Tally, Token, answer_text, thought_text
from medge.serve.tools import Call, Toolbox

DONE = b"data: [DONE]\n\n"


def event(document: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage(tally: Tally, tokens: int) -> dict[str, Any]:
    """Counts of tokens."""
    return {
        "prompt_tokens": tally.prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": tally.prompt_tokens + tokens,
        "prompt_tokens_details": {"cached_tokens": tally.reused_tokens},
    }


def timings(tally: Tally, waited: float) -> dict[str, Any]:
    """Seconds by phase: this server's own field."""
    return {"queue": waited, **tally.seconds, "images_encoded": tally.images_encoded}


class Completion:
    """The frame of one answer: its id, when it was made, by which model."""

    def __init__(self, model: str, tools: Toolbox, *, logprobs: bool, with_usage: bool = False) -> None:
        self._tools = tools
        self._logprobs = logprobs
        self._with_usage = with_usage
        self._frame = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, tokens: Sequence[Token], tally: Tally, waited: float) -> dict[str, Any]:
        """The answer as one document."""
        text, thought = answer_text(tokens), thought_text(tokens)
        calls = self._tools.read(text)
        message: dict[str, Any] = {"role": "assistant", "content": None if calls else text, "refusal": None}
        if thought:
            message["reasoning_content"] = thought  # no field of OpenAI's, but what others call it
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": _finish(tally, calls),
            "logprobs": self._rated(tokens),
        }
        return {
            **self._frame,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage(tally, len(tokens)),
            "timings": timings(tally, waited),
        }

    def first(self) -> bytes:
        """The chunk that opens a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, tokens: Sequence[Token]) -> bytes:
        """The chunk that goes on with some tokens. A stream leaves thoughts out."""
        return self._chunk({"content": answer_text(tokens)}, logprobs=self._rated(tokens))

    def calls(self, calls: Sequence[Call]) -> bytes:
        """The chunk that holds the calls, each whole."""
        return self._chunk({"tool_calls": [{"index": i, **_call(call)} for i, call in enumerate(calls)]})

    def last(self, tally: Tally, tokens: int, waited: float, calls: Sequence[Call]) -> bytes:
        """The chunks that end a stream."""
        end = self._chunk({}, finish=_finish(tally, calls), timings=timings(tally, waited))
        if not self._with_usage:
            return end + DONE
        return end + event({**self._chunk_frame(), "choices": [], "usage": usage(tally, tokens)}) + DONE

    def _chunk(self, delta: Any, *, finish: str | None = None, logprobs: Any = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return event({**self._chunk_frame(), "choices": [choice], **more})

    def _chunk_frame(self) -> dict[str, Any]:
        return {**self._frame, "object": "chat.completion.chunk"}

    def _rated(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        rated = [
            {"token": token.text, "logprob": token.logprob, "bytes": list(token.text.encode()), "top_logprobs": []}
            for token in tokens
        ]
        return {"content": rated}


def _finish(tally: Tally, calls: Sequence[Call]) -> str:
    return "tool_calls" if calls else tally.finish or "stop"


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
