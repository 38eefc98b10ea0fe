"""The four preprocessings against TensorFlow's, transformers' and Pillow's own results (tests/goldens)."""

from __future__ import annotations

import base64
import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medge.errors import UsageError
from medge.runtimes.images import Picture, load_image
from medge.runtimes.preprocess import preprocess, resize
from medge.spec import ImageSpec

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens/preprocess.json").read_bytes())
VARIANTS = ("bigvision", "hf", "finetune", "serving")


def spec(variant: str, size: int, **more: Any) -> ImageSpec:
    return ImageSpec.model_validate({"variant": variant, "size": size, **more})


def golden_input(name: str) -> np.ndarray:
    entry = next(entry for entry in GOLDENS["inputs"] if entry["name"] == name)
    dtype = np.dtype(entry["dtype"]).newbyteorder("<")
    data = np.frombuffer(base64.b64decode(entry["data"]), dtype).reshape(entry["shape"])
    return data.astype(entry["dtype"])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", [entry["name"] for entry in GOLDENS["inputs"]])
def test_goldens(name: str, variant: str) -> None:
    picture = load_image(golden_input(name))
    wanted = [case for case in GOLDENS["cases"] if (case["input"], case["variant"]) == (name, variant)]
    assert {case["size"] for case in wanted} == {8, 14, 16, 448}
    for case in wanted:
        size = case["size"]
        if "pixels" in case:
            expected = np.frombuffer(base64.b64decode(case["pixels"]), np.uint8).reshape(size, size, 3)
            np.testing.assert_array_equal(resize(picture, spec(variant, size)), expected)
        tensor = preprocess(picture, spec(variant, size))
        assert tensor.shape == (3, size, size)
        assert tensor.dtype == np.float32
        assert tensor.flags.c_contiguous
        assert hashlib.sha256(tensor.astype("<f4").tobytes()).hexdigest() == case["sha256"]


def test_the_levels_are_those_of_the_goldens() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    tensor = preprocess(load_image(ramp), spec("bigvision", 16))
    assert tensor[1].ravel().tolist() == GOLDENS["levels"]


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    shapes = [(4, 4), (5, 90), (77, 6), (33, 40), (56, 56), (120, 64)]
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


@pytest.mark.parametrize("size", [7, 56, 100])
def test_hf_equals_the_transformers_processor_bit_for_bit(size: int) -> None:
    transformers = pytest.importorskip("transformers")
    processor = transformers.SiglipImageProcessor(size={"height": size, "width": size})
    for image in pictures():
        expected = processor(image, input_data_format="channels_last")["pixel_values"][0]
        np.testing.assert_array_equal(preprocess(Picture(image), spec("hf", size)), expected)


def container(image: np.ndarray, size: int) -> np.ndarray:
    """Google's serving container, with the real processor: python/serving/predictor.py."""
    transformers = pytest.importorskip("transformers")
    scaled = image.astype(np.float32) / float(np.iinfo(image.dtype).max)
    height, width = scaled.shape[:2]
    rows, columns = max(0, width - height), max(0, height - width)
    padding = ((rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2), (0, 0))
    processor = transformers.SiglipImageProcessor(do_rescale=False, size={"height": size, "width": size})
    output = processor.preprocess([np.pad(scaled, padding)], input_data_format="channels_last")
    return np.asarray(output["pixel_values"][0])


def test_serving_equals_the_container_at_both_depths() -> None:
    rng = np.random.default_rng(6)
    every_level = np.resize(np.arange(65536, dtype=np.uint16), (250, 270, 3))
    black_and_white = rng.integers(0, 2, (30, 41, 3), dtype=np.uint8) * np.uint8(255)
    for image in (*pictures(), every_level, black_and_white, np.full((5, 8, 3), 65535, np.uint16)):
        expected = container(image, 56)
        np.testing.assert_array_equal(preprocess(Picture(image), spec("serving", 56)), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_16_bits_of_repeated_bytes_equal_8_bits(variant: str) -> None:
    for image in pictures():
        deep = Picture(image.astype(np.uint16) * 257)
        np.testing.assert_array_equal(
            preprocess(deep, spec(variant, 20)), preprocess(Picture(image), spec(variant, 20))
        )


def test_bigvision_of_the_same_size_is_the_image() -> None:
    image = pictures()[4]
    np.testing.assert_array_equal(resize(Picture(image), spec("bigvision", 56)), image)


def test_mean_and_std_act_on_their_channel() -> None:
    image = np.full((3, 3, 3), (0, 51, 255), np.uint8)
    tensor = preprocess(Picture(image), spec("hf", 2, mean=(0.0, 0.2, 0.5), std=(1.0, 0.1, 0.25)))
    np.testing.assert_allclose(tensor[:, 0, 0], [0, 0, 2], atol=1e-6)


@pytest.mark.parametrize(("variant", "limit"), [("bigvision", 40), ("hf", 150), ("serving", 400)])
def test_forty_megapixel_stay_within_memory(variant: str, limit: int) -> None:
    picture = load_image(np.broadcast_to(np.uint8(9), (5000, 8000, 3)))
    tracemalloc.start()
    try:
        preprocess(picture, spec(variant, 448))
        assert tracemalloc.get_traced_memory()[1] < limit * 2**20
    finally:
        tracemalloc.stop()


def test_serving_refuses_what_no_memory_could_pad() -> None:
    strip = Picture(np.broadcast_to(np.uint8(0), (2, 40_000, 3)))
    with pytest.raises(UsageError, match="too long to be padded"):
        preprocess(strip, spec("serving", 8))
    assert preprocess(strip, spec("bigvision", 8)).shape == (3, 8, 8)
