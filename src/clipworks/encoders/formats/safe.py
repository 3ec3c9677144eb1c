"""Safetensors with the header checked before anything is allocated or mapped.

The format is eight bytes (length of the header), a JSON header (name -> dtype, shape, byte range) and the
bytes of the tensors. Everything a hostile header could claim is checked here first, so that the message says
what is wrong; the tensors themselves are then mapped by the safetensors library, which checks again.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import BadWeights

if TYPE_CHECKING:
    import torch

MAX_HEADER = 100_000_000  # bytes; the library's own limit
MOST = 2**63
ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


def looks_like(head: bytes) -> bool:
    """Whether the first nine bytes could open a safetensors file (a length, then a JSON object)."""
    return len(head) >= 9 and head[8:9] == b"{"


def header(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Read and check the header: (tensor entries, metadata).

    Raises
    ------
    BadWeights
        Naming the file and the first thing wrong: length of the header, JSON, dtype, shape, byte range,
        overlap, gap.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise BadWeights(f"{path}: a safetensors file has at least 8 bytes, this one {len(head)} (cut short?).")
        (length,) = struct.unpack("<Q", head)
        if length > MAX_HEADER or length > size - 8:
            raise BadWeights(
                f"{path}: the header claims {length} bytes, the file has {size} (cut short?), "
                f"and a header at most {MAX_HEADER}."
            )
        raw = file.read(length)
    try:
        entries = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadWeights(f"{path}: the header is not JSON ({error}).") from error
    if not isinstance(entries, dict):
        raise BadWeights(f"{path}: the header must be a JSON object. Got {type(entries).__name__}.")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise BadWeights(f"{path}: __metadata__ must map strings to strings.")
    _check_ranges(path, entries, size - 8 - length)
    return entries, metadata


def _check_ranges(path: Path, entries: dict[str, Any], data_bytes: int) -> None:
    """Every tensor must fill its byte range exactly, and the ranges must tile the data without overlap or
    gap."""
    spans = []
    for name, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise BadWeights(f"{path}: tensor {name!r} must have dtype, shape and data_offsets. Got {entry!r:.80}.")
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in ITEM_BITS:
            raise BadWeights(f"{path}: tensor {name!r} has the unknown dtype {entry['dtype']!r:.40}.")
        if not _naturals(entry["shape"]) or len(entry["shape"]) > 8:
            raise BadWeights(f"{path}: tensor {name!r} has the impossible shape {entry['shape']!r:.80}.")
        if not _naturals(entry["data_offsets"]) or len(entry["data_offsets"]) != 2:
            raise BadWeights(f"{path}: tensor {name!r} has the impossible byte range {entry['data_offsets']!r:.80}.")
        begin, end = entry["data_offsets"]
        if max((end, *entry["shape"])) > MOST:  # such numbers could not even be written into a message
            raise BadWeights(f"{path}: tensor {name!r} claims more than any file holds.")
        needed = math.prod(entry["shape"]) * ITEM_BITS[entry["dtype"]] // 8
        if end > data_bytes:
            raise BadWeights(
                f"{path}: tensor {name!r} ends at byte {end}, but the file holds {data_bytes} bytes "
                "of tensors (cut short?)."
            )
        if end - begin != needed:
            raise BadWeights(
                f"{path}: tensor {name!r} of shape {entry['shape']} needs {needed} bytes, its range has {end - begin}."
            )
        spans.append((begin, end, name))
    expected = 0
    for begin, end, name in sorted(spans):
        if begin != expected:
            what = "overlaps the tensor before it" if begin < expected else "leaves unnamed bytes before it"
            raise BadWeights(f"{path}: tensor {name!r} {what} (starts at byte {begin}, expected {expected}).")
        expected = end
    if expected != data_bytes:
        raise BadWeights(f"{path}: {data_bytes - expected} bytes at the end belong to no tensor.")


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a checked file, and its metadata."""
    import safetensors
    from safetensors.torch import load_file

    _, metadata = header(path)
    try:
        return load_file(path), metadata
    except (safetensors.SafetensorError, KeyError) as error:
        raise BadWeights(f"{path}: {error}") from error
