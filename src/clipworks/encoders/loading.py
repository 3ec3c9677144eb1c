"""`load`: from a name, a path or "hf:org/name" to an encoder; `models`: the names; `save`: one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import BadWeights, ClipworksError, UnknownName, closest
from .encoder import Encoder
from .formats import files, native
from .formats.native import save

__all__ = ["load", "models", "save"]

BUNDLED = Path(__file__).with_name("weights")
DEFAULT = "clipworks-small"


def load(
    name_or_path: str | Path = DEFAULT,
    *,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    sha256: str | None = None,
    image_size: int | None = None,
) -> Encoder:
    """Load an encoder with its tokenizer and its preprocessing.

    Parameters
    ----------
    name_or_path : a bundled name (the default needs no network), or a path
    device : where the weights go
    precision : "fp32", "bf16", "fp16" or "auto" (see `precision.choose`)
    sha256 : expected digest of the weights file, 64 hexadecimal digits; checked before anything is parsed
    image_size : another side of the images in pixels; positions are interpolated

    Returns
    -------
    `Encoder` in evaluation mode

    Raises
    ------
    UnknownName
        If it is neither a name nor a path; the message offers the closest match.
    BadWeights
        If the file is damaged, is not safe to read, or has an unknown layout; the message says what was found.
    """
    place = check_device(device)
    encoder = _read(_find(name_or_path), sha256)
    if image_size is not None:
        encoder.resize(image_size=image_size)
    return encoder.to(place).to_precision(precision)


def models() -> list[dict[str, Any]]:
    """The encoders that can be loaded by name: dictionaries of name, source, dim, image_size, description."""
    found = []
    for path in sorted(BUNDLED.glob("*.safetensors")):
        config = native.read_config(path)
        found.append(_row(path.stem, "bundled", config, "comes with the package"))
    return found


def _row(name: str, source: str, config: Any, description: str) -> dict[str, Any]:
    return {"name": name, "source": source, "dim": config.dim, "image_size": config.vision.image_size,
            "description": description}  # fmt: skip


def check_device(device: str | torch.device) -> torch.device:
    """The device, after checking that this machine has it."""
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise ClipworksError(f"device must name a device of this machine. Got {str(device)!r} ({reason}).") from error
    return place


def _find(name_or_path: str | Path) -> Path:
    name = str(name_or_path)
    if (BUNDLED / f"{name}.safetensors").is_file() and Path(name).name == name:
        return BUNDLED / f"{name}.safetensors"
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    names = [m["name"] for m in models()]
    raise UnknownName(
        f"name_or_path must be a name of `clipworks models` or an existing path. Got {name!r}.{closest(name, names)}"
    )


def _read(path: Path, sha256: str | None) -> Encoder:
    tensors = files.read(path, sha256)
    if native.matches(tensors):
        return native.load(tensors)
    raise BadWeights(f"unknown layout: {tensors.describe()}.")
