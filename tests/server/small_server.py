"""Small pictures, and their form in requests."""

import base64
import io

import numpy as np
from PIL import Image

COUNT = 40


def picture(seed, size=(24, 36)):
    """Stripes and noise, so that vectors differ."""
    draw = np.random.default_rng(seed)
    pixels = (
        draw.integers(0, 255, (*size, 3)) // 2 + 120 * (np.indices(size)[seed % 2] // (1 + seed % 7) % 2)[..., None]
    )
    return Image.fromarray(pixels.astype(np.uint8))


def coded(image, form="PNG"):
    """An image file in base64."""
    out = io.BytesIO()
    image.save(out, form)
    return base64.b64encode(out.getvalue()).decode()
