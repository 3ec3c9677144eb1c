"""The record of a run: one JSON object per line, and TensorBoard if asked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..atomic import write_text
from ..errors import need


class Log:
    """Append numbers by step to `log.jsonl`; lines after the step that a run resumes from are dropped first.

    Parameters
    ----------
    path : the JSONL file
    step : finished steps at the start
    tensorboard : also write TensorBoard event files beside it
    """

    def __init__(self, path: Path, *, step: int = 0, tensorboard: bool = False):
        kept = [line for line in read_log(path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_text(path, text)
        self.stream = path.open("a", encoding="utf-8")
        self.board = None
        if tensorboard:
            need("tensorboard", "train")
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(path.parent / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Add one line."""
        # JSON has no NaN: a diverged loss is null there
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.stream.write(json.dumps({"step": step, **clean}) + "\n")
        self.stream.flush()
        if self.board:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.stream.close()
        if self.board:
            self.board.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log; a last line that was cut off is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
