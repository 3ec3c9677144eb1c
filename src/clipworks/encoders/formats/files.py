"""One door to every weights file: the kind is told from its first bytes, never from its name; nothing is
executed."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...errors import BadWeights
from . import archive, safe

MAX_JSON = 16 << 20


@dataclass
class Tensors:
    """Tensors of a file (or of the shards of a folder) with where they came from.

    Attributes
    ----------
    values : name -> tensor
    path : the file
    kind : "safetensors", "torchscript", "torch zip" or "torch legacy"
    metadata : text pairs of a safetensors file
    """

    values: dict[str, torch.Tensor]
    path: Path
    kind: str
    metadata: dict[str, str] = field(default_factory=dict)

    def describe(self, count: int = 6) -> str:
        """The first names and shapes, for errors about unknown layouts."""
        shown = ", ".join(f"{n} {tuple(t.shape)}" for n, t in list(self.values.items())[:count])
        more = " ..." if len(self.values) > count else ""
        return f"{len(self.values)} tensors in {self.path} ({self.kind}): {shown}{more}"


def read(path: Path, sha256: str | None = None) -> Tensors:
    """Read every tensor of one file.

    Parameters
    ----------
    path : safetensors, TorchScript archive or a file of `torch.save`
    sha256 : expected digest (64 hexadecimal digits); checked before anything is parsed

    Raises
    ------
    BadWeights
        For anything that is not one of these, is damaged, or wants to run something.
    """
    if sha256 is not None:
        check_digest(path, sha256)
    with path.open("rb") as file:
        head = file.read(16)
    if head[:4] == b"PK\x03\x04":
        box = archive.Archive(path)
        return Tensors(_unwrap(box.tensors()), path, "torchscript" if box.is_torchscript else "torch zip")
    if path.suffix == ".safetensors" or safe.looks_like(head):
        values, metadata = safe.read(path)
        return Tensors(values, path, "safetensors", metadata)
    if head[:1] == b"\x80":
        return Tensors(_unwrap(_legacy(path)), path, "torch legacy")
    raise BadWeights(
        f"{path}: neither safetensors nor a file of torch.save or torch.jit.save. It starts with {head[:8]!r}."
        + (" This is a pointer of git-lfs: fetch the file itself." if head.startswith(b"version https:") else "")
    )


def check_digest(path: Path, sha256: str) -> None:
    """Compare the SHA-256 of a file, or raise showing both."""
    if not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise BadWeights(f"sha256 must be 64 hexadecimal digits. Got {sha256!r}.")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != sha256.lower():
        raise BadWeights(f"{path}: its sha256 is {digest.hexdigest()}, expected {sha256.lower()}.")


def _legacy(path: Path) -> dict[str, torch.Tensor]:
    """Files of torch before 1.6, through torch's own restricted reader (`weights_only`)."""
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, which say nothing to the user
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the restricted reader raise nearly anything
        reason = str(error).split("\n")[0][:300]
        raise BadWeights(f"{path}: refused by torch's restricted reader, nothing was run ({reason}).") from error
    return _flatten(loaded, path)


def _flatten(value: Any, path: Path) -> dict[str, torch.Tensor]:
    if not isinstance(value, dict):
        raise BadWeights(f"{path}: holds a {type(value).__name__}, expected a dictionary of tensors.")
    flat: dict[str, torch.Tensor] = {}
    for name, entry in value.items():
        if isinstance(entry, torch.Tensor):
            flat[str(name)] = entry
        elif isinstance(entry, dict):
            flat |= {f"{name}.{n}": t for n, t in entry.items() if isinstance(t, torch.Tensor)}
    return flat


def _unwrap(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop the wrappers of training checkpoints: a "state_dict" entry, and "module." of data-parallel
    models."""
    if any(n.startswith("state_dict.") for n in values):
        values = {n.removeprefix("state_dict."): t for n, t in values.items() if n.startswith("state_dict.")}
    if values and all(n.startswith("module.") for n in values):
        values = {n.removeprefix("module."): t for n, t in values.items()}
    return values


def read_shards(index: Path) -> Tensors:
    """Read the shards that a `*.index.json` file lists; every shard must lie beside it."""
    names = read_json(index).get("weight_map", {})
    if not isinstance(names, dict) or not names:
        raise BadWeights(f"{index}: has no weight_map.")
    values: dict[str, torch.Tensor] = {}
    kind = ""
    for shard in sorted(set(names.values())):
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", ".", ".."):
            raise BadWeights(f"{index}: shard {shard!r} must be a file name in the same folder.")
        if not (index.parent / shard).is_file():
            raise BadWeights(f"{index}: the shard {shard!r} is missing.")
        part = read(index.parent / shard)
        values |= part.values
        kind = part.kind
    return Tensors(values, index, kind)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of sane size."""
    if path.stat().st_size > MAX_JSON:
        raise BadWeights(f"{path} has {path.stat().st_size} bytes, at most {MAX_JSON} are read.")
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadWeights(f"{path} is not JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise BadWeights(f"{path} must hold a JSON object. Got {type(loaded).__name__}.")
    return loaded
