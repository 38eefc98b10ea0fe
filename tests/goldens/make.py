"""Regenerate preprocess.json and tokenizer.json from the reference implementations; see README.md.

Nothing of medge is imported: a golden that the tested code made proves nothing. Run it where these are
installed (they are not among medge's dependencies):

    pip install tensorflow-cpu==2.21.0 transformers==4.57.6 sentencepiece protobuf pillow numpy
    python tests/goldens/make.py
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1"}

import numpy as np
import PIL
import PIL.Image
import tensorflow as tf  # type: ignore[import-untyped]
import transformers

HERE = Path(__file__).parent
TOKENIZER = HERE.parents[1] / "src/medge/models/siglip_tokenizer"
SIZES = (8, 14, 16)
LARGE = 448


def inputs() -> dict[str, np.ndarray]:
    """Small pictures: up- and downscaling in one, both shapes, both depths, and the awkward ones."""
    rng = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, shape, dtype=np.uint8)

    y, x = np.mgrid[0:48, 0:64]
    smooth = np.stack([x * 4, y * 5, (x + y) * 2], axis=2).astype(np.uint8)
    deep = rng.integers(0, 65536, (10, 9), dtype=np.uint16)
    deep[0, :5] = [0, 255, 256, 65534, 65535]
    return {
        "pixel": noise(1, 1, 3),
        "noise": noise(5, 7, 3),
        "smooth": smooth,
        "tall": noise(80, 33, 3),
        "column": noise(19, 1, 3),
        "square": noise(16, 16, 3),
        "white": np.full((4, 9, 3), 255, np.uint8),
        "mask": np.repeat(rng.integers(0, 2, (12, 10, 1), dtype=np.uint8) * 255, 3, axis=2),
        "deep_grey": deep,
        "deep_rgb": rng.integers(0, 65536, (6, 11, 3), dtype=np.uint16),
    }


def bigvision(image: np.ndarray, size: int) -> np.ndarray:
    """big_vision's decode and resize ops; 16 bits go through TensorFlow's own PNG decoder."""
    if image.dtype == np.uint16:
        image = tf.io.decode_image(tf.io.encode_png(image), channels=3).numpy()
    resized = tf.image.resize(image, [size, size], method="bilinear", antialias=False)
    return np.asarray(tf.cast(tf.clip_by_value(resized, 0, 255), tf.uint8))


def hf(image: np.ndarray, size: int) -> np.ndarray:
    """transformers' resize; its rescale and normalize are in `levels`."""
    return processed(high_byte(image), size={"height": size, "width": size}, do_rescale=False, do_normalize=False)


def finetune(image: np.ndarray, size: int) -> np.ndarray:
    """What torchvision's Resize does with a Pillow image: it calls Pillow."""
    resized = PIL.Image.fromarray(high_byte(image)).resize((size, size), PIL.Image.Resampling.BILINEAR)
    return np.asarray(resized)


def serving(image: np.ndarray, size: int) -> np.ndarray:
    """The steps of medsiglip's predictor.py, with the real processor; back to levels for the file."""
    scaled = image.astype(np.float32) / float(np.iinfo(image.dtype).max)
    height, width = scaled.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    padded = np.pad(scaled, ((top, side - height - top), (left, side - width - left), (0, 0)))
    output = processed(padded, size={"height": size, "width": size}, do_rescale=False)
    pixels = np.rint((output + 1) * 127.5).astype(np.uint8)
    if not np.array_equal(levels()[pixels], output):
        raise AssertionError("the container's output is not on the 256 levels")
    return pixels


def high_byte(image: np.ndarray) -> np.ndarray:
    """medge's rule for the variants whose reference refuses 16 bits; TensorFlow's decoder does the same."""
    return image if image.dtype == np.uint8 else (image >> 8).astype(np.uint8)


def levels() -> np.ndarray:
    """What each 8-bit level becomes: transformers' rescale and normalize, run on all 256."""
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    return processed(ramp, do_resize=False)[0, :, 0]


def processed(image: np.ndarray, **options: Any) -> np.ndarray:
    """One (H, W, 3) image through transformers' processor, in the same layout."""
    layout = {"input_data_format": "channels_last", "data_format": "channels_last"}
    return np.asarray(transformers.SiglipImageProcessor(**options)([image], **layout)["pixel_values"][0])


def base64_of(array: np.ndarray) -> str:
    """Raw bytes, C order, little endian."""
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def cases() -> Iterator[dict[str, Any]]:
    """Every input, variant and size. The large ones keep only their hash."""
    table = levels()
    for name, image in inputs().items():
        rgb = image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)
        for resize in (bigvision, hf, finetune, serving):
            for size in (*SIZES, LARGE):
                pixels = resize(rgb, size)
                tensor = np.ascontiguousarray(table[pixels].transpose(2, 0, 1)).astype("<f4")
                case = {"input": name, "variant": resize.__name__, "size": size}
                if size != LARGE:
                    case["pixels"] = base64_of(pixels)
                yield case | {"sha256": hashlib.sha256(tensor.tobytes()).hexdigest()}


def texts() -> list[str]:
    """Medical and hostile ones."""
    loaded: list[str] = json.loads((HERE / "texts.json").read_text(encoding="utf-8"))
    return loaded


def tokenizer_cases() -> Iterator[dict[str, Any]]:
    """Ids up to the first padding; the reader pads to 64 with 1."""
    tokenizer = transformers.SiglipTokenizer.from_pretrained(TOKENIZER)
    for text in texts():
        yield {"text": text, "ids": tokenizer(text, truncation=True, max_length=64)["input_ids"]}


def write(name: str, head: dict[str, Any], lists: dict[str, list[Any]]) -> None:
    """JSON, one item of a list a line, ASCII."""
    parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    for key, items in lists.items():
        parts.append(f"{json.dumps(key)}: [\n" + ",\n".join(map(json.dumps, items)) + "\n]")
    (HERE / name).write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="ascii")


def main() -> None:
    """Write both files."""
    made_with = {
        "tensorflow": tf.__version__,
        "transformers": transformers.__version__,
        "pillow": PIL.__version__,
        "numpy": np.__version__,
    }
    pictures = [
        {"name": name, "shape": image.shape, "dtype": str(image.dtype), "data": base64_of(image)}
        for name, image in inputs().items()
    ]
    numbers = [float(level) for level in levels()]
    write("preprocess.json", {"made_with": made_with, "levels": numbers}, {"inputs": pictures, "cases": list(cases())})
    write(
        "tokenizer.json",
        {"made_with": made_with, "length": 64, "pad_id": 1, "eos_id": 1},
        {"cases": list(tokenizer_cases())},
    )


if __name__ == "__main__":
    main()
