"""DICOM: what a viewer would show, and a clear line where there is nothing to show."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medge.errors import MissingExtraError, UsageError
from medge.runtimes.images import Picture, image_size, load_image

pydicom = pytest.importorskip("pydicom")
from pydicom.data import get_testdata_file  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, RLELossless, SecondaryCaptureImageStorage  # noqa: E402


def packaged(name: str, **changes: Any) -> bytes:
    """A small file of pydicom's own package, with some elements changed."""
    dataset = pydicom.dcmread(get_testdata_file(name, download=False))
    for keyword, value in changes.items():
        setattr(dataset, keyword, value)
    return written(dataset)


def written(dataset: Any) -> bytes:
    stream = io.BytesIO()
    dataset.save_as(stream)
    return stream.getvalue()


def made(pixels: np.ndarray, modality: str = "CR", photometric: str = "MONOCHROME2", **more: Any) -> Any:
    """A dataset around (H, W), (F, H, W) or (H, W, 3) pixels."""
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = "1.2.3"
    dataset.Modality = modality
    colour = photometric == "RGB"
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = photometric
    dataset.Rows, dataset.Columns = pixels.shape[:2] if colour else pixels.shape[-2:]
    if colour:
        dataset.PlanarConfiguration = 0
    elif pixels.ndim == 3:
        dataset.NumberOfFrames = len(pixels)
    dataset.BitsAllocated = pixels.dtype.itemsize * 8
    dataset.BitsStored = more.pop("BitsStored", dataset.BitsAllocated)
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    for keyword, value in more.items():
        setattr(dataset, keyword, value)
    dataset.add_new(
        "PixelData", "OB" if dataset.BitsAllocated == 8 else "OW", pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    )
    return dataset


def shown(*args: Any, **more: Any) -> Picture:
    stream = io.BytesIO()
    made(*args, **more).save_as(stream, enforce_file_format=True)
    return load_image(stream.getvalue())


def grey(picture: Picture) -> list[list[int]]:
    assert (picture.pixels == picture.pixels[:, :, :1]).all()
    return picture.pixels[:, :, 0].tolist()  # type: ignore[no-any-return]


def test_a_packaged_ct_gets_the_documented_window() -> None:
    path = get_testdata_file("CT_small.dcm", download=False)
    stored = pydicom.dcmread(path)
    hounsfield = stored.pixel_array * float(stored.RescaleSlope) + float(stored.RescaleIntercept)
    expected = np.rint(np.clip((hounsfield - (100 - 1250)) / 2500, 0, 1) * 65535)
    picture = load_image(path)
    assert picture.maximum == 65535
    assert np.abs(picture.pixels[:, :, 0] - expected).max() <= 1
    assert image_size(Path(path).read_bytes()) == (stored.Columns, stored.Rows)


def test_a_window_maps_center_and_width_to_the_full_range() -> None:
    pixels = np.array([[-2000, -160, 40, 240, 3000]], np.int16)
    picture = shown(pixels, "CT", WindowCenter="40", WindowWidth="400")
    assert grey(picture) == [[0, 0, 32768, 65535, 65535]]


def test_the_first_of_several_windows_counts_after_the_rescale() -> None:
    pixels = np.array([[0, 512, 1024]], np.uint16)
    more = {"RescaleSlope": "2", "RescaleIntercept": "-1024", "WindowCenter": ["0", "9"], "WindowWidth": ["2048", "1"]}
    assert grey(shown(pixels, "CT", **more)) == [[0, 32768, 65535]]


def test_a_sigmoid_window() -> None:
    pixels = np.array([[-30000, 100, 200, 30000]], np.int16)
    more = {"WindowCenter": "100", "WindowWidth": "400", "VOILUTFunction": "SIGMOID"}
    expected = round(65535 / (1 + np.exp(-1)))
    assert grey(shown(pixels, **more)) == [[0, 32768, expected, 65535]]


def test_monochrome1_is_inverted() -> None:
    eight = np.array([[0, 55, 255]], np.uint8)
    assert grey(shown(eight, "DX", "MONOCHROME1")) == [[255, 200, 0]]
    twelve = np.array([[0, 4095]], np.uint16)
    assert grey(shown(twelve, "DX", "MONOCHROME1", BitsStored=12)) == [[65535, 0]]


def test_twelve_bits_without_a_window_are_stretched_and_eight_are_kept() -> None:
    assert grey(shown(np.array([[100, 1100, 2100]], np.uint16), BitsStored=12)) == [[0, 32767, 65535]]
    assert grey(shown(np.array([[100, 101]], np.uint8))) == [[100, 101]]
    assert grey(shown(np.array([[900, 900]], np.uint16))) == [[0, 0]]


def test_a_voi_lut_is_applied() -> None:
    lut = pydicom.Dataset()
    lut.LUTDescriptor = [4, 0, 8]
    lut.add_new("LUTData", "OW", np.array([0, 51, 102, 255], np.uint16).tobytes())
    picture = shown(np.array([[0, 1, 2, 3]], np.uint16), VOILUTSequence=[lut])
    assert grey(picture) == [[0, 51 * 257, 102 * 257, 65535]]


def test_colour_stays_colour() -> None:
    pixels = np.arange(4 * 3 * 3, dtype=np.uint8).reshape(4, 3, 3)
    np.testing.assert_array_equal(shown(pixels, "XC", "RGB").pixels, pixels)
    deep = pixels.astype(np.uint16) * 1000
    np.testing.assert_array_equal(shown(deep, "SM", "RGB").pixels, deep)


