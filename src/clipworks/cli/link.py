"""`clipworks link`, `clipworks differ`: records that mean the same thing; what two sets of images differ in."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ._command import command
from ._output import Csv, Json, emit, note

TABLE = "A table with an image and a text per record (CSV, TSV, Parquet), or images with captions beside them."
SET = "A collection, or images: folder, table, list, archive."


@command("retrieval.link.link")
def link(
    source: Annotated[str, typer.Argument(metavar="TABLE", help=TABLE)],
    *,
    alone: Annotated[bool, typer.Option("--alone", help="Print records that are linked to no other too.")] = False,
    json: Json = False,
    csv: Csv = False,
    **options: Any,
) -> int:
    """Find records that mean the same thing by their image and their text together.

    \b
    Examples:
      clipworks link products.csv --validation labelled.csv
      clipworks link products.csv --weight 0.7 --threshold 0.1 --csv
    """
    from ..retrieval.link import link as work

    found = work(source, **options)
    emit(found.as_rows(alone), as_json=json, as_csv=csv, empty="no two records are linked")
    if found.tuned is not None:
        note(f"chosen: weight {found.weight:g}, threshold {found.threshold:g}, ARI {found.tuned.ari:.3f} there")
    if found.scores:
        note("labels: " + ", ".join(f"{name} {value:.3f}" for name, value in found.scores.items()))
    for error in found.errors:
        note(f"clipworks: left out: {error}")
    return 0


@command("retrieval.differ.differ")
def differ(
    first: Annotated[str, typer.Argument(metavar="SET_A", help=SET)],
    second: Annotated[str, typer.Argument(metavar="SET_B", help=SET)],
    *,
    top: Annotated[int, typer.Option("--top", metavar="N", min=1, help="Phrases shown of each set.")] = 5,
    everything: Annotated[bool, typer.Option("--all", help="Print all phrases that were ranked.")] = False,
    json: Json = False,
    csv: Csv = False,
    **options: Any,
) -> None:
    """Say what is truer of the first set of images than of the second.

    \b
    Phrases come from a built-in vocabulary, or from --phrases, a text file with one per line.

    \b
    Examples:
      clipworks differ photos/2023 photos/2024
      clipworks differ wrong right --phrases guesses.txt --all --csv
    """
    from ..retrieval.differ import differ as work

    found = work(first, second, **options)
    rows = found.as_rows(None if everything else top)
    emit(rows, as_json=json, as_csv=csv, empty="no phrase is significantly truer of the first set")
