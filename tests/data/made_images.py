"""Images whose pixels are known, encoded in whatever way a test needs."""

import io
import struct

import numpy as np
from PIL import Image

# top left, top right, bottom left, bottom right
CORNERS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))


def corners(width=12, height=8):
    """An RGB array of four coloured quarters: every turn and mirroring of it is another picture."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for place, color in enumerate(CORNERS):
        top, left = divmod(place, 2)
        pixels[top * height // 2 :, left * width // 2 :] = color
    return pixels


def photo(width, height, seed=0):
    """An RGB array with edges, gradients and some noise, as photographs have."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin(2 * np.pi * (rng.uniform(1, 9) * x + rng.uniform(1, 9) * y) + rng.uniform(0, 6)) for _ in range(3)]
    pixels = 127 + 80 * np.stack(waves, -1) + rng.normal(0, 6, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = rng.uniform(0, 255, 3)
    return pixels.clip(0, 255).astype(np.uint8)


def encoded(image, kind="PNG", **options):
    """Bytes of a PIL image or array."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def stored(pixels, orientation):
    """How upright pixels lie in a file whose EXIF orientation turns them upright again (EXIF 2.3, 4.6.4.A)."""
    # orientation -> where row 0 and column 0 of the file are seen
    turns = {
        1: lambda p: p,  # top, left
        2: lambda p: p[:, ::-1],  # top, right
        3: lambda p: p[::-1, ::-1],  # bottom, right
        4: lambda p: p[::-1],  # bottom, left
        5: lambda p: p.transpose(1, 0, 2),  # left, top
        6: lambda p: np.rot90(p, 1),  # right, top
        7: lambda p: np.rot90(p, 2).transpose(1, 0, 2),  # right, bottom
        8: lambda p: np.rot90(p, -1),  # left, bottom
    }
    return np.ascontiguousarray(turns[orientation](pixels))


def tiff(width, height, tags=(), data=b"\0"):
    """A little-endian grey TIFF with chosen tags (number, type, value), which may lie."""
    entries = {256: (3, width), 257: (3, height), 258: (3, 8), 259: (3, 1), 262: (3, 1), 277: (3, 1)}
    entries[279] = (4, len(data))
    entries |= {number: (kind, value) for number, kind, value in tags}
    start = 8 + 2 + 12 * (len(entries) + 1) + 4
    entries[324 if 322 in entries else 273] = (4, start)
    body = b"".join(
        struct.pack("<HHI", number, kind, 1) + (struct.pack("<HH", value, 0) if kind == 3 else struct.pack("<I", value))
        for number, (kind, value) in sorted(entries.items())
    )
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", 0) + data
