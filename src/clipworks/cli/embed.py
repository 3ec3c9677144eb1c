"""`clipworks embed`: images into a collection."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from ._command import command
from ._output import Json, emit, facts, note, say

SOURCE = "Folder, CSV, TSV or Parquet table, list of paths (.txt), webdataset .tar, video, hf:org/name, or image files."


@command("store.embed.embed", hide=("out",), resume="The same command goes on where it stopped.")
def embed(
    source: Annotated[list[str], typer.Argument(metavar="SOURCE...", help=SOURCE)],
    *,
    out: Annotated[str, typer.Option("--out", metavar="COLLECTION", help="The collection to make or to continue.")],
    json: Json = False,
    **options: Any,
) -> int:
    """Encode images into a collection; a second run encodes only what is new or changed.

    \b
    Images that cannot be used are listed with the reason, and the others are done. Exit code 1 if none could be used.

    \b
    Examples:
      clipworks embed photos --out photos.collection
      clipworks embed products.csv --out products.collection --image-column file --encoder hf:org/name
    """
    from ..store.embed import embed as work

    report = work(source[0] if len(source) == 1 else source, out, **options)
    if json:
        facts(dataclasses.asdict(report) | {"left_out": report.as_rows()}, as_json=True)
    else:
        say(str(report))
        for sentence in report.notes:
            note(f"clipworks: {sentence}")
        if report.left_out:
            emit(report.as_rows())
    return 1 if report.n_left_out and not report.n_rows else 0
