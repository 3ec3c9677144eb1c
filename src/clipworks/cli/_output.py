"""How commands print: an aligned table, CSV or JSON; a reader that stops early (`| head`) is no error."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from ..errors import ClipworksError

Json = Annotated[bool, typer.Option("--json", help="Print JSON.", show_default=False)]
Csv = Annotated[bool, typer.Option("--csv", help="Print CSV.", show_default=False)]
Sheet = Annotated[
    str | None,
    typer.Option("--sheet", metavar="PNG", help="Write the result as a picture (png, jpg, webp).", show_default=False),
]


def check_sheet(path: str | None) -> None:
    """Refuse a sheet that could not be written before the work is done, not after it."""
    if path:
        from ..plot.sheet import check_place

        check_place(path)


def check_form(as_json: bool, as_csv: bool) -> None:
    """Refuse two forms at once."""
    if as_json and as_csv:
        raise ClipworksError("give one of --json and --csv, not both.")


def say(text: str) -> None:
    """Print a line to stdout; when the reader has gone, stay silent from then on."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def note(text: str) -> None:
    """Print a line for the person at the terminal to stderr, so that stdout stays data."""
    print(text, file=sys.stderr)


def emit(
    rows: Sequence[dict[str, Any]],
    *,
    as_json: bool = False,
    as_csv: bool = False,
    empty: str = "nothing found",
) -> None:
    """Print rows; tables and CSV take the union of their keys as columns."""
    check_form(as_json, as_csv)
    if as_json:
        return say(json.dumps(list(rows), indent=2, ensure_ascii=False, default=str))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if as_csv:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([[_cell(row.get(c), digits=6) for c in columns] for row in rows])
        return say(text.getvalue().rstrip("\n"))
    if not rows:
        return note(empty)
    say(table(columns, [[_printable(_cell(row.get(c))) for c in columns] for row in rows]))


def facts(values: dict[str, Any], *, as_json: bool = False) -> None:
    """Print one thing's properties, a line each."""
    if as_json:
        return say(json.dumps(values, indent=2, ensure_ascii=False, default=str))
    width = max(map(len, values))
    for key, value in values.items():
        shown = ", ".join(f"{k} {_cell(v)}" for k, v in value.items()) if isinstance(value, dict) else _cell(value)
        say(f"{key:<{width}}  {_printable(shown)}")


def table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Return an aligned plain-text table; numbers stand right."""
    lines = [list(columns), *map(list, cells)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    right = [all(_is_number(row[i]) for row in cells) for i in range(len(columns))]
    rows = [[c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)] for line in lines]
    rows.insert(1, ["-" * w for w in widths])
    return "\n".join("  ".join(row).rstrip() for row in rows)


def _cell(value: Any, digits: int = 3) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.{digits}f}"
    if isinstance(value, dict):
        return "  ".join(f"{k} {_cell(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_cell(v) for v in value)
    return str(value)


def _is_number(text: str) -> bool:
    return bool(text) and text.replace(".", "", 1).lstrip("-").isdigit()


def _printable(text: str) -> str:
    """Show control characters as escapes, so that no file name can drive the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
