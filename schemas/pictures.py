"""What the pixels of a picture are, whatever its file says them in: one rule for training and prediction."""

import numpy as np
from PIL import Image

from schemas.masks import Array


def to_rgb(image: Image.Image) -> Array:
    """A picture of any colour mode -> uint8[H, W, 3]. Drops alpha, and the low byte of 16-bit grey.

    Raises `ValueError` for floats.
    """
    if image.mode.startswith("I"):  # which `convert` would cut off at 255
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("its pixels are floats, of which nothing tells the range: make them uint8")
    return np.array(image.convert("RGB"))
