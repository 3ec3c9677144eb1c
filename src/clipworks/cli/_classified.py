"""How a classification is printed: labels per image, counts per class, and with an explanation the leaderboard."""

from __future__ import annotations

import json
from typing import Any

from ._output import emit, note, say


def show(result: Any, *, top: int, counts: bool, explain: bool, as_json: bool, as_csv: bool) -> None:
    """Print a classification, then to stderr which images were left out.

    With an explanation JSON is one object that holds everything; a table has the leaderboard above it; of CSV the
    leaderboard goes to stderr, so that stdout stays one table.
    """
    rows = _counts(result) if counts else result.as_rows(top)
    board = [t.as_row() for t in getattr(result, "leaderboard", ())]
    why, missed = getattr(result, "why", ""), getattr(result, "shot_errors", [])
    if explain and as_json and not as_csv:
        left_out = [{"key": e.key, "reason": e.reason} for e in result.errors]
        of_shots = [{"key": e.key, "reason": e.reason} for e in missed]
        whole = {"method": result.method, "why": why, "leaderboard": board, "images": rows, "left_out": left_out,
                 "shots_left_out": of_shots}  # fmt: skip
        say(json.dumps(whole, indent=2, ensure_ascii=False, default=str))
    else:
        if explain and board:
            _leaderboard(board, why, to_stderr=as_csv)
        emit(rows, as_json=as_json, as_csv=as_csv, empty="no image could be classified")
    for error in missed:
        note(f"clipworks: left out of the shots: {error}")
    for error in result.errors:
        note(f"clipworks: left out: {error}")


def _leaderboard(board: list[dict[str, Any]], why: str, to_stderr: bool) -> None:
    """The candidates in a few columns, and why one was chosen."""
    columns = ("method", "accuracy", "error", "behind", "seconds", "settings", "note")
    rows = [{name: row[name] for name in columns} for row in board]
    if not to_stderr:
        emit(rows)
        return say(f"{why}\n")
    for row in rows:
        note(", ".join(f"{name} {value}" for name, value in row.items() if value not in (None, "", {})))
    note(why)


def _counts(result: Any) -> list[dict[str, Any]]:
    labels = result.labels
    found = [{"label": name, "images": labels.count(name)} for name in result.names]
    return sorted(found, key=lambda row: -row["images"])
