"""The wire format against Google's own library, and bytes that are no message."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medge.runtimes.protobuf import Message, MessageError


def read(message: Message) -> None:
    """Every accessor on every small field: what a reader may ask of bytes that it does not know."""
    for number in range(8):
        list(message.integers(number))
        list(message.floats(number))
        list(message.messages(number))


@given(values=st.lists(st.integers(-(2**63), 2**63 - 1)), text=st.text(), numbers=st.lists(st.floats(width=32)))
def test_what_google_s_library_writes_is_read(values: list[int], text: str, numbers: list[float]) -> None:
    descriptor = pytest.importorskip("google.protobuf.descriptor_pb2")
    option = descriptor.UninterpretedOption(string_value=text.encode(), negative_int_value=min(values, default=0))
    found = Message(option.SerializeToString())
    assert found.text(7) == text
    assert list(found.integers(5)) == [min(values, default=0)]
    place = descriptor.SourceCodeInfo.Location(path=[v % 2**31 for v in values], leading_comments=text)
    assert list(Message(place.SerializeToString()).integers(1)) == [v % 2**31 for v in values]
    value = pytest.importorskip("google.protobuf.struct_pb2").Value(number_value=len(numbers))
    assert Message(value.SerializeToString()).has(2)


def test_what_is_absent_is_protobuf_s_default() -> None:
    empty = Message(b"")
    assert (empty.integer(1), empty.text(1), bytes(empty.bytes(1)), empty.has(1)) == (0, "", b"", False)
    assert list(empty.messages(1)) == []
    assert list(empty.texts(1)) == []
    assert not empty.message(1).has(1)


def test_unpacked_and_packed_numbers_are_the_same() -> None:
    assert list(Message(b"\x08\x01\x08\xff\x01").integers(1)) == list(Message(b"\x0a\x03\x01\xff\x01").integers(1))
    assert (
        list(Message(b"\x0d\x00\x00\x80\x3f").floats(1)) == list(Message(b"\x0a\x04\x00\x00\x80\x3f").floats(1)) == [1]
    )


@pytest.mark.parametrize(
    "data",
    [
        b"\x08",  # a number without its value
        b"\x0a\x05abc",  # five bytes that are three
        b"\x0b",  # a group, which protobuf 3 has not
        b"\x08" + b"\xff" * 11,  # more than 64 bits
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f",  # a length beyond any file
    ],
)
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(MessageError):
        Message(data)


@pytest.mark.parametrize("data", [b"\x08\x01", b"\x0a\x03abc"])
def test_a_field_of_another_kind_is_refused(data: bytes) -> None:
    with pytest.raises(MessageError):
        Message(data).integer(1), Message(data).text(1)
    with pytest.raises(MessageError):
        list(Message(data).floats(1))


@given(data=st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        read(Message(data))
    except MessageError:
        return
