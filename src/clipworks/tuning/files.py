"""What changed of an encoder, in a file: the changed tensors and the settings that make the rest again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import BadWeights
from ..training.learned import read_learned, write_learned

KEY, VERSION = "clipworks-tuned", 1


def write_change(path: str | os.PathLike, record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write a record and tensors into one safetensors file, complete or not at all; returns its path.

    Raises
    ------
    ClipworksError
        If the record does not fit JSON.
    """
    return write_learned(path, KEY, {"version": VERSION, **record}, tensors)


def read_change(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the record and the tensors of a file that `write_change` wrote.

    Raises
    ------
    ClipworksError
        If there is no such file.
    BadWeights
        If it is another kind of file, damaged, or of another version.
    """
    record, tensors = read_learned(path, KEY, "a tuned encoder")
    if record.get("version") != VERSION:
        raise BadWeights(f"{path}: written in version {record.get('version')!r:.20}, this library reads {VERSION}.")
    return record, tensors
