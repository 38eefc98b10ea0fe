"""What users really have: formats, depths, orientations, and files that are not what their name says."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medge.errors import UsageError
from medge.runtimes import images
from medge.runtimes.images import image_size, load_image

GRADIENT = np.arange(7 * 5 * 3, dtype=np.uint8).reshape(5, 7, 3)
DEEP = np.array([[0, 257, 4095], [32768, 65534, 65535]], dtype=np.uint16)


def encode(image: PIL.Image.Image, format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def png(array: np.ndarray) -> bytes:
    return encode(PIL.Image.fromarray(array), "PNG")


@pytest.mark.parametrize("kind", ["path", "str", "bytes", "pillow", "array"])
def test_every_source_gives_the_same_pixels(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(png(GRADIENT))
    sources: dict[str, images.ImageLike] = {
        "path": path,
        "str": str(path),
        "bytes": path.read_bytes(),
        "pillow": PIL.Image.fromarray(GRADIENT),
        "array": GRADIENT,
    }
    picture = load_image(sources[kind])
    np.testing.assert_array_equal(picture.pixels, GRADIENT)
    assert picture.maximum == 255


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_grey_of_16_bits_keeps_them(format: str) -> None:
    picture = load_image(encode(PIL.Image.fromarray(DEEP), format))
    assert picture.pixels.dtype == np.uint16
    assert picture.maximum == 65535
    for channel in range(3):
        np.testing.assert_array_equal(picture.pixels[:, :, channel], DEEP)


def test_big_endian_tiff_becomes_native() -> None:
    tiff = encode(PIL.Image.fromarray(DEEP.astype(">u2")), "TIFF")
    picture = load_image(tiff)
    assert picture.pixels.dtype == np.dtype(np.uint16)
    np.testing.assert_array_equal(picture.pixels[:, :, 0], DEEP)


def test_a_deep_array_and_a_grey_array_become_rgb() -> None:
    assert load_image(DEEP).pixels.shape == (2, 3, 3)
    assert load_image(np.zeros((4, 4, 3), np.uint16)).maximum == 65535
    np.testing.assert_array_equal(load_image(GRADIENT[:, :, 0]).pixels[:, :, 2], GRADIENT[:, :, 0])


def test_alpha_is_dropped_not_blended() -> None:
    rgba = np.dstack([GRADIENT, np.zeros(GRADIENT.shape[:2], np.uint8)])
    np.testing.assert_array_equal(load_image(png(rgba)).pixels, GRADIENT)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "YCbCr", "RGBA"])
def test_every_mode_becomes_what_pillow_calls_rgb(mode: str) -> None:
    image = PIL.Image.fromarray(GRADIENT).convert(mode)
    np.testing.assert_array_equal(load_image(image).pixels, np.asarray(image.convert("RGB")))


def test_palette_with_transparency_warns_nobody() -> None:
    image = PIL.Image.fromarray(GRADIENT).quantize(4)
    data = encode(image, "PNG", transparency=bytes([0, 128, 255, 255]))
    np.testing.assert_array_equal(load_image(data).pixels, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    picture = load_image(encode(PIL.Image.fromarray(GRADIENT), "PNG", exif=exif.tobytes()))
    turned = {
        1: GRADIENT,
        2: GRADIENT[:, ::-1],
        3: GRADIENT[::-1, ::-1],
        4: GRADIENT[::-1],
        5: GRADIENT.transpose(1, 0, 2),
        6: np.rot90(GRADIENT, -1),
        7: GRADIENT.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(GRADIENT),
    }
    np.testing.assert_array_equal(picture.pixels, turned[orientation])


@given(st.binary(max_size=60))
@settings(max_examples=60, deadline=None)
def test_a_broken_exif_block_leaves_the_pixels(block: bytes) -> None:
    data = encode(PIL.Image.fromarray(GRADIENT), "JPEG", exif=b"Exif\0\0" + block)
    assert sorted(load_image(data).pixels.shape) == [3, 5, 7]


def test_frames_are_chosen_by_index() -> None:
    pages = [PIL.Image.fromarray(np.full((3, 4), level, np.uint8)) for level in (10, 20, 30)]
    tiff = encode(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert [load_image(tiff, frame).pixels[0, 0, 0] for frame in range(3)] == [10, 20, 30]
    for frame in (-1, 3):
        with pytest.raises(UsageError, match="It has 3"):
            load_image(tiff, frame)
    with pytest.raises(UsageError, match="no frame 1"):
        load_image(GRADIENT, 1)


@pytest.mark.parametrize(
    ("format", "options"),
    [("PNG", {}), ("JPEG", {"quality": 90}), ("JPEG", {"progressive": True}), ("TIFF", {})],
)
def test_a_cut_file_is_an_error_or_whole_never_half_grey(format: str, options: dict[str, Any]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    data = encode(PIL.Image.fromarray(noise), format, **options)
    whole = load_image(data).pixels
    refused = 0
    for length in range(0, len(data), 7):
        try:
            np.testing.assert_array_equal(load_image(data[:length]).pixels, whole)
        except UsageError as error:
            assert "\n" not in str(error)  # noqa: PT017
            refused += 1
    assert refused > len(data) // 7 * 0.9


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_noise_is_refused_in_one_line(noise: bytes) -> None:
    for head in (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"II*\0", b"GIF89a", b"BM"):
        with pytest.raises(UsageError) as caught:
            load_image(head + noise)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"not an image\n" * 40, b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_a_text_file_named_png(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "note.png"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"note\.png is (no image|empty).*Give a PNG") as caught:
        load_image(path)
    assert caught.value.exit_code == 2


def test_paths_that_lead_to_no_image(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.png does not exist"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(UsageError, match="is a folder"):
        load_image(tmp_path)


@pytest.mark.parametrize("size", [(10_001, 10_000), (60_000, 60_000)])
def test_a_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    data = bytearray(png(GRADIENT))
    data[16:24] = b"".join(side.to_bytes(4, "big") for side in size)
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(UsageError, match="more than 100 million"):
        load_image(bytes(data))


def test_one_pixel_and_forty_megapixel() -> None:
    one = load_image(png(np.array([[[1, 2, 3]]], np.uint8)))
    assert one.pixels.tolist() == [[[1, 2, 3]]]
    large = PIL.Image.new("L", (8000, 5000), 7)
    picture = load_image(encode(large, "PNG", compress_level=1))
    assert picture.pixels.shape == (5000, 8000, 3)
    assert picture.pixels[4999, 7999].tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.float32),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((4,), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_arrays_that_are_no_image(array: Any) -> None:
    with pytest.raises(UsageError):
        load_image(array)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_32_bits_are_refused_not_guessed(mode: str) -> None:
    with pytest.raises(UsageError, match="32-bit"):
        load_image(encode(PIL.Image.new(mode, (3, 3)), "TIFF"))
    with pytest.raises(UsageError, match="no pixels"):
        load_image(PIL.Image.new(mode, (0, 0)))


def test_the_size_is_read_without_the_pixels() -> None:
    file = io.BytesIO()
    PIL.Image.new("RGB", (7, 5)).save(file, "PNG")
    assert image_size(file.getvalue()) == (7, 5)
    assert image_size(file.getvalue()[:-20]) == (7, 5)
    with pytest.raises(UsageError, match="is empty"):
        image_size(b"")
    with pytest.raises(UsageError, match="no image that medge knows"):
        image_size(b"text")
