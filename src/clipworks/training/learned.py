"""Files of what was learned: named tensors and, as JSON in the header, the record that makes the rest again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..atomic import write_atomically
from ..errors import BadWeights, ClipworksError


def write_learned(
    path: str | os.PathLike, key: str, record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> Path:
    """Write tensors and a record into one safetensors file, in full or not at all; returns its path.

    Parameters
    ----------
    path : file
    key : under which the record stands in the header; it tells one kind of file from another
    record : anything JSON can hold
    tensors : named, on any device; those that share memory are written apart

    Raises
    ------
    ClipworksError
        If the record does not fit JSON.
    """
    try:
        metadata = {key: json.dumps(record, sort_keys=True)}
    except TypeError as error:
        raise ClipworksError(f"settings must fit JSON to be saved: {error}.") from error
    # clones: safetensors refuses tensors that share memory
    values = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    return write_atomically(Path(path), lambda place: save_file(values, place, metadata=metadata))


def read_learned(path: str | os.PathLike, key: str, what: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the record and the tensors of a file that `write_learned` wrote under this key.

    Parameters
    ----------
    path, key : of the file
    what : such a file holds, for messages

    Raises
    ------
    ClipworksError
        If there is no such file.
    BadWeights
        If it is another kind of file, or damaged.
    """
    if not Path(path).is_file():
        raise ClipworksError(f"path must be a file of {what}. There is none at {str(path)!r}.")
    try:
        with safe_open(os.fspath(path), "pt") as file:
            record = json.loads((file.metadata() or {})[key])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    except (OSError, SafetensorError, ValueError, LookupError, RecursionError) as error:
        raise BadWeights(f"{path} cannot be read: not a file of {what} ({error!r:.120}).") from error
    if not isinstance(record, dict):
        raise BadWeights(f"{path} cannot be read: not a file of {what} (its record is no object).")
    return record, tensors
