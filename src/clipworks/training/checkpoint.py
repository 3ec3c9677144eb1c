"""Checkpoints that a power cut cannot break: safetensors for tensors, JSON for the rest, no pickle.

A checkpoint is two files. The tensors are written first, the JSON with their SHA-256 last, each in one move
(`atomic`); so a JSON that is there vouches for its tensors, and anything else is ignored.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..atomic import write_atomically, write_json

FORMAT = 1
_NAME = re.compile(r"step-(\d{9})\.json$")


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], keep: int = 2
) -> Path:
    """Write a checkpoint and remove the oldest beyond `keep`.

    Parameters
    ----------
    folder : where checkpoints live
    step : number of finished optimizer steps
    tensors : named CPU tensors
    state : anything JSON can hold
    keep : number of checkpoints that stay

    Returns
    -------
    path of the JSON file
    """
    values = {name: value.contiguous() for name, value in tensors.items()}
    weights = write_atomically(folder / f"step-{step:09d}.safetensors", lambda file: save_file(values, file))
    size, digest = weights.stat().st_size, file_digest(weights)
    record = {"format": FORMAT, "step": step, "bytes": size, "sha256": digest, **state}
    path = write_json(weights.with_suffix(".json"), record)
    for old in checkpoints(folder)[keep:]:
        old.unlink(missing_ok=True)  # the JSON first: what is left without one is no checkpoint
        old.with_suffix(".safetensors").unlink(missing_ok=True)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Return the JSON files of the checkpoints in a folder, newest first."""
    found = [p for p in folder.glob("step-*.json") if _NAME.search(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: p.name, reverse=True)


def newest_checkpoint(folder: Path) -> tuple[dict[str, Any], Path] | None:
    """Return state and tensor file of the newest undamaged checkpoint, or None; damaged ones are reported."""
    for path in checkpoints(folder):
        try:
            return read_state(path), path.with_suffix(".safetensors")
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"checkpoint {path.name} is damaged ({error}); trying the one before it", stacklevel=2)
    return None


def read_state(path: Path) -> dict[str, Any]:
    """Return the JSON of a checkpoint after checking that its tensors are those it vouches for."""
    state = json.loads(path.read_text(encoding="utf-8"))
    if state["format"] != FORMAT:
        raise ValueError(f"its format is {state['format']}, this version reads {FORMAT}")
    weights = path.with_suffix(".safetensors")
    if weights.stat().st_size != state["bytes"]:
        raise ValueError(f"{weights.name} has {weights.stat().st_size:,} bytes, not {state['bytes']:,}")
    if file_digest(weights) != state["sha256"]:
        raise ValueError(f"{weights.name} does not have the recorded SHA-256")
    return state


def read_tensors(weights: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint."""
    try:
        return load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights} cannot be read: {error}") from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    state = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            state.update(block)
    return state.hexdigest()
