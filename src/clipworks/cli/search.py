"""`clipworks search`, `clipworks similar`: the images nearest to words, to an image, to one of the collection."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import ClipworksError
from ._command import command
from ._output import Csv, Json, Sheet, check_sheet, emit, note

ONE_ONLY = ("expand", "rerank", "diverse", "sheet")  # options that need all rows of one collection
Place = Annotated[str, typer.Argument(metavar="COLLECTION", help="What `clipworks embed` made.")]


@command("store.search.search")
def search(
    collection: Place,
    query: Annotated[str | None, typer.Argument(metavar="WORDS", help="What to look for, in quotes.")] = None,
    *,
    sheet: Sheet = None,
    json: Json = False,
    csv: Csv = False,
    **options: Any,
) -> None:
    """Rank the images of a collection, or of a folder of collections, by words, by an image, or by both.

    \b
    Examples:
      clipworks search photos.collection "a red bicycle" --sheet found.png
      clipworks search photos.collection "at night" --image bicycle.jpg --negative "a person" -k 20
      clipworks search photos.collection "a horse with stripes" --minus "a horse" --diverse 0.5
      clipworks search photos.collection --image bicycle.jpg --expand 5
      clipworks search photos.collection "a cat" --where "label = 'pets'" --columns caption --json
    """
    from ..store.collection import Collection
    from ..store.search import search as work
    from ..store.shards import is_sharded

    check_sheet(sheet)
    if is_sharded(collection):
        return _shards(collection, query, sheet, json, csv, options)
    opened = Collection.open(collection)
    _show(work(opened, query, **options), opened, sheet, json, csv)


def _shards(
    folder: str, query: str | None, sheet: str | None, as_json: bool, as_csv: bool, options: dict[str, Any]
) -> None:
    from ..store.shards import search_shards

    alone = [name for name in ONE_ONLY if name in options or (name == "sheet" and sheet)]
    if alone:
        raise ClipworksError(f"{alone[0]} cannot be used with a sharded collection; name one of its shards.")
    rows = search_shards(folder, query, **options).as_rows()
    emit(rows, as_json=as_json, as_csv=as_csv, empty="no shard has such rows")


@command("store.search.similar")
def similar(
    collection: Place,
    key: Annotated[str, typer.Argument(metavar="KEY", help="An image of the collection, as `search` prints it.")],
    *,
    sheet: Sheet = None,
    json: Json = False,
    csv: Csv = False,
    **options: Any,
) -> None:
    """Rank the images of a collection by their likeness to one of them.

    \b
    Examples:
      clipworks similar photos.collection 2024/bicycle.jpg --sheet alike.png
    """
    from ..store.collection import Collection
    from ..store.search import similar as work

    check_sheet(sheet)
    opened = Collection.open(collection)
    _show(work(opened, key, **options), opened, sheet, json, csv)


def _show(ranking: Any, collection: Any, sheet: str | None, as_json: bool, as_csv: bool) -> None:
    emit(ranking.as_rows(), as_json=as_json, as_csv=as_csv, empty="the collection has no such rows")
    if sheet:
        from ..plot.pictures import pictures
        from ..plot.sheet import save_sheet, search_sheet

        page = search_sheet(ranking, pictures(collection, ranking.keys), note=f"{len(collection):,} images searched")
        note(f"sheet: {save_sheet(page, sheet)}")
