"""Contact sheets: the result of a search or a classification as one picture that a person can look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..errors import ClipworksError, check_choice, check_range
from ..types import Classification, Ranking

PAPER, CARD, EDGE = "#f6f6f4", "#ffffff", "#e2e2de"
INK, SOFT, ACCENT, TRACK = "#1c1c1a", "#73736d", "#2f6fde", "#e9eaec"
MARGIN, GAP, PAD, CAPTION = 28, 14, 10, 50
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

Images = Callable[[str], "Image.Image | None"]


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet.

    Attributes
    ----------
    image : the picture, or None where it can no longer be read
    head : short and bold, on the left under the picture (a rank, a label)
    value : on the right (a score)
    caption : one line below, shortened to fit
    share : length of the bar between picture and text, in [0, 1]; None draws no bar
    """

    image: Image.Image | None
    head: str = ""
    value: str = ""
    caption: str = ""
    share: float | None = None


@dataclass(frozen=True)
class Section:
    """Tiles under a heading of their own; an empty title draws none."""

    title: str
    note: str
    tiles: Sequence[Tile]


def search_sheet(
    ranking: Ranking, images: Images, *, note: str = "", columns: int = 5, size: int = 208
) -> Image.Image:
    """Draw the hits of a search, best first, with rank and score.

    Parameters
    ----------
    ranking : the result of `search`
    images : function from a key to its picture, or None where it cannot be read
    note : small line under the title, for example how many images were searched
    columns, size : pictures per row and their side in pixels (208: five fit a laptop's screen)
    """
    rows = ranking.as_rows()
    tiles = [
        Tile(images(r["key"]), str(r["rank"]), f"{r['score']:.3f}", str(r.get("caption") or r["key"]))
        for r in rows
    ]
    return contact_sheet(
        [Section("", "", tiles)], title=ranking.query or "Search", note=note, columns=columns, size=size
    )


def classification_sheet(
    result: Classification,
    images: Images,
    *,
    note: str = "",
    per_class: int = 5,
    columns: int = 5,
    size: int = 208,
) -> Image.Image:
    """Draw the surest images of every class, a section per class with its count, a bar for the probability.

    Parameters
    ----------
    result : the result of `classify`
    images, note, columns, size : as for `search_sheet`
    per_class : images shown of each class
    """
    check_range("per_class", per_class, 1)
    best = result.probabilities.argmax(1)
    sections = []
    for index, name in enumerate(result.names):
        members = [i for i in result.probabilities[:, index].argsort(kind="stable")[::-1] if best[i] == index]
        tiles = [
            Tile(images(result.keys[i]), f"{p:.0%}", "", result.keys[i], float(p))
            for i in members[:per_class]
            for p in [result.probabilities[i, index]]
        ]
        count = f"{len(members):,} image{'s' if len(members) != 1 else ''}"
        sections.append(Section(name, count, tiles))
    sections.sort(key=lambda s: not s.tiles)  # classes without an image stand last
    return contact_sheet(sections, title="Classification", note=note, columns=columns, size=size)


