"""`clipworks index`: an approximate index beside the exact search."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from ._command import command
from ._output import Json, facts, note, say

PLACE = "What `clipworks embed` made."


@command("store.index.build_index", resume="The index that was there before is untouched.")
def index(
    collection: Annotated[str, typer.Argument(metavar="COLLECTION", help=PLACE)],
    *,
    json: Json = False,
    **options: Any,
) -> int:
    """Build an approximate index of a large collection, measured against the exact search.

    \b
    Searches stay exact up to a million rows of 512 numbers (see `clipworks search --index`). A second run extends the
    index by what is new. Exit code 1 if the recall that was asked for was not reached.

    \b
    Examples:
      clipworks index photos.collection
      clipworks index photos.collection --kind pq --recall 0.95 --memory 1000000000
    """
    from ..store.index import build_index as work

    report = work(collection, **options)
    if json:
        facts(dataclasses.asdict(report), as_json=True)
    else:
        say(str(report))
    if not report.reached:
        note("clipworks: the recall that was asked for is not reached; another kind may, the exact search does")
    return 0 if report.reached else 1
