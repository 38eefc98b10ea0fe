"""Picture to tensor: the four preprocessings that Google publishes for MedSigLIP, level by level.

Each squashes or pads the picture to (size, size) and ends in 8 bits; all then map to (x/255 - mean) / std.

bigvision   Bilinear without antialiasing, squashed, fractions cut off. The published accuracies hold for it.
            Sources: big_vision/pp/ops_image.py, `get_resize` (tf.image.resize, clip, tf.cast); medsiglip's
            quick-start notebook (tf.image.resize, `.astype(np.uint8)`).
hf          Pillow's bicubic, antialiased, squashed. Source: transformers' SiglipImageProcessor.
finetune    Pillow's bilinear, antialiased, squashed. Source: medsiglip's fine_tune_with_hugging_face.ipynb
            (torchvision's Resize of a Pillow image is Pillow's; another notebook zero-pads first).
serving     Zero-padded to a centred square, then as hf. Source: medsiglip's python/serving/predictor.py.

16 bits become 8 by their high byte (x >> 8), as TensorFlow's PNG decoder does it, except in `serving`, which
divides by 65535 and whose processor then cuts to 8 bits: x // 257.
"""

from __future__ import annotations

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from medge.errors import UsageError
from medge.runtimes.images import MAX_PIXELS, Picture
from medge.spec import FloatArray, ImageSpec

_BICUBIC, _BILINEAR = PIL.Image.Resampling.BICUBIC, PIL.Image.Resampling.BILINEAR


def preprocess(picture: Picture, spec: ImageSpec) -> FloatArray:
    """(3, size, size) float32, contiguous; in [-1, 1] for mean and std of 0.5.

    Raises:
        UsageError: `serving` would pad the picture to a square that is too large.
    """
    return normalized(resize(picture, spec), spec)


def normalized(small: NDArray[np.uint8], spec: ImageSpec) -> FloatArray:
    """(size, size, 3) 8-bit RGB to (3, size, size) float32."""
    levels = np.arange(256, dtype=np.float64) * (1 / 255)  # in double, then rounded, as transformers does
    mean, std = np.array([spec.mean, spec.std], dtype=np.float32)[:, :, None]
    table = (levels.astype(np.float32) - mean) / std
    return np.stack([table[channel][small[:, :, channel]] for channel in range(3)])


def resize(picture: Picture, spec: ImageSpec) -> NDArray[np.uint8]:
    """The 8-bit stage that every variant has: (size, size, 3).

    Raises:
        UsageError: `serving` would pad the picture to a square that is too large.
    """
    if spec.variant == "bigvision":
        return _resize_like_tensorflow(picture, spec.size)
    if spec.variant == "serving":
        return _resize_like_container(picture, spec.size)
    return _resize_like_pillow(_high_byte(picture.pixels), spec.size, _BICUBIC if spec.variant == "hf" else _BILINEAR)


def _high_byte(pixels: NDArray[np.uint8] | NDArray[np.uint16]) -> NDArray[np.uint8]:
    return (pixels if pixels.dtype == np.uint8 else pixels >> 8).astype(np.uint8, copy=False)


def _resize_like_pillow(pixels: NDArray[np.uint8], size: int, resample: PIL.Image.Resampling) -> NDArray[np.uint8]:
    return np.asarray(PIL.Image.fromarray(pixels).resize((size, size), resample))


def _resize_like_container(picture: Picture, size: int) -> NDArray[np.uint8]:
    """Google's serving container, of which one quirk is kept.

    It hands the processor floats in [0, 1], which takes an image of nothing but 0 and 1 for integer levels: a
    black-and-white picture is resized at levels 0 and 1, so that no grey arises at its edges.
    """
    levels = picture.pixels if picture.maximum == 255 else picture.pixels // 257
    square = _pad_to_square(levels.astype(np.uint8, copy=False))
    if all(((row == 0) | (row == picture.maximum)).all() for row in picture.pixels):  # a photo stops at row 1
        return _resize_like_pillow(square // 255, size, _BICUBIC) * np.uint8(255)
    return _resize_like_pillow(square, size, _BICUBIC)


def _pad_to_square(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    side = max(height, width)
    if side * side > 2 * MAX_PIXELS:
        raise UsageError(
            f"A picture of {width} x {height} is too long to be padded to a square",
            "Crop it, or export with another preprocessing variant than 'serving'",
        )
    top, left = (side - height) // 2, (side - width) // 2
    return np.pad(pixels, ((top, side - height - top), (left, side - width - left), (0, 0)))


def _resize_like_tensorflow(picture: Picture, size: int) -> NDArray[np.uint8]:
    """tf.image.resize(method="bilinear", antialias=False), then a cast that cuts the fraction off.

    The float32 operations of the CPU kernel in its order (resize_bilinear_op.cc, half-pixel centres), so
    equal to the last bit. Only the four neighbours of each output pixel are read, whatever the input's size.
    """
    height, width = picture.pixels.shape[:2]
    above, below, down = _neighbours(height, size)
    left, right, along = _neighbours(width, size)
    down, along = down[:, None, None], along[None, :, None]

    def at(rows: NDArray[np.intp], columns: NDArray[np.intp]) -> FloatArray:
        return _high_byte(picture.pixels[np.ix_(rows, columns)]).astype(np.float32)

    top = at(above, left)
    top += (at(above, right) - top) * along
    bottom = at(below, left)
    bottom += (at(below, right) - bottom) * along
    return (top + (bottom - top) * down).astype(np.uint8)


def _neighbours(length: int, size: int) -> tuple[NDArray[np.intp], NDArray[np.intp], FloatArray]:
    """For each of `size` outputs: the input below it, the input above it, and the way between them."""
    scale = np.float32(length) / np.float32(size)
    at = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    floor = np.floor(at)
    lower = np.maximum(floor, 0).astype(np.intp)
    upper = np.minimum(np.ceil(at), length - 1).astype(np.intp)
    return lower, upper, at - floor
