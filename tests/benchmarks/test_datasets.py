from pathlib import Path

import pytest

from medge.benchmarks.datasets import load_dataset
from medge.errors import UsageError


def _csv(data: Path, text: str) -> Path:
    path = data / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_folder_per_class_is_read_in_order_and_other_files_are_skipped(data: Path) -> None:
    dataset = load_dataset(data)
    assert dataset.labels == ("chest x-ray", "eye", "skin")
    assert len(dataset.items) == 36
    assert [item.name for item in dataset.items] == sorted(item.name for item in dataset.items)
    assert not dataset.multilabel
    assert dataset.targets.sum(axis=0).tolist() == [12, 12, 12]


def test_the_digest_follows_bytes_and_labels_not_the_place(data: Path, tmp_path: Path) -> None:
    before = load_dataset(data).digest
    moved = data.rename(tmp_path / "elsewhere")
    assert load_dataset(moved).digest == before
    (moved / "eye").rename(moved / "retina")
    relabelled = load_dataset(moved).digest
    assert relabelled != before
    image = moved / "skin" / "0.png"
    image.write_bytes(image.read_bytes() + b"x")
    assert load_dataset(moved).digest not in (before, relabelled)


def test_csv_with_several_labels_in_a_cell(data: Path) -> None:
    rows = "path,label,patient\neye/0.png,retina|drusen,7\nskin/0.png,skin,8\n"
    dataset = load_dataset(_csv(data, rows))
    assert dataset.labels == ("drusen", "retina", "skin")
    assert dataset.multilabel
    assert dataset.targets.tolist() == [[True, True, False], [False, False, True]]


def test_csv_with_a_column_a_label_keeps_images_without_findings(data: Path) -> None:
    dataset = load_dataset(_csv(data, "path,edema,effusion\neye/0.png,0,0\neye/1.png,1,1\n"))
    assert dataset.labels == ("edema", "effusion")
    assert dataset.targets.tolist() == [[False, False], [True, True]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("path,label\neye/0.png,a\neye/99.png,b\n", r"line 3: the image 'eye/99.png' is missing"),
        ("path,label\neye/0.png,\n", "line 2 has no label"),
        ("path,label\neye/0.png,a\nskin/0.png,a\n", "one label only, 'a': AUC"),
        ("path,label\neye/0.png,a\neye/../eye/0.png,b\n", r"lists 'eye/../eye/0.png' twice"),
        ("path,a,b\neye/0.png,1,maybe\n", "line 2: column 'b' holds 'maybe'"),
        ("file,label\neye/0.png,a\n", "no column 'path'"),
        ("path,label\neye/0.png,a,extra\n", "line 2 has another number of cells"),
        ("path,label\neye/0.png\n", "line 2 has another number of cells"),
        ("path,a,a\neye/0.png,1,0\n", "names a column twice"),
        ("path,a\neye/0.png,0\n", "names no labels"),
        ("path,label\n", "holds no images"),
    ],
)
def test_a_bad_csv_is_named_with_its_line(data: Path, rows: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_dataset(_csv(data, rows))


def test_bad_folders(data: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match="holds no images"):
        load_dataset(empty)
    with pytest.raises(UsageError, match="neither a folder nor a CSV"):
        load_dataset(tmp_path / "nowhere")
    (data / "stray.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"stray\.png lies in no class folder"):
        load_dataset(data)
    (data / "stray.png").unlink()
    (data / "eye" / "weights.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"weights\.bin is no image"):
        load_dataset(data)


def test_a_csv_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"path,label\n\xff\xfe,a\n")
    with pytest.raises(UsageError, match="no CSV in UTF-8"):
        load_dataset(path)
