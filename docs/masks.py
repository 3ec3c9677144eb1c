"""The picture of masks in the guide: photos that every user can install, what each method says of them.

    python docs/masks.py [OUT]          docs/masks.webp by default; photos come from the wheels of scikit-learn and
                                        scikit-image, of which the latter is fetched (`pip download`) if it is missing

Names are what a person sees in the photo, chosen before any mask was drawn, and not changed afterwards.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import clipworks
from clipworks.plot.sheet import INK, PAPER, _font
from clipworks.segment.proxyclip import ProxyCLIP
from clipworks.segment.segmenter import Segmenter

NAMES = {
    "temple": ["temple", "sky", "trees", "water"],
    "flower": ["flower", "leaves", "dark background"],
    "chelsea.png": ["cat", "blanket"],
    "astronaut.png": ["astronaut", "flag", "space shuttle", "helmet"],
    "coffee.png": ["cup of coffee", "spoon", "wooden table"],
    "rocket.jpg": ["rocket", "launch tower", "smoke", "night sky"],
}
COLUMNS = {
    "plain patch tokens": {"method": "patch-tokens"},
    "sclip (default)": {"method": "sclip"},
    "proxyclip": {"method": "proxyclip"},
    "proxyclip, residual, pamr": {"method": ProxyCLIP(residual=True), "refine": "pamr"},
}
WIDE, GAP, HEAD = 236, 8, 26


def photos() -> dict[str, Image.Image]:
    """The photos by their name above."""
    from sklearn.datasets import load_sample_images

    found = dict(zip(("temple", "flower"), map(Image.fromarray, load_sample_images().images), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, "scikit-image"],
                       check=True)  # fmt: skip
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            for name in NAMES:
                if name not in found:
                    found[name] = Image.open(BytesIO(wheel.read(f"skimage/data/{name}"))).convert("RGB")
    return found


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("masks.webp")
    encoder = clipworks.load()
    rows = []
    for name, photo in photos().items():
        photo = photo.resize((WIDE, round(photo.height * WIDE / photo.width)), Image.Resampling.LANCZOS)
        drawn = [photo]
        for settings in COLUMNS.values():
            mask = Segmenter(NAMES[name], encoder=encoder, **settings)(np.asarray(photo))
            drawn.append(mask.overlay(photo))
        rows.append(drawn)
    height = HEAD + sum(max(p.height for p in row) + GAP for row in rows)
    page = Image.new("RGB", (len(rows[0]) * (WIDE + GAP) + GAP, height), PAPER)
    draw = ImageDraw.Draw(page)
    for i, head in enumerate(["photo", *COLUMNS]):
        draw.text((GAP + i * (WIDE + GAP), 6), head, font=_font(13), fill=INK)
    top = HEAD
    for row in rows:
        for i, picture in enumerate(row):
            page.paste(picture, (GAP + i * (WIDE + GAP), top))
        top += max(p.height for p in row) + GAP
    page.save(out, quality=82, method=6)


if __name__ == "__main__":
    main()
