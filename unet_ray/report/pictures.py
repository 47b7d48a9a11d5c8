"""Encodes small pictures for the page: JPEG as data URIs."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

SIDE = 360
"""Longer side of the pictures, in pixels."""
QUALITY = 82


def data_uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def picture_uri(picture: np.ndarray) -> str:
    """Returns a picture, uint8 [H,W,3], as a data URI."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=QUALITY)
    return data_uri(stream.getvalue())
