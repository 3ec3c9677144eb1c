"""`clipworks methods`: every method of the library, found from its file."""

from __future__ import annotations

from typing import Annotated

import typer

from ._command import command
from ._output import Csv, Json, emit


@command()
def methods(
    area: Annotated[str | None, typer.Argument(help="Show one area only, for example losses.")] = None,
    *,
    json: Json = False,
    csv: Csv = False,
) -> None:
    """List every registered method: area, name, card and what holds of it.

    \b
    The level says what was shown: M the mechanism (equations checked against an independent computation),
    R an effect on real data in a committed result, P a published number reproduced.

    \b
    Examples:
      clipworks methods
      clipworks methods losses
      clipworks methods --json
    """
    from ..registry import methods as registered

    rows = [info.as_dict() for info in registered(area)]
    if not json and not csv:
        rows = [{k: v for k, v in row.items() if k != "object"} for row in rows]
    emit(rows, as_json=json, as_csv=csv, empty="no methods there yet")
