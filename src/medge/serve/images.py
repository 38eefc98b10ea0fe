"""Images out of data URLs, checked by their headers before anything is decoded."""

from __future__ import annotations

import base64
import binascii

from medge.errors import MedgeError
from medge.runtimes.images import image_size
from medge.serve.errors import ApiError, invalid, known
from medge.serve.limits import Limits

SCHEME = "data:"


def image_bytes(url: str, limits: Limits, param: str) -> bytes:
    """The file that a data URL holds.

    Raises:
        ApiError: another URL (nothing is fetched here), no base64, no image, or one beyond the limits.
    """
    head, comma, body = url.partition(",")
    if not head[: len(SCHEME)].lower() == SCHEME or not comma:
        raise invalid("An image must be a data URL, like data:image/png;base64,…: nothing is fetched", param)
    if not head.lower().endswith(";base64"):
        raise invalid("A data URL must be in base64: data:image/png;base64,…", param)
    if len(body) * 3 // 4 > limits.image_bytes:
        raise invalid(f"An image has more than {limits.image_bytes:,} bytes", param, "image_too_large")
    try:
        data = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters beyond ASCII
        raise invalid("A data URL holds no base64", param) from None
    _check(data, limits, param)
    return data


def _check(data: bytes, limits: Limits, param: str) -> None:
    try:
        width, height = image_size(data)
    except MedgeError as error:
        refused = known(error)
        raise ApiError(refused.status, refused.message, "invalid_image", param=param) from None
    if width * height > limits.image_pixels:
        raise invalid(
            f"An image has {width} x {height} pixels; {limits.image_pixels:,} are allowed", param, "image_too_large"
        )