@pytest.mark.parametrize("name", ["examples_palette.dcm", "SC_ybr_full_422_uncompressed.dcm"])
def test_palette_and_ybr_become_rgb(name: str) -> None:
    picture = load_image(packaged(name, Modality="XC"))
    assert picture.pixels.shape[2] == 3
    assert picture.pixels.std() > 0


def test_frames_are_chosen_by_index() -> None:
    pixels = np.arange(3, dtype=np.uint8)[:, None, None] * np.ones((3, 2, 2), np.uint8) * 50
    stream = io.BytesIO()
    made(pixels, "XC").save_as(stream, enforce_file_format=True)
    assert [load_image(stream.getvalue(), frame).pixels[0, 0, 0] for frame in range(3)] == [0, 50, 100]
    for frame in (-1, 3):
        with pytest.raises(UsageError, match=f"no frame {frame}. It has 3"):
            load_image(stream.getvalue(), frame)
    second = load_image(packaged("SC_rgb_rle_2frame.dcm", Modality="XC"), 1)
    first = load_image(packaged("SC_rgb_rle_2frame.dcm", Modality="XC"), 0)
    assert second.pixels.shape == first.pixels.shape == (100, 100, 3)
    assert (second.pixels != first.pixels).any()


@pytest.mark.parametrize("name", ["MR_small.dcm", "examples_rgb_color.dcm", "reportsi.dcm"])
def test_other_modalities_are_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=r"modality is (MR|US|SR)\. .*CR \(computed radiography\)"):
        load_image(packaged(name))


def test_a_dicom_without_pixels() -> None:
    with pytest.raises(UsageError, match="holds no pixels"):
        load_image(packaged("reportsi.dcm", Modality="CR"))
    dataset = made(np.zeros((2, 2), np.uint8))
    del dataset.PixelData
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    with pytest.raises(UsageError, match="missing, cut short or not decodable"):
        load_image(stream.getvalue())


def test_a_cut_dicom_is_an_error() -> None:
    data = packaged("CT_small.dcm")
    for length in (131, 132, 200, 1000, len(data) // 2, len(data) - 4000):
        with pytest.raises(UsageError) as caught:
            load_image(data[:length])
        assert "\n" not in str(caught.value)


def test_a_bomb_is_refused_by_its_header() -> None:
    dataset = made(np.zeros((2, 2), np.uint8))
    dataset.Rows = dataset.Columns = 20_000
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    with pytest.raises(UsageError, match="more than 100 million"):
        load_image(stream.getvalue())


def test_a_codec_that_is_not_installed_is_named() -> None:
    data = packaged("SC_rgb_jpeg_gdcm.dcm", Modality="XC")
    syntax = pydicom.dcmread(io.BytesIO(data)).file_meta.TransferSyntaxUID
    if pydicom.pixels.get_decoder(syntax).is_available:
        pytest.skip("this machine has the JPEG lossless codec")
    with pytest.raises(MissingExtraError, match=r"JPEG Lossless.*pip install python-gdcm") as caught:
        load_image(data)
    assert caught.value.exit_code == 3


def test_rle_needs_no_codec() -> None:
    dataset = made(np.arange(64, dtype=np.uint8).reshape(8, 8))
    dataset.compress(RLELossless)
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    assert grey(load_image(stream.getvalue())) == np.arange(64).reshape(8, 8).tolist()


def test_a_text_file_named_dcm(tmp_path: Path) -> None:
    path = tmp_path / "scan.dcm"
    path.write_text("no picture " * 50)
    with pytest.raises(UsageError, match=r"scan\.dcm is no DICOM file: it has no DICM mark"):
        load_image(path)


def test_nothing_of_the_patient_reaches_a_message_or_a_log(caplog: pytest.LogCaptureFixture) -> None:
    data = packaged("CT_small.dcm", PatientName="Secret^Name")
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(data[: len(data) - int(rng.integers(2)) * 8000])
        damaged[int(rng.integers(132, 1800))] = int(rng.integers(256))
        try:
            load_image(bytes(damaged))
        except UsageError as error:
            assert "Secret" not in str(error)  # noqa: PT017
    with pydicom.config.disable_value_validation():
        shifted = packaged("CT_small.dcm", Modality="Secret^Name").replace(b"ISO_IR 100", b"Secret^Set")
    assert b"Secret^Set" in shifted
    caplog.clear()
    with pytest.raises(UsageError, match="its modality is missing"):
        load_image(shifted)
    assert not caplog.records


@pytest.mark.parametrize("keyword", ["NumberOfFrames", "WindowWidth", "RescaleSlope", "BitsStored", "Rows"])
def test_malformed_values_are_an_error_in_one_line(keyword: str) -> None:
    data = made(np.zeros((2, 2), np.uint16), WindowCenter="1", WindowWidth="2", RescaleSlope="1", RescaleIntercept="0")
    setattr(data, keyword, None)
    stream = io.BytesIO()
    data.save_as(stream, enforce_file_format=True)
    try:
        assert load_image(stream.getvalue()).pixels.shape == (2, 2, 3)
    except UsageError as error:
        assert "\n" not in str(error)  # noqa: PT017
