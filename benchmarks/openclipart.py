"""Real pairs for training from scratch: Debian's openclipart, pictures with what their authors wrote about them.

Both packages are in the public domain: `openclipart-png` holds the pictures, the metadata of `openclipart-svg` titles,
descriptions and keywords. Pictures are decoded once, on white, and kept as squares of `STORED` pixels.
"""

from __future__ import annotations

import html
import re
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ImageOps

from clipworks.data.decode import decode
from clipworks.data.item import Item
from clipworks.errors import BadImage

STORED, HELD_OUT = 56, 500
# folders of near-copies: they belong to the raw pool that curation is tried on, not to the clean one
BULK = re.compile(r"^shapes/stars/|-theme/|^recreation/games/cards/")


@dataclass
class Pairs:
    """The pool, cut into training and held-out parts.

    Attributes
    ----------
    clean, raw : training items without and with the folders of near-copies
    held_out : items whose titles appear nowhere in training
    """

    clean: list[Item]
    raw: list[Item]
    held_out: list[Item]


def words(text: str) -> str:
    """Lower-case words of a name or a sentence, digits left out."""
    text = re.sub(r"([a-z])([A-Z])", r"\1 \2", html.unescape(html.unescape(text)))
    return " ".join(re.findall(r"[^\W\d_]+", text.lower()))


def read_pairs(folder: Path, work: Path) -> Pairs:
    """Decode all pictures once, put their words beside them, and split by title."""
    root = folder / "usr/share/openclipart"
    files = sorted(f for f in (root / "png").rglob("*.png") if not f.is_symlink())
    if not files:
        raise SystemExit(f"--pairs must hold usr/share/openclipart/png. Nothing in {folder}.")
    store = work / f"pixels-{STORED}.npz"
    if not store.exists():
        usable = {file.relative_to(root / "png").with_suffix("").as_posix(): square(file) for file in files}
        np.savez(store, **{key: pixels for key, pixels in usable.items() if pixels is not None})
    items, seen = [], set()
    with np.load(store) as pixels:
        for key in pixels:
            image = pixels[key]
            if image.tobytes() not in seen:
                seen.add(image.tobytes())
                items.append(item_of(key, image, root / "svg"))
    clean = [item for item in items if not BULK.search(item.key)]
    # a title is held out as a whole, so that series of near-copies never straddle the split
    titles = Counter(item.columns["title"] for item in clean)
    texts = [" ".join([item.caption or "", *item.columns["alternatives"]]) for item in clean]
    common = Counter(w for text in texts for w in set(text.split()))
    single = [t for t in sorted(titles) if t and titles[t] == 1 and all(common[w] > 2 for w in t.split())]
    chosen = set(np.random.default_rng(0).permutation(single)[:HELD_OUT].tolist())
    held_out = [item for item in clean if item.columns["title"] in chosen]
    return Pairs([i for i in clean if i.columns["title"] not in chosen],
                 [i for i in items if i.columns["title"] not in chosen], held_out)  # fmt: skip


def square(file: Path) -> np.ndarray | None:
    """The picture on white, padded to a square of the stored size; None if it cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(ImageOps.pad(decode(file), (STORED, STORED), color="white"))
    except BadImage:
        return None


def item_of(key: str, image: np.ndarray, drawings: Path) -> Item:
    """One picture with its file name as caption, and title, description, keywords from the drawing's metadata."""
    *folders, name = key.split("/")
    drawing = drawings / f"{key}.svg"
    text = drawing.read_text(encoding="utf-8", errors="replace") if drawing.exists() else ""

    def field(tag: str) -> list[str]:
        found = re.findall(rf"<{tag}>([^<]*)</{tag}>", text)
        return [words(f) for f in found if "HASH(" not in f.upper() and "@" not in f and words(f)]

    title = (field("dc:title") or [""])[0]
    keywords = list(dict.fromkeys(k for k in field("rdf:li") if k != "hash"))
    about = (field("dc:description") or [""])[0]
    columns = {"title": title, "about": " ".join(about.split()[:12]), "keywords": " ".join(keywords[:8]),
               "alternatives": [t for t in (title, about, " ".join(keywords[:8])) if t]}  # fmt: skip
    return Item(key, image, words(name) or words(folders[-1]), words(folders[-1]), columns)
