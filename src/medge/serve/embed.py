"""Embeddings, zero-shot scores, and images as a browser shows them."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image

from medge.runtimes import Embedder
from medge.runtimes.embed import check_labels
from medge.runtimes.images import Picture, load_image
from medge.serve.errors import invalid
from medge.serve.images import SCHEME, image_bytes
from medge.serve.limits import Limits
from medge.serve.requests import ClassifyRequest, EmbeddingRequest
from medge.spec import FloatArray

_PREVIEW = 1024
"""Longest side of a preview, in pixels."""


def embedding_inputs(request: EmbeddingRequest, limits: Limits) -> list[str | bytes]:
    """Texts and images' files, in order.

    Raises:
        ApiError: too many, an empty text, or an image that is none.
    """
    count, images = len(request.input), sum(text.startswith(SCHEME) for text in request.input)
    if count > limits.inputs or images > limits.images:
        raise invalid(
            f"{count} inputs are given, {images} of them images; {limits.inputs} and {limits.images} are allowed",
            "input",
        )
    if not all(request.input):
        raise invalid("An input is empty", "input")
    return [
        image_bytes(text, limits, f"input.{i}") if text.startswith(SCHEME) else text
        for i, text in enumerate(request.input)
    ]


def embeddings(model: Embedder, inputs: Sequence[str | bytes]) -> tuple[FloatArray, int]:
    """(N, D) rows of length one, in order, and how many tokens the texts took."""
    images = [each for each in inputs if isinstance(each, bytes)]
    texts = [each for each in inputs if isinstance(each, str)]
    rows = {
        bytes: iter(model.embed_images(images)) if images else iter(()),
        str: iter(model.embed_texts(texts)) if texts else iter(()),
    }
    tokens = model.tokenizer(texts).size if texts else 0
    return np.stack([next(rows[type(each)]) for each in inputs]), tokens


def embeddings_document(request: EmbeddingRequest, rows: FloatArray, tokens: int) -> dict[str, Any]:
    """OpenAI's form.

    Raises:
        ApiError: other dimensions are asked for than the model has.
    """
    if request.dimensions not in (None, rows.shape[1]):
        raise invalid(f"The embeddings have {rows.shape[1]} dimensions, and cannot be shortened", "dimensions")
    data = [
        {"object": "embedding", "index": i, "embedding": _encoded(row) if request.encoding_format == "base64" else row}
        for i, row in enumerate(rows if request.encoding_format == "base64" else rows.tolist())
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": request.model, "usage": usage}


def _encoded(row: FloatArray) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode()


def check_classes(request: ClassifyRequest, limits: Limits) -> None:
    """Refuse labels and templates that make no classes.

    Raises:
        ApiError: too many labels.
        UsageError: an empty list, a label twice, a template without its place.
    """
    prompts = len(request.labels) * len(request.templates)
    if prompts > limits.inputs:
        raise invalid(f"Labels and templates make {prompts} prompts; {limits.inputs} are allowed", "labels")
    if not all(label.strip() for label in request.labels):
        raise invalid("A label is empty", "labels")
    check_labels(request.labels, request.templates)


def classification(model: Embedder, image: bytes, request: ClassifyRequest) -> dict[str, Any]:
    """Scores by label, and the seconds that image and texts took."""
    start = time.perf_counter()
    classes = model.class_embeddings(request.labels, request.templates)
    middle = time.perf_counter()
    (row,) = model.scores(model.embed_images([image]), classes, multilabel=request.multilabel)
    end = time.perf_counter()
    scores = [{"label": label, "score": float(score)} for label, score in zip(request.labels, row, strict=True)]
    return {
        "object": "classification",
        "model": request.model,
        "scores": scores,
        "timings": {"texts": middle - start, "image": end - middle},
    }


def preview(data: bytes) -> bytes:
    """An image of any kind that medge reads, as a PNG of 8 bits, no side longer than _PREVIEW pixels."""
    pixels = load_image(data).pixels
    step = max(1, max(pixels.shape[:2]) // (2 * _PREVIEW))  # most of a large image goes before it is copied
    shown = _eight_bits(Picture(pixels[::step, ::step]))
    shown.thumbnail((_PREVIEW, _PREVIEW))
    out = io.BytesIO()
    shown.save(out, "PNG")
    return out.getvalue()


def _eight_bits(picture: Picture) -> PIL.Image.Image:
    shift = 0 if picture.maximum == 255 else 8
    return PIL.Image.fromarray((picture.pixels >> shift).astype(np.uint8))
