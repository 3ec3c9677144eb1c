"""`clipworks refer`: which region of a photo an expression means."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ._command import command
from ._output import Csv, Json, emit, note

EXPRESSION = "What is looked for, by its looks; relations such as 'left of' are not read."
BOXES = "File of regions: JSON (lists left, top, right, bottom; or objects with box or bbox) or CSV."
OUT = "Picture with a line around the region that is meant."


@command("segment.referring.refer")
def refer(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="The photo.")],
    expression: Annotated[str, typer.Argument(metavar="EXPRESSION", help=EXPRESSION)],
    *,
    boxes: Annotated[str | None, typer.Option("--boxes", metavar="FILE", help=BOXES, show_default=False)] = None,
    out: Annotated[str | None, typer.Option("--out", metavar="FILE", help=OUT, show_default=False)] = None,
    json: Json = False,
    csv: Csv = False,
    **options: Any,
) -> int:
    """Find the region of a photo that an expression means.

    \b
    Examples:
      clipworks refer photo.jpg "the brown dog" --boxes boxes.json --out dog.png
      clipworks refer photo.jpg "a red cup" --sam facebook/sam-vit-base --json
    """
    from ..segment.referring import refer as work

    found = work(image, expression, boxes=boxes, out=out, **options)
    emit(found.as_rows(), as_json=json, as_csv=csv)
    if out:
        note(f"picture: {out}")
    return 0