def contact_sheet(
    sections: Sequence[Section], *, title: str, note: str = "", columns: int = 5, size: int = 208
) -> Image.Image:
    """Draw sections of captioned pictures on one light page.

    Parameters
    ----------
    sections : what to draw, from top to bottom
    title, note : heading of the page and the small line under it
    columns : pictures per row; fewer are used where no section has that many
    size : side of a picture's square, in pixels; pictures keep their proportions inside it

    Returns
    -------
    PIL image, RGB
    """
    check_range("columns", columns, 1, 50)
    check_range("size", size, 48, 1024)
    columns = max(1, min(columns, max((len(s.tiles) for s in sections), default=1)))
    card = (size + 2 * PAD, size + 2 * PAD + CAPTION)
    width = max(2 * MARGIN + columns * card[0] + (columns - 1) * GAP, 560)
    heights = [_section_height(s, columns, card[1]) for s in sections]
    top = MARGIN + 40 + (26 if note else 6)
    page = Image.new("RGB", (width, top + sum(heights) + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    _text(draw, (MARGIN, MARGIN), title, 28, INK, width - 2 * MARGIN)
    if note:
        _text(draw, (MARGIN, MARGIN + 38), note, 15, SOFT, width - 2 * MARGIN)
    for section, height in zip(sections, heights, strict=True):
        _draw_section(page, section, top, columns, size, card)
        top += height
    return page


def save_sheet(page: Image.Image, path: str | Path) -> Path:
    """Write a sheet as .png, .jpg or .webp and return its path."""
    path = check_place(path)
    page.save(path, quality=92)
    return path


def check_place(path: str | Path, what: str = "a sheet", suffixes: Sequence[str] = SUFFIXES) -> Path:
    """Return the path of a picture that is to be written, or raise where it cannot be."""
    path = Path(path)
    check_choice(f"the ending of {what}", path.suffix.lower(), suffixes)
    if not path.parent.is_dir():
        raise ClipworksError(f"the folder of {what} must exist. Got {str(path)!r}.")
    return path


def _section_height(section: Section, columns: int, card: int) -> int:
    rows = math.ceil(len(section.tiles) / columns)
    return (44 if section.title else 12) + rows * (card + GAP) + (6 if section.title else 0)


def _draw_section(
    page: Image.Image, section: Section, top: int, columns: int, size: int, card: tuple[int, int]
) -> None:
    draw = ImageDraw.Draw(page)
    if section.title:
        room = page.width - 2 * MARGIN
        end = _text(draw, (MARGIN, top + 12), section.title, 20, INK, room - 120)
        _text(draw, (end + 12, top + 16), section.note, 15, SOFT, room - end)
    top += 44 if section.title else 12
    for i, tile in enumerate(section.tiles):
        corner = (MARGIN + (i % columns) * (card[0] + GAP), top + (i // columns) * (card[1] + GAP))
        _draw_tile(page, draw, tile, corner, size, card)


def _draw_tile(
    page: Image.Image,
    draw: ImageDraw.ImageDraw,
    tile: Tile,
    corner: tuple[int, int],
    size: int,
    card: tuple[int, int],
) -> None:
    x, y = corner
    draw.rounded_rectangle((x, y, x + card[0] - 1, y + card[1] - 1), radius=8, fill=CARD, outline=EDGE)
    x, y = x + PAD, y + PAD
    if tile.image is None:
        draw.rectangle((x, y, x + size - 1, y + size - 1), fill=TRACK)
        _text(draw, (x + 12, y + size // 2 - 9), "not readable", 15, SOFT, size - 24)
    else:
        picture = _thumbnail(tile.image, size)
        page.paste(picture, (x + (size - picture.width) // 2, y + (size - picture.height) // 2))
    below = y + size
    if tile.share is not None:
        draw.rectangle((x, below + 6, x + size - 1, below + 9), fill=TRACK)
        draw.rectangle(
            (x, below + 6, x + round((size - 1) * min(max(tile.share, 0.0), 1.0)), below + 9), fill=ACCENT
        )
    value = _font(15).getlength(tile.value)
    _text(draw, (x, below + 13), tile.head, 16, INK, size - value - 8)
    draw.text((x + size - value, below + 14), tile.value, font=_font(15), fill=ACCENT)
    _text(draw, (x, below + 35), tile.caption, 14, SOFT, size, keep_end=True)


def _thumbnail(image: Image.Image, size: int) -> Image.Image:
    """Fit an image into the square, enlarging small ones as well, so that all tiles carry the same weight."""
    scale = size / max(image.size)
    shape = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(shape, Image.Resampling.LANCZOS, reducing_gap=2.0)


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)  # type: ignore[return-value]


def _text(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int,
    color: str,
    room: float,
    keep_end: bool = False,
) -> float:
    """Draw one line, shortened to `room` pixels (file names keep their end), and return where it ends."""
    text, font = " ".join(text.split()), _font(size)
    if font.getlength(text) > room:
        while text and font.getlength(text + "…") > room:
            text = text[1:] if keep_end else text[:-1]
        text = f"…{text}" if keep_end else f"{text}…"
    draw.text(at, text, font=font, fill=color)
    return at[0] + font.getlength(text)
