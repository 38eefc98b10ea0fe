"""Sets of prompts: what is read, what is refused, and what identifies them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from medge.benchmarks.chat_data import BUILT_IN, built_in, load_prompts
from medge.errors import UsageError
from medge.runtimes.generate import Message


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    PIL.Image.new("RGB", (4, 4), "red").save(path)
    return path


def write(root: Path, *lines: dict[str, Any] | str) -> Path:
    path = root / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_a_prompt_is_a_user_message_with_its_images_first(tmp_path: Path, image: Path) -> None:
    dataset = load_prompts(write(tmp_path, {"kind": "f1", "prompt": "What?", "images": ["a.png"], "answer": "an eye"}))
    (item,) = dataset.items
    assert item.messages == (Message("user", (image, "What?")),)
    assert (item.kind, item.answer, item.images, item.name) == ("f1", "an eye", [image], "line 1")


def test_messages_keep_their_images_in_place(tmp_path: Path, image: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": ["Is ", {"image": "a.png"}, " an eye?"]},
    ]
    dataset = load_prompts(write(tmp_path, {"kind": "exact", "messages": turns, "answer": "yes"}, ""))
    assert dataset.items[0].messages == (
        Message("system", ("Be brief.",)),
        Message("user", ("Is ", image, " an eye?")),
    )


GOOD = {"kind": "f1", "prompt": "What?", "answer": "an eye"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("no json", "Invalid JSON"),
        ("[]", "line 1"),
        ({**GOOD, "kind": "poem"}, "kind"),
        ({**GOOD, "extra": 1}, "extra"),
        ({**GOOD, "answer": ""}, "needs its 'answer'"),
        ({"kind": "text", "prompt": "x", "answer": "y"}, "a text has none"),
        ({"kind": "text", "prompt": "x", "images": ["a.png"]}, "'prompt' alone"),
        ({"kind": "f1", "answer": "y"}, "either 'prompt' or 'messages'"),
        ({**GOOD, "messages": [{"role": "user", "content": "x"}]}, "either 'prompt' or 'messages'"),
        ({**GOOD, "kind": "choice"}, "belong to the kind"),
        ({**GOOD, "choices": ["an eye", "b"]}, "belong to the kind"),
        ({**GOOD, "kind": "choice", "choices": ["A", "B"]}, "one of them"),
        ({**GOOD, "kind": "choice", "choices": ["an eye", "an eye"]}, "at least two"),
        ({**GOOD, "images": ["none.png"]}, "none.png' is missing"),
        ({"kind": "f1", "answer": "y", "messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: dict[str, Any] | str, reason: str) -> None:
    with pytest.raises(UsageError, match=r"line 1") as error:
        load_prompts(write(tmp_path, line))
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_no_file_no_prompts_no_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_prompts(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="holds no prompts"):
        load_prompts(write(tmp_path, " ", ""))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="no UTF-8"):
        load_prompts(tmp_path / "binary.jsonl")


def test_the_digest_is_of_content_not_of_place(tmp_path: Path) -> None:
    digests = []
    for name, colour, question in (("x", "red", "What?"), ("y", "red", "What?"), ("z", "blue", "What?")):
        root = tmp_path / name
        root.mkdir()
        PIL.Image.new("RGB", (4, 4), colour).save(root / "a.png")
        path = write(root, {**GOOD, "prompt": question, "images": ["a.png"]})
        digests.append(load_prompts(path).digest)
    assert digests[0] == digests[1] != digests[2]
    other = write(tmp_path / "x", {**GOOD, "answer": "a hand", "images": ["a.png"]})
    assert load_prompts(other).digest != digests[0]


def test_the_first_are_spread_over_the_set(tmp_path: Path) -> None:
    dataset = load_prompts(write(tmp_path, *({**GOOD, "prompt": str(i)} for i in range(10))))
    assert [item.messages[0].content[0] for item in dataset.first(3).items] == ["0", "4", "9"]
    assert dataset.first(99).items == dataset.items
    assert len(dataset.first(1).items) == 1


def test_the_built_in_set_asks_about_every_kind_of_image_in_every_way() -> None:
    dataset = load_prompts(BUILT_IN)
    kinds = [item.kind for item in dataset.items]
    assert (kinds.count("f1"), kinds.count("choice"), kinds.count("text")) == (13, 26, 8)
    assert len({image for item in dataset.items for image in item.images}) == 13
    choices = [item for item in dataset.items if item.choices]
    assert all(item.answer in item.choices for item in choices)
    for answer in ("A", "B", "C", "Yes", "No"):  # or always saying one of them would score
        assert sum(item.answer == answer for item in choices) >= 2
    assert dataset.digest == built_in().digest


def test_a_check_that_says_yes_is_about_the_image_shown() -> None:
    for item in built_in().items:
        if item.name.endswith("check"):
            label = item.name.removesuffix(", check")
            assert (f"Yes or no: {label}?" in item.messages[0].content) == (item.answer == "Yes")


def test_a_model_without_images_is_asked_without() -> None:
    dataset = built_in(images=False)
    assert not [image for item in dataset.items for image in item.images]
    assert {item.kind for item in dataset.items} == {"f1", "text"}
