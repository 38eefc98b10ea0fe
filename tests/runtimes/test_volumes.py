"""CT volumes in MedGemma 1.5's three windows, and how many slices a context holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from medge.errors import UsageError
from medge.runtimes.images import Picture
from medge.runtimes.volumes import MAX_SLICES, CtSlices, ct_message, ct_slices, slice_budget, windowed

pydicom = pytest.importorskip("pydicom")


def official(hounsfield: Any) -> Any:
    """The notebook's arithmetic, in one line a channel."""
    planes = []
    for low, high in ((-1024, 1024), (-135, 215), (0, 80)):
        scaled = (np.clip(hounsfield, low, high).astype(np.float32) - low) / (high - low) * np.float32(255)
        planes.append(np.round(scaled, 0).astype(np.uint8))
    return np.stack(planes, axis=-1)


@pytest.mark.parametrize("dtype", [np.int16, np.float64])
def test_hounsfield_units_become_three_windows(dtype: type) -> None:
    hounsfield: Any = np.linspace(-1500, 3000, 4501).reshape(1, -1).astype(dtype)
    pixels = windowed(hounsfield).pixels
    assert np.array_equal(pixels, official(hounsfield))
    assert pixels[0, 0].tolist() == [0, 0, 0]
    assert pixels[0, -1].tolist() == [255, 255, 255]
    assert pixels[0, 1500 + 40].tolist() == [132, 128, 128]


def test_a_value_that_is_no_number_is_refused() -> None:
    with pytest.raises(UsageError, match="no numbers"):
        windowed(np.array([[np.nan]]))


@pytest.mark.parametrize(("count", "limit"), [(3, 5), (5, 5), (300, 85), (10, 3), (2, 1)])
def test_slices_are_spread_as_in_the_notebook(count: int, limit: int) -> None:
    volume = np.arange(count).reshape(-1, 1, 1) * 6 - 1024.0
    slices = ct_slices(volume, limit)
    chosen = [round(i / limit * (count - 1)) for i in range(1, limit + 1)]
    expected = chosen if count > limit else range(count)
    assert [p.pixels[0, 0, 0] for p in slices.pictures] == [official(volume[i])[0, 0, 0] for i in expected]
    assert slices.total == count
    assert bool(slices.note) is (count > limit)


def test_each_slice_is_followed_by_its_number_and_the_question_comes_last() -> None:
    picture = windowed(np.zeros((2, 2)))
    content = ct_message(CtSlices((picture, picture), 9), "Is the liver normal?").content
    assert [item for item in content[1:] if isinstance(item, str)] == ["SLICE 1", "SLICE 2", "Is the liver normal?"]
    assert [isinstance(item, Picture) for item in content] == [False, True, False, True, False, False]
    assert CtSlices((picture, picture), 9).note == "2 of the volume's 9 slices are shown, evenly spread"


def model(context: int) -> Any:
    """A model with a token a character."""
    return SimpleNamespace(context=context, image_tokens=256, tokenize=list)


@pytest.mark.parametrize(("context", "expected"), [(4096, 12), (8192, 26), (131072, MAX_SLICES)])
def test_the_budget_follows_the_context(context: int, expected: int) -> None:
    assert slice_budget(model(context), "Q", 100) == expected


def test_a_context_without_room_for_a_slice_is_told() -> None:
    with pytest.raises(UsageError, match="holds no CT slice"):
        slice_budget(model(512), "Q", 300)


def test_the_budget_really_fits(generator: Any) -> None:
    question = "Is there a lesion in the liver?"
    count = slice_budget(generator, question, 7900)
    assert 1 < count < MAX_SLICES
    slices = ct_slices(np.zeros((count + 1, 4, 4)), count + 1)
    fitting = CtSlices(slices.pictures[:count], count)
    assert len(generator.prompt([ct_message(fitting, question)]).ids) + 7900 <= generator.context
    more = len(generator.prompt([ct_message(slices, question)]).ids) + 7900
    assert more > generator.context - 64  # the estimate wastes no more than the room it keeps for the turns' marks


def write(path: Path, number: int | None, **fields: Any) -> None:
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number or 0}"
    values = np.full((4, 6), 1024 + 10 * (number or 0), np.uint16)
    values[0, 0] = 0
    standard: dict[str, Any] = {
        "Modality": "CT", "SeriesInstanceUID": "1.2.3", "InstanceNumber": number, "Rows": 4, "Columns": 6,
        "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 0, "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2", "RescaleSlope": 1, "RescaleIntercept": -1024,
        "PixelData": values.tobytes(),
    }  # fmt: skip
    for key, value in (standard | fields).items():
        if value is not None:
            setattr(dataset, key, value)
    dataset.save_as(path, enforce_file_format=True)


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """Three slices of 10, 20 and 30 HU whose names are not in their order, and what else lies in such a folder."""
    for name, number in (("c.dcm", 1), ("a.dcm", 2), ("b.dcm", 3)):
        write(tmp_path / name, number)
    (tmp_path / "notes.txt").write_text("no image", encoding="utf-8")
    (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    return tmp_path


def test_a_series_is_read_in_the_order_of_its_instances(series: Path) -> None:
    slices = ct_slices(series)
    assert [p.pixels[1, 1, 2] for p in slices.pictures] == [32, 64, 96]  # 10, 20, 30 of 80 HU
    assert slices.pictures[0].pixels[0, 0].tolist() == [0, 0, 0]
    assert slices.total == 3
    assert len(ct_slices(sorted(series.glob("*.dcm")), 2).pictures) == 2


def test_only_the_slices_taken_are_decoded(series: Path) -> None:
    write(series / "a.dcm", 2, PixelData=b"\0\0")
    assert len(ct_slices(series, 1).pictures) == 1
    with pytest.raises(UsageError, match="cut short"):
        ct_slices(series)


def test_frames_of_one_file_are_slices(tmp_path: Path) -> None:
    values = np.stack([np.full((4, 6), 1024 + 10 * n, np.uint16) for n in (4, 2)])
    write(tmp_path / "multi.dcm", 1, NumberOfFrames=2, PixelData=values.tobytes())
    assert [p.pixels[0, 0, 2] for p in ct_slices(tmp_path / "multi.dcm").pictures] == [128, 64]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"Modality": "MR"}, "no CT slice"),
        ({"SeriesInstanceUID": "1.2.4"}, "2 series"),
        ({"InstanceNumber": None}, "no instance number"),
        ({"RescaleSlope": None}, "Hounsfield"),
        ({"PixelData": None}, "not decodable"),
    ],
)
def test_a_series_that_is_none_is_refused(series: Path, fields: dict[str, Any], says: str) -> None:
    write(series / "b.dcm", 3, **fields)
    with pytest.raises(UsageError, match=says):
        ct_slices(series)


def _empty(folder: Path) -> Path:
    (folder / "none").mkdir()
    return folder / "none"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (_empty, "No DICOM file"),
        (lambda folder: folder / "missing", "cannot be read"),
        (lambda folder: folder / "notes.txt", "no DICOM"),
        (lambda _: np.zeros((4, 4)), "shape"),
    ],
)
def test_what_is_no_volume_is_refused(series: Path, source: Callable[[Path], Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ct_slices(source(series))
