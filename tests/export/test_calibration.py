"""What importance is collected on: own texts, prompts and folders, and the set that ships."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from medge.benchmarks import chat_data
from medge.checkpoint import Checkpoint
from medge.errors import UsageError
from medge.export import calibration
from medge.export.calibration import CHUNK
from medge.prompts import read_prompts
from medge.runtimes.generate import Message
from medge.runtimes.images import load_image
from medge.runtimes.torch_generator import open_reference
from medge.samples import digest, list_images, sample_root

IMAGE = list_images(sample_root(), 1)[0]


def test_a_text_is_read_in_chunks_that_begin_as_prompts_do(chat: Path, words: Path) -> None:
    checkpoint = Checkpoint.open(chat)
    words.write_text("The lungs are clear. " * 40_000, encoding="utf-8")
    found = calibration.load(checkpoint, words)
    assert [len(prompt.ids) for prompt in found.prompts] == [CHUNK] * calibration.CHUNKS
    assert {prompt.ids[0] for prompt in found.prompts} == {2}
    assert found.description.startswith("own calibration set: 8,192 tokens with 0 images, sha256 ")


def test_questions_are_read_with_their_answers_as_the_model_sees_them(chat: Path, tmp_path: Path) -> None:
    path, checkpoint = tmp_path / "own.jsonl", Checkpoint.open(chat)
    lines = [
        {"kind": "f1", "prompt": "What is it?", "images": [str(IMAGE)], "answer": "a chest x-ray"},
        {"kind": "f1", "prompt": "Which organ?", "answer": "the heart"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    generator = open_reference(chat, device="cpu")
    text, shown = calibration.load(checkpoint, path).prompts
    answer = generator.tokenize("a chest x-ray<end_of_turn>")
    assert shown.ids == (*generator.prompt([Message("user", (IMAGE, "What is it?"))]).ids, *answer)
    assert len(shown.images) == 1
    assert text.ids == (
        *generator.prompt([Message("user", ("Which organ?",))]).ids,
        *generator.tokenize("the heart<end_of_turn>"),
    )


def test_a_folder_gives_its_images_beside_the_text_that_ships(chat: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(chat)
    shutil.copy(IMAGE, tmp_path / "one.jpg")
    *texts, shown = calibration.load(checkpoint, tmp_path).prompts
    np.testing.assert_array_equal(shown.images[0].pixels, load_image(IMAGE).pixels)
    shipped = calibration.load(checkpoint, None).prompts
    assert [prompt.ids for prompt in texts] == [prompt.ids for prompt in shipped if not prompt.images]


def test_images_are_counted(chat: Path, tmp_path: Path) -> None:
    many = [
        {"kind": "f1", "prompt": "Compare.", "images": [str(IMAGE)] * n, "answer": "Same."} for n in (5, 9, 2, 2, 1)
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, many)), encoding="utf-8")
    found = calibration.load(Checkpoint.open(chat), path)
    assert [len(prompt.images) for prompt in found.prompts] == [5, 2, 1]


def test_the_set_that_ships_is_not_what_the_gate_asks(chat: Path, text_chat: Path) -> None:
    ours, gate = read_prompts(calibration.BUILT_IN), chat_data.built_in()
    general = chat_data.built_in(images=False)
    said = {str(item.messages[0].content[-1]) for item in (*gate.items, *general.items)}
    assert not any(sentence in str(item.messages[-1].content[-1]) for sentence in said for item in ours)
    theirs = {digest([image], []) for item in gate.items for image in item.images}
    assert not any(digest([image], []) in theirs for item in ours for image in item.images)
    assert all(not prompt.images for prompt in calibration.load(Checkpoint.open(text_chat), None).prompts)
    found = calibration.load(Checkpoint.open(chat), None)
    assert any(prompt.images for prompt in found.prompts)
    assert found.description.startswith("medge's calibration set: ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("own.txt", b"", "holds nothing that this model reads"),
        ("own.txt", b"\xff\xfe\x00", "is no UTF-8 text"),
        ("own.jsonl", b"", "holds no prompts"),
        ("own.jsonl", b'{"kind": "f1", "prompt": "x"}', "line 1: .*a question needs its 'answer'"),
        ("own.jsonl", b'{"kind": "f1", "prompt": "x", "answer": "y", "images": ["no.png"]}', "'.*no.png' is missing"),
    ],
)
def test_a_calibration_file_without_use_is_refused(
    name: str, content: bytes, message: str, chat: Path, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        calibration.load(Checkpoint.open(chat), path)


def test_a_folder_without_images_is_refused(chat: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no images to calibrate on"):
        calibration.load(Checkpoint.open(chat), tmp_path)
