"""DICOM to pixels, as Google's MedSigLIP serving container reads it, so that its numbers can be met.

Source: Google-Health/medsiglip, python/data_accessors/local_file_handlers/generic_dicom_handler.py. Grey goes
through the modality LUT or rescale, then

- a window (the first, if there are several) maps center ± width // 2 to the 16-bit range;
- CT without one gets center 100, width 2500, in Hounsfield units;
- anything else of 8 bits stays; deeper than that, its own minimum to maximum is stretched to 16 bits;

and MONOCHROME1 is inverted. Colour (RGB, YBR, palette) becomes RGB, untouched otherwise.

Beyond the container: any frame can be read, a VOI LUT is applied where there is no window, and a window's
SIGMOID function is honoured. MedGemma's three CT windows are its own recipe and not made here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from medge.errors import MedgeError, MissingExtraError, UsageError, require
from medge.runtimes.images import Picture, check_size, grey_picture

MODALITIES = {
    "CR": "computed radiography",
    "DX": "digital X-ray",
    "GM": "general microscopy",
    "SM": "slide microscopy",
    "XC": "external camera",
    "CT": "computed tomography",
}
"""Those that MedSigLIP's serving container accepts."""

CT_WINDOW = (100.0, 2500.0)
"""Center and width in HU of a CT that names no window; the container's default."""

_WHITE = 65535


def read_dicom(stream: IO[bytes], name: str, frame: int = 0) -> Picture:
    """One frame of a DICOM file, counted from 0. Only that frame is read and decoded.

    Raises:
        MissingExtraError: pydicom, or the codec of these pixels, is not installed.
        UsageError: no DICOM, another modality, no pixels, no such frame, or pixels cut short.
    """
    pydicom = require("pydicom", "dicom")
    with unlogged():
        return _read(pydicom, stream, name, frame)


def dicom_size(stream: IO[bytes], name: str) -> tuple[int, int]:
    """Width and height of a DICOM file's frames, by its header.

    Raises:
        MissingExtraError: pydicom is not installed.
        UsageError: no DICOM, another modality, or no pixels.
    """
    pydicom = require("pydicom", "dicom")
    with unlogged():
        found = read_header(pydicom, stream, name)
        _check_modality(found, name)
        check_frame(found, name, 0)
        return int(found.Columns), int(found.Rows)


@contextmanager
def unlogged() -> Iterator[None]:
    """pydicom's warnings quote what an element holds, in a damaged file perhaps a patient's name."""
    logger = logging.getLogger("pydicom")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _read(pydicom: ModuleType, stream: IO[bytes], name: str, frame: int) -> Picture:
    header = read_header(pydicom, stream, name)
    try:
        _check_modality(header, name)
        check_frame(header, name, frame)
        check_codec(header, name)
        pixels = require("pydicom.pixels", "dicom").pixel_array(stream, index=frame)
        return _colour(pixels, header, name) if pixels.ndim == 3 else _grey(pixels, header, name)
    except MedgeError:
        raise
    except Exception:  # a decoder given hostile bytes raises anything, and its text may quote a patient
        raise UsageError(
            f"{name}: its pixels are missing, cut short or not decodable", "Export it again, uncompressed"
        ) from None


def read_header(pydicom: ModuleType, stream: IO[bytes], name: str) -> Any:
    """A file's elements before its pixels.

    Raises:
        UsageError: it is no DICOM file, or its header is damaged.
    """
    try:
        return pydicom.dcmread(stream, stop_before_pixels=True)
    except Exception:  # InvalidDicomError, or anything from a damaged header
        marked = stream.seek(128) and stream.read(4) == b"DICM"
        reason = "its header is damaged" if marked else "it has no DICM mark"
        raise UsageError(f"{name} is no DICOM file: {reason}", "Export it again, as a DICOM file") from None


def _check_modality(header: Any, name: str) -> None:
    modality = str(header.get("Modality", ""))
    if modality not in MODALITIES:
        # In a damaged file another element's text, a patient's name, can stand here: only a code is shown.
        code = modality if re.fullmatch("[A-Z]{1,16}", modality) else "missing"
        known = ", ".join(f"{key} ({text})" for key, text in MODALITIES.items())
        raise UsageError(f"{name}: its modality is {code}", f"MedSigLIP's pipeline reads {known}")


