"""`clipworks segment`: which pixels of an image each name means."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import BadImage, ClipworksError, check_choice, check_folder
from ._command import command
from ._output import Csv, Json, emit, note
from .classify import TEMPLATES, _templates, class_names

NAMES = "What may be seen: names separated by commas, or a text file (.txt) with one name per line."
SOURCE = "An image, or images: folder, table, list, archive, video."
OUT = "Folder for the masks, one file per image (made if it is missing)."
FORMAT = "Form of the masks: png (a pixel's value is its index), npz (with scores), json (COCO run-length code)."


@command("segment.segmenter.segment")
def segment(
    source: Annotated[str, typer.Argument(metavar="IMAGE|SOURCE", help=SOURCE)],
    *,
    names: Annotated[str, typer.Option("--names", metavar="A,B,C", help=NAMES)],
    templates: Annotated[
        list[str] | None, typer.Option("--templates", metavar="TEXT", help=TEMPLATES, show_default=False)
    ] = None,
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help=OUT, show_default=False)] = None,
    form: Annotated[str, typer.Option("--format", metavar="png|npz|json", help=FORMAT)] = "png",
    overlay: Annotated[bool, typer.Option("--overlay", help="Write each image with its mask over it as well.")] = False,
    json: Json = False,
    csv: Csv = False,
    **options: Any,
) -> int:
    """Give every pixel of images one of the names, without training.

    \b
    Examples:
      clipworks segment photo.jpg --names sky,tree,house --out masks --overlay
      clipworks segment photos --names cat,dog --background 0.3 --refine pamr --out masks --json
    """
    from ..data.sources import open_source
    from ..segment.segmenter import Segmenter

    check_choice("--format", form, ("png", "npz", "json"))
    if overlay and not out:
        raise ClipworksError("--overlay needs --out, the folder to write to.")
    if templates:
        options["templates"] = _templates(templates)
    said = class_names(names)
    if len(said) == 1 and options.get("background") is None:
        raise ClipworksError("names must hold two names or more where there is no --background: every pixel gets one. "
                             f"Got {said[0]!r} alone.")  # fmt: skip
    if out:
        check_folder("out", out)
    work = Segmenter(said, **options)
    rows: list[dict[str, Any]] = []
    taken: set[Path] = set()
    bad = done = 0
    for item in open_source(source):
        try:
            mask = work(item.source(), item.key)
        except BadImage as error:
            note(f"clipworks: left out: {error}")
            bad += 1
            continue
        done += 1
        rows += mask.as_rows()
        if out:
            place = _place(Path(out), item.key, taken)
            mask.save(place.with_name(f"{place.name}.{form}"))
            if overlay:
                mask.overlay(item.source()).save(place.with_name(f"{place.name}-overlay.png"))
    emit(rows, as_json=json, as_csv=csv, empty="no image could be segmented")
    if out and done:
        note(f"masks: {done} in {out}, values are indices into: {', '.join(work.names)}")
    return 1 if bad and not done else 0


def _place(out: Path, key: str, taken: set[Path]) -> Path:
    """Where the files of a key go, without their ending: below `out` always, and apart for photo.jpg and photo.png."""
    path = Path(key)
    inside = path.name if path.is_absolute() else Path(*(part for part in path.parts if part != ".."))
    place = out / inside
    place = place if place.with_suffix("") in taken else place.with_suffix("")
    taken.add(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    return place
