"""`clipworks ood`: images that show none of the given names."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ._command import command
from ._output import Csv, Json, emit, note
from .classify import TEMPLATES, _templates, class_names

NAMES = "Class names, separated by commas, or a text file (.txt) with one name per line."
SOURCE = "Images: folder, table, list, archive, video."
KNOWN = "Other images of these classes, unlabelled; they set the threshold. Without them SOURCE counts as a mixed lot."
CUT = "without --known the scores are cut in two: where no image is a stranger, some are set aside all the same"


@command("ood.unknown.find_unknown")
def ood(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCE)],
    *,
    names: Annotated[str, typer.Option("--names", metavar="A,B,C", help=NAMES)],
    known: Annotated[str | None, typer.Option("--known", metavar="SOURCE", help=KNOWN, show_default=False)] = None,
    templates: Annotated[
        list[str] | None, typer.Option("--templates", metavar="TEXT", help=TEMPLATES, show_default=False)
    ] = None,
    unknown_only: Annotated[bool, typer.Option("--unknown-only", help="Print the unknown images only.")] = False,
    json: Json = False,
    csv: Csv = False,
    **options: Any,
) -> int:
    """Find images that show none of the given names.

    \b
    Examples:
      clipworks ood new --names cat,dog,bird --known photos --unknown-only
      clipworks ood mixed --names names.txt --score energy --json
    """
    from ..ood.unknown import find_unknown

    if templates:
        options["templates"] = _templates(templates)
    found = find_unknown(source, class_names(names), known, **options)
    aside = set(found.unknown)
    emit([r for r in found.as_rows() if r["key"] in aside or not unknown_only], as_json=json, as_csv=csv,
         empty="no unknown image")  # fmt: skip
    for error in found.errors:
        note(f"clipworks: left out: {error}")
    note(f"{len(aside)} of {len(found.keys)} images score {found.threshold:.4f} or less: none of these")
    if known is None:
        note(CUT)
    return 0
