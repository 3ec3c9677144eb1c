"""The pictures of the quick-starts, made here: no download, and the same on every machine.

    python docs/samples.py [FOLDER]      photos, shop, line, tiny.json and the like, into FOLDER (default: samples)

photos  two photos that come with scikit-learn, a smaller copy of one, and a damaged file
shop    drawings of products, a folder per kind; new: others of them, and a photo that is none; offers.csv: records;
        kinds.noun: what the kinds look like
line    drawings of a steel plate with four holes: good, new (some with a scratch, a stain, a hole missing), known
"""

from __future__ import annotations

import csv
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

CAPTIONS = {"temple": "a temple by the water", "flower": "a flower in the evening light"}
COLOURS = {"red": "#c8322b", "blue": "#2a56b8", "green": "#2f8f4e", "yellow": "#e3b21c", "black": "#2b2b2e"}
PAPER = ("#ffffff", "#f3efe6", "#e6edf3", "#f4e4e0")
SIDE = 256


def photos(folder: Path) -> None:
    """Write the real photos, with captions in `pairs`, by class in `classes`, four parts of each in `parts`."""
    from sklearn.datasets import load_sample_images

    pairs, classes, place = folder / "pairs", folder / "classes", folder / "photos"
    (place / "copies").mkdir(parents=True)
    pairs.mkdir()
    china, flower = (Image.fromarray(pixels) for pixels in load_sample_images().images)
    china.save(place / "temple.jpg", quality=92)
    flower.save(place / "flower.jpg", quality=92)
    flower.resize((320, 213)).save(place / "copies" / "flower-small.jpg", quality=85)
    for name, caption in CAPTIONS.items():
        (classes / name).mkdir(parents=True)
        for target in (pairs, classes / name):
            shutil.copy(place / f"{name}.jpg", target)
        (pairs / f"{name}.txt").write_text(caption)
        quarters(place / f"{name}.jpg", folder / "parts" / name)
    whole = (place / "temple.jpg").read_bytes()
    (place / "damaged.jpg").write_bytes(whole[: len(whole) // 3])


def quarters(path: Path, folder: Path) -> None:
    """Cut a photo into four overlapping parts."""
    folder.mkdir(parents=True)
    with Image.open(path) as image:
        width, height = (3 * side // 4 for side in image.size)
        for i, (x, y) in enumerate((x, y) for y in (0, image.height - height) for x in (0, image.width - width)):
            image.crop((x, y, x + width, y + height)).save(folder / f"{i}.jpg", quality=92)


def tiny(folder: Path) -> None:
    """Write the shape of a model that trains in seconds."""
    from clipworks.encoders.config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig

    vision = VisionConfig(image_size=32, patch_size=8, width=24, layers=1, heads=3, mlp_width=48)
    text = TextConfig(width=24, layers=1, heads=3, mlp_width=48)
    made = EncoderConfig("tiny", 16, vision, text, PreprocessConfig(size=32))
    (folder / "tiny.json").write_text(json.dumps(made.to_dict()))


def _mug(draw: ImageDraw.ImageDraw, fill: str) -> None:
    draw.ellipse((150, 90, 225, 175), outline=fill, width=16)
    draw.rounded_rectangle((60, 70, 175, 200), 14, fill=fill)
    draw.ellipse((60, 58, 175, 86), fill="#4a3526", outline=fill, width=6)


def _shirt(draw: ImageDraw.ImageDraw, fill: str) -> None:
    draw.polygon([(88, 50), (30, 90), (54, 130), (80, 114), (80, 215), (176, 215), (176, 114), (202, 130), (226, 90),
                  (168, 50)], fill=fill)  # fmt: skip
    draw.ellipse((100, 32, 156, 72), fill=PAPER[0])


def _umbrella(draw: ImageDraw.ImageDraw, fill: str) -> None:
    draw.pieslice((28, 40, 228, 240), 180, 360, fill=fill)
    for x in (28, 78, 128, 178):
        draw.ellipse((x, 128, x + 50, 152), fill=PAPER[0])
    draw.line((128, 30, 128, 205), fill="#5b4636", width=7)
    draw.arc((128, 185, 160, 225), 0, 180, fill="#5b4636", width=7)


def _clock(draw: ImageDraw.ImageDraw, fill: str) -> None:
    draw.ellipse((40, 40, 216, 216), fill="#fafafa", outline=fill, width=14)
    for x, y in ((128, 62), (194, 128), (128, 194), (62, 128)):
        draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill="#222222")
    draw.line((128, 128, 128, 78), fill="#222222", width=8)
    draw.line((128, 128, 168, 146), fill="#222222", width=6)


def _chair(draw: ImageDraw.ImageDraw, fill: str) -> None:
    draw.rectangle((80, 30, 92, 226), fill=fill)
    draw.rectangle((80, 36, 108, 126), fill=fill)
    draw.polygon([(80, 126), (176, 126), (190, 146), (80, 146)], fill=fill)
    draw.rectangle((172, 140, 184, 226), fill=fill)


KINDS: dict[str, Callable[[ImageDraw.ImageDraw, str], None]] = {
    "mug": _mug,
    "t-shirt": _shirt,
    "umbrella": _umbrella,
    "clock": _clock,
    "chair": _chair,
}

LOOKS = {
    "mug": "a round cup with a handle on its side; a dark drink inside",
    "t-shirt": "a garment with two short sleeves; a round neck",
    "umbrella": "a wide round top; a thin stick with a bent handle",
    "clock": "a white round face; two black hands",
    "chair": "a tall back; a seat on thin legs",
}


def product(kind: str, colour: str, turn: random.Random) -> Image.Image:
    """Draw one product on paper, a little turned, moved and scaled."""
    paper = turn.choice(PAPER)
    image = Image.new("RGB", (SIDE, SIDE), PAPER[0])
    KINDS[kind](ImageDraw.Draw(image), COLOURS[colour])
    image = image.rotate(turn.uniform(-9, 9), Image.Resampling.BICUBIC, fillcolor=PAPER[0])
    side = int(SIDE * turn.uniform(0.75, 1.0))
    page = Image.new("RGB", (SIDE, SIDE), paper)
    page.paste(image.resize((side, side)), (turn.randint(0, SIDE - side), turn.randint(0, SIDE - side)))
    return page


def shop(folder: Path, each: int = 8) -> None:
    """Write `shop/KIND/*.png`, `new/*.png`, and the records `offers.csv` and `known-offers.csv` with their pictures."""
    turn = random.Random(0)
    for kind in KINDS:
        (folder / "shop" / kind).mkdir(parents=True)
        for i in range(each):
            colour = list(COLOURS)[i % len(COLOURS)]
            product(kind, colour, turn).save(folder / "shop" / kind / f"{colour}-{i}.png")
    (folder / "new").mkdir()
    for i, kind in enumerate([*KINDS, *KINDS]):
        product(kind, list(COLOURS)[(3 * i + 1) % 5], turn).save(folder / "new" / f"{i:02}.png")
    shutil.copy(folder / "photos" / "temple.jpg", folder / "new" / "temple.jpg")
    (folder / "offers").mkdir()
    kinds = list(KINDS)
    offers(folder, "offers", [(kind, colour) for kind in kinds for colour in ("red", "blue")], turn)
    offers(folder, "known-offers", [(kind, colour) for kind in kinds for colour in ("green", "yellow")], turn)


def offers(folder: Path, name: str, things: list[tuple[str, str]], turn: random.Random) -> None:
    """Write a table of offers: every thing by two sellers, with pictures and titles of their own."""
    with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["path", "title", "label"])
        for kind, colour in things:
            for seller, title in (("a", f"{colour} {kind}"), ("b", f"{kind}, {colour}, new")):
                path = f"offers/{kind}-{colour}-{seller}.png"
                product(kind, colour, turn).save(folder / path)
                table.writerow([path, title, f"{colour} {kind}"])


def glossary(folder: Path) -> None:
    """Write `kinds.noun`: what the kinds look like, one a line, in the form of WordNet's `data.noun`."""
    lines = [f"{number:08} 06 n 01 {kind} 0 000 | {looks}" for number, (kind, looks) in enumerate(LOOKS.items())]
    (folder / "kinds.noun").write_text("\n".join(lines) + "\n", encoding="utf-8")


def plate(turn: random.Random, defect: str | None = None) -> Image.Image:
    """Draw a steel plate with four holes as a camera above a belt sees it: light and place vary."""
    light = turn.randint(150, 175)
    image = Image.new("RGB", (SIDE, SIDE), (52, 54, 58))
    draw = ImageDraw.Draw(image)
    x, y = turn.randint(22, 30), turn.randint(22, 30)
    draw.rounded_rectangle((x, y, x + 204, y + 204), 16, fill=(light, light + 3, light + 8))
    for row in range(y + 8, y + 200, 6):  # brushed
        shade = light + turn.randint(-7, 7)
        draw.line((x + 6, row, x + 198, row), fill=(shade, shade + 3, shade + 8), width=2)
    holes = [(x + 44, y + 44), (x + 160, y + 44), (x + 44, y + 160), (x + 160, y + 160)]
    for i, (a, b) in enumerate(holes):
        if not (defect == "hole" and i == 1):
            draw.ellipse((a - 18, b - 18, a + 18, b + 18), fill=(30, 31, 33), outline=(205, 208, 212), width=3)
    if defect == "scratch":
        draw.line((x + 66, y + 128, x + 104, y + 96, x + 146, y + 84), fill=(236, 238, 240), width=5)
    if defect == "stain":
        draw.ellipse((x + 84, y + 92, x + 132, y + 132), fill=(108, 82, 58))
        draw.ellipse((x + 110, y + 112, x + 144, y + 138), fill=(120, 92, 64))
    return image.filter(ImageFilter.GaussianBlur(0.8))


DEFECTS = ("scratch", "stain", "hole")


def line(folder: Path) -> None:
    """Write `line/good`, `line/new` and `line/known`, the last with a folder per kind of defect."""
    turn = random.Random(1)
    made: dict[str, list[str | None]] = {
        "good": [None] * 20,
        "new": [None, None, None, None, *DEFECTS],
        "known/good": [None] * 6,
        **{f"known/{defect}": [defect] * 6 for defect in DEFECTS},
    }
    for place, defects in made.items():
        (folder / "line" / place).mkdir(parents=True)
        for i, defect in enumerate(defects):
            plate(turn, defect).save(folder / "line" / place / f"{i:02}{'-' + defect if defect else ''}.png")


def write(folder: Path) -> None:
    """Write everything into a folder that exists."""
    for part in (photos, tiny, shop, glossary, line):
        part(folder)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "samples")
    target.mkdir(parents=True, exist_ok=True)
    write(target)
    print(f"written: {', '.join(sorted(path.name for path in target.iterdir()))} in {target}")
