"""`clipworks dedupe`, `clipworks info`, `clipworks verify`: what is in a collection, twice, or damaged."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import ClipworksError
from ._command import command
from ._output import Csv, Json, Sheet, check_sheet, emit, facts, note, say

Place = Annotated[str, typer.Argument(metavar="COLLECTION", help="What `clipworks embed` made.")]
GROUPS = 20  # drawn on a sheet, the largest first


@command("store.dedupe.dedupe")
def dedupe(
    collection: Place,
    *,
    extras: Annotated[bool, typer.Option("--extras", help="Print only the keys that could go, one per line.")] = False,
    sheet: Sheet = None,
    json: Json = False,
    csv: Csv = False,
    **options: Any,
) -> None:
    """Find images that are the same or nearly the same. Nothing is deleted.

    \b
    Examples:
      clipworks dedupe photos.collection --sheet copies.png
      clipworks dedupe photos.collection --threshold 0.99 --extras
    """
    from ..store.collection import Collection
    from ..store.dedupe import dedupe as work

    if extras and (json or csv):
        raise ClipworksError("give one of --extras, --json and --csv.")
    check_sheet(sheet)
    opened = Collection.open(collection)
    groups = work(opened, **options)
    if extras:
        for key in groups.extras():
            say(key)
    else:
        emit(groups.as_rows(), as_json=json, as_csv=csv, empty="no image occurs twice")
    if sheet:
        from ..plot.sheet import save_sheet

        note(f"sheet: {save_sheet(_sheet(groups[:GROUPS], opened), sheet)}")


@command()
def info(collection: Place, *, json: Json = False) -> None:
    """Describe a collection: rows, encoder, columns, size.

    \b
    Examples:
      clipworks info photos.collection
    """
    from ..store.verify import info as work

    found = work(collection)
    if not json:
        found["columns"] = found["columns"] or None
        found["bytes"] = f"{found['bytes']:,}"
    facts(found if json else {k: v for k, v in found.items() if v is not None}, as_json=json)


@command("store.verify.verify")
def verify(collection: Place, *, json: Json = False, **options: Any) -> int:
    """Check every byte of a collection, and say of any damage what to do. Exit code 1 if there is some.

    \b
    Examples:
      clipworks verify photos.collection
      clipworks verify photos.collection --repair
    """
    from ..store.verify import verify as work

    found = work(collection, **options)
    if json:
        facts({**vars(found), "damage": found.as_rows(), "ok": found.ok}, as_json=True)
    else:
        say(str(found))
        if found.damage:
            emit(found.as_rows())
        if found.lost:
            say("lost: " + ", ".join(found.lost[:20]) + (" ..." if len(found.lost) > 20 else ""))
    return 0 if found.ok or found.repaired else 1


def _sheet(groups: Any, collection: Any) -> Any:
    from ..plot.pictures import pictures
    from ..plot.sheet import Section, Tile, contact_sheet

    image = pictures(collection, [key for group in groups for key in group.keys])
    sections = []
    for number, group in enumerate(groups, 1):
        tiles = [Tile(image(k), "", f"{s:.3f}", k) for k, s in zip(group.keys, group.scores.tolist(), strict=True)]
        what = "identical files" if group.identical else f"{len(group)} images"
        sections.append(Section(f"Group {number}", what, tiles))
    return contact_sheet(sections, title="Duplicates", note=f"{len(collection):,} images compared")
