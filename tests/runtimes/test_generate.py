"""Options, and the text of a stream of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medge.errors import UsageError
from medge.runtimes.generate import (
    GenerateOptions,
    Message,
    Reply,
    Tally,
    TextStream,
    Token,
    log_softmax,
    rated,
    whole,
)


def stream(pieces: Sequence[bytes], stop: Sequence[str] = ()) -> list[tuple[int, str]]:
    """(place, text) of the tokens that come out."""
    text = TextStream(stop)
    out: list[Token] = []
    for i, piece in enumerate(pieces):
        out += text.push(Token(i, ""), piece)
        if text.stopped:
            return [(token.id, token.text) for token in out]
    out += text.flush()
    return [(token.id, token.text) for token in out]


def test_a_character_comes_with_its_last_byte() -> None:
    assert stream([b"a", b"\xe4", b"\xb8", b"\xad", b"b"]) == [(0, "a"), (1, ""), (2, ""), (3, "中"), (4, "b")]


def test_bytes_that_are_no_character_become_one_mark_and_do_not_stop_the_stream() -> None:
    assert stream([b"\xff", b"ok"]) == [(0, "\N{REPLACEMENT CHARACTER}"), (1, "ok")]


def test_of_a_character_cut_short_nothing_remains() -> None:
    assert "".join(text for _, text in stream([b"a", b"\xf0\x9f"])) == "a"


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        ([b"one STOP two"], ("STOP",), [(0, "one ")]),
        ([b"one S", b"TO", b"P two"], ("STOP",), [(0, "one ")]),
        ([b"one ", b"STOP"], ("STOP",), [(0, "one ")]),
        ([b"ST", b"AY"], ("STOP",), [(0, "ST"), (1, "AY")]),
        ([b"SSTO", b"P!"], ("STOP",), [(0, "S")]),
        ([b"a\n", b"\n", b"b"], ("\n\n",), [(0, "a")]),
        ([b"STOP"], ("STOP",), []),
        ([b"ab", b"c"], ("bc", "abc"), []),
        ([b"a S", b"T"], ("STOP",), [(0, "a S"), (1, "T")]),
        ([b"\xe4\xb8", b"\xad!"], ("中",), [(0, "")]),
    ],
)
def test_stop_strings_are_cut_exactly(
    pieces: list[bytes], stop: tuple[str, ...], expected: list[tuple[int, str]]
) -> None:
    assert stream(pieces, stop) == expected


def test_nothing_is_held_back_without_need() -> None:
    text = TextStream(("END",))
    assert [token.text for token in text.push(Token(0, ""), b"hello")] == ["hello"]
    assert list(text.push(Token(1, ""), b" E")) == []
    assert [token.text for token in text.push(Token(2, ""), b"at")] == [" E", "at"]


def test_a_thought_is_marked_and_no_stop_string_ends_it() -> None:
    text = TextStream(("END",), thought=(100, 101))
    pieces = [(7, b"E"), (100, b""), (1, b"thought\n"), (2, b"END"), (101, b""), (3, b"yes"), (4, b"EN"), (5, b"D")]
    tokens = [token for id, piece in pieces for token in text.push(Token(id, ""), piece)]
    assert [token.id for token in tokens] == [7, 100, 1, 2, 101, 3]
    assert [token.id for token in tokens if token.thought] == [100, 1, 2, 101]
    assert text.stopped
    answer = whole(tokens, Tally(finish="stop"))
    assert (answer.thought, answer.text) == ("END", "Eyes")


def test_a_thought_that_never_ends_leaves_no_answer() -> None:
    text = TextStream((), thought=(100, 101))
    tokens = [*text.push(Token(100, ""), b""), *text.push(Token(1, ""), b"thought\nWell"), *text.flush()]
    answer = whole(tokens, Tally(finish="length"))
    assert (answer.thought, answer.text) == ("Well", "")


@given(st.text("ab中🙂", max_size=30), st.lists(st.text("ab中", min_size=1, max_size=4), max_size=3), st.data())
def test_any_cut_into_tokens_gives_the_same_text(text: str, stop: list[str], data: st.DataObject) -> None:
    raw, pieces = text.encode(), []
    while raw:
        size = data.draw(st.integers(1, len(raw)))
        pieces.append(raw[:size])
        raw = raw[size:]
    found = [at for at in map(text.find, stop) if at >= 0]
    out = stream(pieces, stop)
    # Cut at the first stop string to be complete; several may overlap, so the text is one of the possible cuts.
    joined = "".join(part for _, part in out)
    assert joined == text if not found else joined in {text[:at] for at in found}
    assert [i for i, _ in out] == list(range(len(out)))


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 1.1},
        {"min_p": -1},
        {"top_k": -1},
        {"seed": 2**32 - 1},
        {"logprobs": -1},
        {"stop": ("",)},
        {"schema": {}, "grammar": "root ::= [a]"},
    ],
)
def test_options_outside_their_range_are_refused(values: dict) -> None:
    with pytest.raises(UsageError):
        GenerateOptions(**values)


@pytest.mark.parametrize(
    ("role", "content", "says"),
    [
        ("user", "Hello", "no tuple"),
        ("user", (3,), "holds a int"),
        ("user", (None,), "NoneType"),
        ("tool", ("a",), "role"),
    ],
)
def test_what_is_no_message_is_refused(role: Any, content: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Message(role, content)


def test_log_probabilities_sum_to_one_and_survive_large_logits() -> None:
    logits = np.array([[1e4, 1e4 - 1, -1e4], [0, 0, 0]], np.float32)
    assert np.exp(log_softmax(logits)).sum(-1) == pytest.approx([1, 1])
    assert log_softmax(logits)[1] == pytest.approx([-np.log(3)] * 3)


def test_a_rated_token_names_the_likeliest_best_first() -> None:
    token = rated(0, np.array([0, 3, 1, 3], np.float32), 3)
    assert [i for i, _ in token.top] == [1, 3, 2]
    assert token.logprob == pytest.approx(log_softmax(np.array([0, 3, 1, 3], np.float32))[0])


def test_whoever_stops_asking_has_cancelled() -> None:
    tally = Tally(prompt_tokens=3)
    reply = Reply(iter([Token(1, "a"), Token(2, "b")]), tally)
    answer = whole([next(reply)], reply.tally)
    assert (answer.text, answer.finish, answer.prompt_tokens) == ("a", "cancelled", 3)
