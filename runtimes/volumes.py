"""CT volumes as MedGemma 1.5 reads them: slices in three windows of Hounsfield units, as red, green and blue.

Source: Google-Health/medgemma, notebooks/high_dimensional_ct_hugging_face.ipynb. Slices stand in the order of their
instance numbers, at most 85 of them, spread evenly; each is followed by "SLICE n"; the question comes last. There the
slices are compressed as JPEG on their way; here nothing is lost.

A slice takes an image's 256 tokens and its marks. 85 of them need a context of about 23,000 tokens, which a phone
does not have: `slice_budget` says how many a context allows, and `CtSlices.note` how many were taken of how many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medge.errors import MedgeError, UsageError, require
from medge.runtimes.dicom import check_codec, check_frame, read_header, unlogged
from medge.runtimes.generate import Generator, Message
from medge.runtimes.images import ImageLike, Picture

WINDOWS = ((-1024, 1024), (-135, 215), (0, 80))
"""Lowest and highest HU of red, green and blue: air to bone, soft tissue, brain."""
MAX_SLICES = 85
INSTRUCTION = "Review the slices of this CT volume, which are given in order, and answer the question that follows."
"""Before the slices. The notebook's own names the organ that it asks about."""


@dataclass(frozen=True, eq=False)
class CtSlices:
    """The slices that go into a prompt."""

    pictures: tuple[Picture, ...]
    total: int
    """Slices of the volume."""

    @property
    def note(self) -> str:
        """What was left out; empty where nothing was."""
        taken = len(self.pictures)
        return "" if taken == self.total else f"{taken} of the volume's {self.total} slices are shown, evenly spread"


def slice_budget(generator: Generator, question: str, max_tokens: int) -> int:
    """Slices that fit beside the question and an answer of `max_tokens`, at most MAX_SLICES.

    Raises:
        UsageError: not one fits.
    """
    around = [f"\n\n<start_of_image><end_of_image>\n\n{label(MAX_SLICES)}", INSTRUCTION, question]
    marks, *texts = (len(generator.tokenize(text)) for text in around)
    fixed = sum(texts) + _TURN_TOKENS + max_tokens
    count = min(MAX_SLICES, (generator.context - fixed) // (generator.image_tokens + marks))
    if count < 1:
        raise UsageError(
            f"A context of {generator.context:,} tokens holds no CT slice beside {fixed:,} tokens of text and answer",
            "Open the artifact with a larger context, or ask for a shorter answer",
        )
    return count


_TURN_TOKENS = 32
"""Room for the marks of the turns."""


def label(number: int) -> str:
    """What follows a slice, counted from 1."""
    return f"SLICE {number}"


def ct_message(slices: CtSlices, question: str) -> Message:
    """The user's turn about a volume."""
    content: list[str | ImageLike] = [INSTRUCTION]
    for number, picture in enumerate(slices.pictures, 1):
        content += [picture, label(number)]
    return Message("user", (*content, question))


def ct_slices(source: Path | Sequence[Path] | NDArray[Any], limit: int = MAX_SLICES) -> CtSlices:
    """At most `limit` slices of a volume.

    `source` is a folder or the files of one DICOM series, a multi-frame file, or an array (N, H, W) of HU. Only the
    slices that are taken are decoded.

    Raises:
        UsageError: no CT there, more than one series, or a slice that cannot be read as Hounsfield units.
        MissingExtraError: pydicom, or the codec of these pixels, is not installed.
    """
    if isinstance(source, np.ndarray):
        if source.ndim != 3:
            raise UsageError(f"A CT volume has shape {source.shape}", "Give (slices, height, width)")
        taken = _spread(len(source), limit)
        return CtSlices(tuple(windowed(source[i]) for i in taken), len(source))
    pydicom = require("pydicom", "dicom")
    with unlogged():
        places = _ordered(pydicom, [source] if isinstance(source, Path) else source)
        taken = _spread(len(places), limit)
        return CtSlices(tuple(windowed(_hounsfield(pydicom, *places[i])) for i in taken), len(places))


def windowed(hounsfield: NDArray[Any]) -> Picture:
    """(H, W) HU -> RGB, in the notebook's arithmetic.

    Raises:
        UsageError: a value that is no number.
    """
    if not np.isfinite(hounsfield).all():
        raise UsageError("A CT slice has values that are no numbers", "Export it again")
    planes = []
    for low, high in WINDOWS:
        plane = np.clip(hounsfield, low, high).astype(np.float32)
        plane -= low
        plane /= high - low
        plane *= 255.0
        planes.append(np.round(plane).astype(np.uint8))
    return Picture(np.stack(planes, axis=-1))


def _spread(count: int, limit: int) -> list[int]:
    """The notebook's choice: it leaves the first slice out where it must choose."""
    if count <= limit:
        return list(range(count))
    return [round(i / limit * (count - 1)) for i in range(1, limit + 1)]


def _ordered(pydicom: Any, sources: Sequence[Path]) -> list[tuple[Path, int]]:
    """File and frame of every slice, in the order of the instance numbers."""
    headers = [(path, _ct_header(pydicom, path)) for source in sources for path in _files(source)]
    if not headers:
        raise UsageError("No DICOM file is there", "Name the folder of one CT series")
    series = {str(header.get("SeriesInstanceUID", "")) for _, header in headers}
    if len(series) > 1:
        raise UsageError(f"The files are of {len(series)} series", "Give those of one")
    if len(headers) > 1 and any(header.get("InstanceNumber") is None for _, header in headers):
        raise UsageError("A slice has no instance number, so its place is unknown", "Export the series again")
    headers.sort(key=lambda item: int(item[1].get("InstanceNumber") or 0))
    return [(path, frame) for path, header in headers for frame in range(int(header.get("NumberOfFrames") or 1))]


def _files(source: Path) -> Iterator[Path]:
    """The file itself, or a folder's DICOM files; a directory of the medium is none."""
    if not source.is_dir():
        yield source
        return
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name != "DICOMDIR" and _is_dicom(path):
            yield path


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _ct_header(pydicom: Any, path: Path) -> Any:
    try:
        with path.open("rb") as stream:
            header = read_header(pydicom, stream, str(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "Check the path") from None
    if header.get("Modality") != "CT":
        raise UsageError(f"{path} is no CT slice", "Give the files of one CT series")
    if "RescaleSlope" not in header or "RescaleIntercept" not in header:
        raise UsageError(f"{path} does not say how its values become Hounsfield units", "Export the series again")
    return header


def _hounsfield(pydicom: Any, path: Path, frame: int) -> NDArray[Any]:
    pixels: Any = require("pydicom.pixels", "dicom")
    try:
        with path.open("rb") as stream:
            header = read_header(pydicom, stream, str(path))
            check_frame(header, str(path), frame)
            check_codec(header, str(path))
            values: NDArray[Any] = pixels.apply_rescale(pixels.pixel_array(stream, index=frame), header)
    except MedgeError:
        raise
    except Exception:  # a decoder given hostile bytes raises anything, and its text may quote a patient
        raise UsageError(f"{path}: its pixels are missing, cut short or not decodable", "Export it again") from None
    if values.ndim != 2:
        raise UsageError(f"{path} is no grey slice", "Give the files of one CT series")
    return values
