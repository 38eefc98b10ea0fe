"""Real medical images out of permissively licensed Python packages, cut into train and held-out crops.

sources.toml says which pixels are trained on and which are held out: other sources where a class has several,
else other slices of the volume or another region of the image, with a margin. Regions of one image share
patient, scanner and stain, so a held-out score measures the fixture, not medicine.
"""

from __future__ import annotations

import gzip
import hashlib
import tomllib
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medge.benchmarks.packages import Package, pip_install
from medge.errors import CorruptError, require
from medge.spec import Frozen

Pixels = NDArray[np.uint8]
CROP = 128
"""Side of a crop in pixels: twice the model's input, so that the runtime's resize has work to do."""


class Region(Frozen):
    """Which pixels of a source. sources.toml explains the fields."""

    box: tuple[float, float, float, float] = (0, 0, 1, 1)
    frames: tuple[int, int, int] | None = None
    scale: tuple[float, float] = (0.7, 1.0)


class Source(Frozen):
    """One image, cine or volume inside a package."""

    label: str
    package: str
    path: str
    sha256: str
    train: Region | None = None
    held_out: Region | None = None
    axis: int = 2
    """The axis of a volume that its slices are perpendicular to."""
    windows: tuple[tuple[float, float], ...] = ()
    """CT: display windows (low, high) in Hounsfield units, a frame each. Empty: percentiles 0.5 and 99.5."""

    @property
    def stem(self) -> str:
        """The file's name without suffixes."""
        return Path(self.path).name.split(".")[0]


_TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
PACKAGES = {row["name"]: Package.model_validate(row) for row in _TABLE["package"]}
SOURCES = tuple(Source.model_validate(row) for row in _TABLE["source"])
CAPTIONS: dict[str, tuple[str, ...]] = {label: (label, *more) for label, more in _TABLE["captions"].items()}
"""Label -> what the class is called, the label first."""


def fetch(folder: Path) -> None:
    """Install the packages into `folder`: see `pip_install`."""
    pip_install(PACKAGES.values(), folder)


def _verified(folder: Path, source: Source) -> Path:
    path = folder / source.path
    if not path.is_file():
        raise CorruptError(f"{source.package} holds no {source.path}", f"Pinned: {PACKAGES[source.package].version}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != source.sha256:
        raise CorruptError(f"{path.name} is not the file that the demo was trained on (sha256 differs)")
    return path


def _to_uint8(x: NDArray[Any], window: tuple[float, float] | None = None) -> Pixels:
    low, high = window or np.percentile(x, [0.5, 99.5])
    scaled: Pixels = np.rint(((x - low) / max(high - low, 1e-9)).clip(0, 1) * 255).astype(np.uint8)
    return scaled


def _read_dicom(path: Path, windows: tuple[tuple[float, float], ...]) -> list[Pixels]:
    require("pydicom", "dicom")
    import pydicom
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    data = pydicom.dcmread(path)
    x = pixel_array(data, decoding_plugin="pillow" if data.file_meta.TransferSyntaxUID.is_compressed else "")
    if data.PhotometricInterpretation == "PALETTE COLOR":
        x = (apply_color_lut(x, data) >> 8).astype(np.uint8)
    if x.dtype == np.uint8:
        return list(x if x.ndim == 4 else x[None])
    if data.PhotometricInterpretation == "MONOCHROME1":
        x = x.max() - x
    hounsfield = apply_modality_lut(x, data)
    return [_to_uint8(hounsfield, window) for window in windows] or [_to_uint8(x)]


def _read_nifti(path: Path, axis: int) -> list[Pixels]:
    """Slices of a NIfTI-1 volume, upright. Only what the pinned files need: uint8, int16, uint16, no scaling.

    Source: nifti1.h: dim at byte 40, datatype at 70, vox_offset at 108; the first axis runs fastest.
    """
    raw = gzip.decompress(path.read_bytes())
    order = "<" if int.from_bytes(raw[:4], "little") == 348 else ">"
    dims = np.frombuffer(raw, f"{order}i2", 8, 40)[1:4].astype(int)
    kind = {2: "u1", 4: "i2", 512: "u2"}[int(np.frombuffer(raw, f"{order}i2", 1, 70)[0])]
    offset = int(np.frombuffer(raw, f"{order}f4", 1, 108)[0])
    volume = np.frombuffer(raw, order + kind, int(dims.prod()), offset).reshape(dims, order="F")
    return [np.rot90(plane) for plane in np.moveaxis(_to_uint8(volume.astype(np.float32)), axis, 0)]


def _read_image(path: Path) -> list[Pixels]:
    with Image.open(path) as image:
        frames = getattr(image, "n_frames", 1) if path.suffix == ".tif" else 1  # an .svs: the slide, no label
        planes = []
        for i in range(frames):
            image.seek(i)
            grey = image.mode.startswith("I")
            planes.append(_to_uint8(np.asarray(image, np.float32)) if grey else np.asarray(image.convert("RGB")))
    return planes


def read(folder: Path, source: Source) -> list[Pixels]:
    """The frames of a source as uint8: (H, W) grey or (H, W, 3) RGB.

    Raises:
        CorruptError: the file is absent or is not the pinned one.
    """
    path = _verified(folder, source)
    if path.suffix == ".dcm":
        return _read_dicom(path, source.windows)
    if path.suffix == ".gz":
        return _read_nifti(path, source.axis)
    if path.suffix == ".npy":
        return [_to_uint8(np.load(path, allow_pickle=False))]
    return _read_image(path)


def _crop(frame: Pixels, region: Region, rng: np.random.Generator) -> Image.Image:
    """One random square of the region, at CROP pixels; empty ones (glass, background) are drawn again."""
    height, width = frame.shape[:2]
    left, top, right, bottom = np.rint(np.array(region.box) * (width, height, width, height)).astype(int)
    for _ in range(50):
        side = int(min(right - left, bottom - top) * rng.uniform(*region.scale))
        x, y = rng.integers(left, right - side + 1), rng.integers(top, bottom - side + 1)
        square = frame[y : y + side, x : x + side]
        if square.std() > 12:
            break
    return Image.fromarray(square).convert("RGB").resize((CROP, CROP), Image.Resampling.LANCZOS, reducing_gap=3)


def crops(folder: Path, label: str, part: str, count: int, seed: int) -> Iterator[tuple[str, Image.Image]]:
    """`count` crops of a label as (source file's stem, RGB image of CROP x CROP), the sources in turn.

    `part` is "train" or "held_out". The same seed gives the same crops.
    """
    rng = np.random.default_rng([seed, list(CAPTIONS).index(label), part == "train"])
    pool = []
    for source in SOURCES:
        region: Region | None = getattr(source, part)
        if source.label == label and region:
            frames = read(folder, source)
            chosen = [frames[i] for i in range(*region.frames)] if region.frames else frames
            pool.append((source.stem, region, chosen))
    for stem, region, frames in islice(cycle(pool), count):
        yield stem, _crop(frames[rng.integers(len(frames))], region, rng)
