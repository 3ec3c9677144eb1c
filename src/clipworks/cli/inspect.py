"""`clipworks inspect`: defects in images, by images of good parts or by words."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ._command import command
from ._output import Csv, Json, emit, note

SOURCE = "Images to inspect: folder, table, list, archive, video."
NORMAL = "Images of good parts. Without them give --method winclip or anovl, and --name."


@command("anomaly.inspection.inspect")
def inspect(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCE)],
    *,
    normal: Annotated[str | None, typer.Option("--normal", metavar="SOURCE", help=NORMAL, show_default=False)] = None,
    bad_only: Annotated[bool, typer.Option("--bad-only", help="Print the defective images only.")] = False,
    json: Json = False,
    csv: Csv = False,
    **options: Any,
) -> int:
    """Find defects: which images are not like the good ones, and where.

    \b
    Examples:
      clipworks inspect new --normal good --out maps
      clipworks inspect new --normal good --image-size 448 --json
      clipworks inspect new --method winclip --name "circuit board" --out maps --bad-only
    """
    from ..anomaly.inspection import inspect as work

    found = work(source, normal, **options)
    rows = sorted((r for r in found.rows if r["defective"] or not bad_only), key=lambda r: -r["score"])
    if not json:
        rows = [{**row, "regions": len(row["regions"])} for row in rows]
    emit(rows, as_json=json, as_csv=csv, empty="no defective image" if found.rows else "no image could be inspected")
    for error in found.errors:
        note(f"clipworks: left out: {error}")
    note(f"{len(found.defective)} of {len(found.rows)} images score above {found.threshold:.3f}")
    return 1 if found.errors and not found.rows else 0
