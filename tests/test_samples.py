"""The real images and prompts that parity and calibration use."""

from __future__ import annotations

from pathlib import Path

import pytest

from medge.runtimes.images import load_image
from medge.samples import digest, list_images, sample_root, sample_texts


def test_every_sample_decodes() -> None:
    images = list_images(sample_root(), 10_000)
    assert len(images) >= 16
    for path in images:
        assert min(load_image(path).pixels.shape[:2]) > 16


def test_the_first_samples_are_of_different_classes() -> None:
    classes = [path.parent for path in list_images(sample_root(), 4)]
    assert len(set(classes)) == 4


def test_texts_name_the_classes() -> None:
    texts = sample_texts(10_000)
    assert len(set(texts)) == len(texts)
    for path in list_images(sample_root(), 8):
        assert path.parent.name in texts
    assert sample_texts(3) == texts[:3]


def test_images_come_from_folders_in_turn(tmp_path: Path) -> None:
    for name in ("b/1.png", "b/0.JPG", "a/0.png", "a/1.png", "a/2.dcm", "a/notes.txt", "top.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = [str(path.relative_to(tmp_path)) for path in list_images(tmp_path, 5)]
    assert found == ["a/0.png", "b/0.JPG", "top.tif", "a/1.png", "b/1.png"]
    assert list_images(tmp_path, 0) == []
    assert list_images(tmp_path / "absent", 3) == []


@pytest.mark.parametrize("change", ["content", "text", "order"])
def test_the_digest_is_of_content_and_order(change: str, tmp_path: Path) -> None:
    images = [tmp_path / "0", tmp_path / "1"]
    for path in images:
        path.write_text(path.name)
    before = digest(images, ["a"])
    if change == "content":
        images[0].write_text("x")
    assert digest(images[::-1] if change == "order" else images, ["b" if change == "text" else "a"]) != before


def test_the_digest_is_not_of_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("same")
    assert digest([tmp_path / "a"], []) == digest([tmp_path / "b"], [])
