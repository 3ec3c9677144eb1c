"""What changed, in a file: the changed tensors and, as JSON in the header, the settings that make the rest again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..errors import BadWeights, ClipworksError
from ..training.checkpoint import write_atomically

KEY, VERSION = "clipworks-tuned", 1


def write_change(path: str | os.PathLike, record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write a record and tensors into one safetensors file, complete or not at all; returns its path.

    Raises
    ------
    ClipworksError
        If the record does not fit JSON.
    """
    try:
        metadata = {KEY: json.dumps({"version": VERSION, **record}, sort_keys=True)}
    except TypeError as error:
        raise ClipworksError(f"settings must fit JSON to be saved: {error}.") from error
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # clones: safetensors refuses tensors that share memory
    values = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    write_atomically(path, lambda place: save_file(values, place, metadata=metadata))
    return path


def read_change(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the record and the tensors of a file that `write_change` wrote.

    Raises
    ------
    BadWeights
        If it is another kind of file, damaged, or of another version.
    """
    if not Path(path).is_file():
        raise ClipworksError(f"path must be a file of a tuned encoder. There is none at {str(path)!r}.")
    try:
        with safe_open(os.fspath(path), "pt") as file:
            record = json.loads((file.metadata() or {})[KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # the library raises its own, json and dict theirs
        raise BadWeights(f"{path}: not a file of a tuned encoder ({error!r:.120}).") from error
    if record.get("version") != VERSION:
        raise BadWeights(f"{path}: written in version {record.get('version')!r:.20}, this library reads {VERSION}.")
    return record, tensors
