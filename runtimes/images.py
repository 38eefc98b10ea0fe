"""From what a user has (a file, bytes, a Pillow image, an array) to RGB pixels, and nothing lossy on the way.

What is kept and what is not, for every source:

- EXIF orientation is applied. (TensorFlow's decoder ignores it; a sideways photo is never what was meant.)
- Alpha is dropped, not blended, as Google's serving container does; so does Pillow's `convert("RGB")`.
- Grey of 16 bits keeps them. Its full scale is 65535, never the image's own maximum: a 12-bit radiograph
  saved without scaling stays as dark as it was saved. Colour of 16 bits is read as its high bytes.
- Colour profiles are not applied. JPEG is decoded by Pillow's libjpeg, whose pixels may differ by a level or
  two from TensorFlow's default decoder: parity begins at the pixels.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray

from medge.errors import MedgeError, UsageError

MAX_PIXELS = 100_000_000
"""Larger images are refused by their header: a decompression bomb costs nothing."""

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000")
"""No other of Pillow's plugins is let near a file; its EPS one starts Ghostscript."""

_GREY = ("L", "I;16", "I;16L", "I;16B", "I;16N")
_TOO_DEEP = ("I", "F")
_REMEDY = "Give a PNG, JPEG, TIFF, WebP, GIF, BMP, JPEG 2000 or DICOM file"


@dataclass(frozen=True, eq=False)
class Picture:
    """An upright RGB image, not to be written to (grey shares one plane between its channels)."""

    pixels: NDArray[np.uint8] | NDArray[np.uint16]
    """(H, W, 3), with H and W at least 1."""

    @property
    def maximum(self) -> int:
        """White: 255 or 65535."""
        return int(np.iinfo(self.pixels.dtype).max)


ImageLike = str | Path | bytes | PIL.Image.Image | NDArray[np.uint8] | NDArray[np.uint16] | Picture
"""A path, an encoded file's bytes, a Pillow image, or an array (H, W) or (H, W, 3) of 8 or 16 bits, or a Picture."""


def load_image(source: ImageLike, frame: int = 0) -> Picture:
    """Decode one image. `frame` picks one of a multi-frame file (GIF, TIFF, DICOM), counted from 0.

    DICOM is known by its content, or by the suffix .dcm.

    Raises:
        UsageError: no image there, or a damaged, too large or too deep one, or one without that frame.
        MissingExtraError: a DICOM, and pydicom or the codec of its pixels is not installed.
    """
    if isinstance(source, Picture | np.ndarray | PIL.Image.Image):
        if frame:
            raise UsageError(f"An image in memory has no frame {frame}", "Pass the frame itself")
        if isinstance(source, Picture):
            return source
        return _from_array(source) if isinstance(source, np.ndarray) else _from_pillow(source)
    if isinstance(source, bytes):
        return _from_stream(io.BytesIO(source), "The image", frame)
    path = Path(source)
    try:
        with path.open("rb") as stream:
            return _from_stream(stream, str(path), frame)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist", "Check the path") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder, not an image", "Name the files in it") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "Check its permissions") from None


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height that an encoded file's header states. No pixel is decoded.

    Raises:
        UsageError: no image there, or one without pixels, or with more than MAX_PIXELS.
        MissingExtraError: a DICOM, and pydicom is not installed.
    """
    stream = io.BytesIO(data)
    if not data:
        raise UsageError("The image is empty", _REMEDY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if data[128:132] == b"DICM":
            from medge.runtimes.dicom import dicom_size

            return dicom_size(stream, "The image")
        with _open(stream, "The image", 0) as image:
            return image.size


def check_size(width: int, height: int, name: str) -> None:
    """Refuse an image by the size that its header states.

    Raises:
        UsageError: it has no pixels, or more than MAX_PIXELS.
    """
    if width < 1 or height < 1:
        raise UsageError(f"{name} has no pixels ({width} x {height})", _REMEDY)
    if width * height > MAX_PIXELS:
        raise UsageError(
            f"{name} has {width} x {height} pixels, more than {MAX_PIXELS // 1_000_000} million",
            "Shrink it, or crop what matters",
        )


def grey_picture(plane: NDArray[Any]) -> Picture:
    """A Picture of one (H, W) plane of 8 or 16 bits, without copying it threefold."""
    wide = np.uint8 if plane.dtype.itemsize == 1 else np.uint16  # a byte-swapped plane becomes a native one
    native = plane.astype(wide, copy=False)
    return Picture(np.broadcast_to(native[:, :, None], (*plane.shape, 3)))


def _from_array(array: NDArray[np.uint8] | NDArray[np.uint16]) -> Picture:
    if array.dtype not in (np.uint8, np.uint16):
        raise UsageError(f"An image array has dtype {array.dtype}", "Give uint8 or uint16, from 0 to the maximum")
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
        raise UsageError(f"An image array has shape {array.shape}", "Give (H, W) or (H, W, 3)")
    check_size(array.shape[1], array.shape[0], "An image array")
    return grey_picture(array) if array.ndim == 2 else Picture(array)


def _from_pillow(image: PIL.Image.Image) -> Picture:
    check_size(*image.size, "The image")
    return _decode(image, "The image")


def _from_stream(stream: IO[bytes], name: str, frame: int) -> Picture:
    head = stream.read(132)
    stream.seek(0)
    if not head:
        raise UsageError(f"{name} is empty", _REMEDY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on EXIF, TIFF or DICOM tags: no concern of the user, and may quote a patient
        if head[128:] == b"DICM" or name.lower().endswith(".dcm"):
            from medge.runtimes.dicom import read_dicom

            return read_dicom(stream, name, frame)
        return _decode(_open(stream, name, frame), name)


def _open(stream: IO[bytes], name: str, frame: int) -> PIL.Image.Image:
    """The header, at the wanted frame. No pixel is decoded yet."""
    try:
        image = PIL.Image.open(stream, formats=_FORMATS)
        check_size(*image.size, name)
        if frame:
            _seek(image, name, frame)
            check_size(*image.size, name)
    except MedgeError:
        raise
    except PIL.UnidentifiedImageError:
        raise UsageError(f"{name} is no image that medge knows", _REMEDY) from None
    except PIL.Image.DecompressionBombError:
        raise UsageError(f"{name} has more than {MAX_PIXELS // 1_000_000} million pixels", "Shrink it") from None
    except Exception as error:  # a parser given hostile bytes raises anything
        raise _damaged(name, error) from None
    return image


def _seek(image: PIL.Image.Image, name: str, frame: int) -> None:
    count = getattr(image, "n_frames", 1)
    if not 0 <= frame < count:
        raise UsageError(f"{name} has no frame {frame}", f"It has {count}, counted from 0")
    image.seek(frame)


def _decode(image: PIL.Image.Image, name: str) -> Picture:
    try:
        image.load()
        image = _upright(image)
        if image.mode in _GREY:
            return grey_picture(np.asarray(image))
        if image.mode not in _TOO_DEEP:
            return Picture(np.asarray(image if image.mode == "RGB" else image.convert("RGB")))
    except Exception as error:  # a decoder given hostile bytes raises anything
        raise _damaged(name, error) from None
    raise UsageError(f"{name} has 32-bit pixels (mode {image.mode})", "Scale it to 8 or 16 bits without sign")


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    try:
        return PIL.ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing of the pixels, which have been read
        return image


def _damaged(name: str, error: Exception) -> UsageError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UsageError(f"{name} is damaged or cut short: {reason}", "Copy or save it again")