def check_frame(header: Any, name: str, frame: int) -> None:
    """Refuse what has no such frame, or one too large, before its pixels are decoded.

    Raises:
        UsageError: no pixels, too many, or no frame of that number.
    """
    if "Rows" not in header or "Columns" not in header:
        raise UsageError(f"{name} holds no pixels", "Give an image; reports and plans have none")
    check_size(int(header.Columns), int(header.Rows), name)
    frames = int(header.get("NumberOfFrames") or 1)
    if not 0 <= frame < frames:
        raise UsageError(f"{name} has no frame {frame}", f"It has {frames}, counted from 0")


def check_codec(header: Any, name: str) -> None:
    """Refuse what cannot be decoded here.

    Raises:
        UsageError: pydicom has no decoder for it.
        MissingExtraError: it has one, whose library is not installed.
    """
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        raise UsageError(f"{name} names no transfer syntax", "Export it again")
    try:
        decoder = require("pydicom.pixels", "dicom").get_decoder(syntax)
    except NotImplementedError:
        codec = syntax.keyword or "unknown"
        raise UsageError(f"{name}: pydicom cannot decode its codec ({codec})", "Export it uncompressed") from None
    if not decoder.is_available:
        raise MissingExtraError(
            f"{name} is compressed as {syntax.name}, whose codec is not installed",
            "Run: pip install python-gdcm",
        )


def _colour(pixels: NDArray[Any], header: Any, name: str) -> Picture:
    """RGB of 8 or 16 full bits; pydicom has turned YBR into RGB already."""
    if pixels.dtype not in (np.uint8, np.uint16) or int(header.BitsStored) != pixels.dtype.itemsize * 8:
        raise UsageError(f"{name} has colours of {int(header.BitsStored)} bits", "Export it with 8 or 16")
    return Picture(pixels)


def _grey(stored: NDArray[Any], header: Any, name: str) -> Picture:
    pixels = require("pydicom.pixels", "dicom")
    if header.PhotometricInterpretation == "PALETTE COLOR":
        return Picture(pixels.apply_color_lut(stored, header)[:, :, :3])
    values = pixels.apply_modality_lut(stored, header)
    if not np.isfinite(values).all():
        raise UsageError(f"{name}: its rescale gives values that are no numbers", "Export it again")
    shown = _shown(values, stored, header)
    if header.PhotometricInterpretation == "MONOCHROME1":
        shown = np.iinfo(shown.dtype).max - shown
    return grey_picture(shown)


def _shown(values: NDArray[Any], stored: NDArray[Any], header: Any) -> NDArray[Any]:
    """Values after the modality LUT -> what a viewer shows, uint16 (or the stored uint8 as it is)."""
    if (window := _window(header)) is not None:
        return _windowed(values, *window, sigmoid=header.get("VOILUTFunction") == "SIGMOID")
    if "VOILUTSequence" in header:
        apply_voi = require("pydicom.pixels", "dicom").apply_voi
        bits = int(header.VOILUTSequence[0].LUTDescriptor[2])
        return _scaled(apply_voi(np.rint(values).astype(np.int32), header), 0, 2**bits - 1).astype(np.uint16)
    if header.Modality == "CT":
        return _windowed(values, *CT_WINDOW)
    if stored.dtype == np.uint8 and np.array_equal(values, stored):
        return stored
    return _scaled(values, float(values.min()), float(values.max())).astype(np.uint16)


def _window(header: Any) -> tuple[float, float] | None:
    """The first window's center and width."""
    center, width = header.get("WindowCenter"), header.get("WindowWidth")
    if center in (None, "") or width in (None, ""):
        return None
    return float(np.atleast_1d(center)[0]), float(np.atleast_1d(width)[0])


def _windowed(values: NDArray[Any], center: float, width: float, *, sigmoid: bool = False) -> NDArray[np.uint16]:
    if sigmoid:  # DICOM PS3.3 C.11.2.1.3.1
        shown = _WHITE / (1 + np.exp(-4 * (values - center) / max(width, 1)))
    else:
        half = max(width // 2, 0.5)
        shown = _scaled(values, center - half, center + half)
    return np.asarray(np.rint(shown), dtype=np.uint16)


def _scaled(values: NDArray[Any], low: float, high: float) -> NDArray[Any]:
    """`low` to 0 and `high` to 65535, clipped; black where there is no contrast at all."""
    if high <= low:
        return np.zeros(values.shape)
    return np.asarray(np.interp(values, (low, high), (0, _WHITE)))
