"""`load`: from a name, a path or "hf:org/name" to an encoder; `models`: the names; `save`: one file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..errors import BadWeights, ClipworksError, UnknownName, check_range, closest
from .encoder import Encoder
from .formats import files, hub, huggingface, native, open_clip, openai
from .formats.native import save
from .published import ARCHITECTURES, HUB

__all__ = ["load", "models", "save"]

BUNDLED = Path(__file__).with_name("weights")
DEFAULT = "clipworks-small"


def load(
    name_or_path: str | os.PathLike = DEFAULT,
    *,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    sha256: str | None = None,
    image_size: int | None = None,
) -> Encoder:
    """Load an encoder with its tokenizer and its preprocessing.

    The layout is told from what the file holds: this library's own format, OpenAI's archives, open_clip's state
    dictionaries and Hugging Face's CLIP and SigLIP models. Nothing in a file is ever executed.

    Parameters
    ----------
    name_or_path : one of
        a bundled name (the default; needs no network),
        a published name of `models()`, such as "ViT-B-32/openai", if it is in the local Hugging Face cache,
        "hf:org/name" or "hf:org/name@revision", from that cache or else downloaded,
        a path to a weights file, or to a folder that holds one,
        "ViT-B-32-quickgelu:weights.pt", an architecture of open_clip and a state dictionary without configuration
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
    place = _device(device)
    encoder = _read(*_find(name_or_path), sha256)
    if image_size is not None:
        if not isinstance(image_size, int):
            raise ClipworksError(f"image_size must be a whole number of pixels. Got {image_size!r}.")
        check_range("image_size", image_size, encoder.config.vision.patch_size)
        encoder.resize(image_size=image_size)
    return encoder.to(place).to_precision(precision)


def models() -> list[dict[str, Any]]:
    """The encoders that have names.

    Returns
    -------
    dictionaries with name, source ("bundled", or the "hf:" address), dim, image_size and description
    """
    rows = []
    for path in sorted(BUNDLED.glob("*.safetensors")):
        config = native.read_config(path)
        rows.append((path.stem, "bundled", config.dim, config.vision.image_size, "comes with the package"))
    rows += [(name, f"hf:{repo}", dim, size, text) for name, (repo, dim, size, text) in HUB.items()]
    keys = ("name", "source", "dim", "image_size", "description")
    return [dict(zip(keys, row, strict=True)) for row in rows]


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).split("\n")[0]
        raise ClipworksError(f"device must name a device of this machine. Got {str(device)!r} ({reason}).") from error
    return place


def _find(name_or_path: str | os.PathLike) -> tuple[Path, str | None]:
    """The file or folder that is meant, and the architecture if one was named."""
    name = os.fspath(name_or_path)
    if not isinstance(name, str) or not name or "\0" in name:
        raise ClipworksError(f"name_or_path must be a name or a path. Got {name_or_path!r}.")
    bundled = BUNDLED / f"{name}.safetensors"
    if bundled.parent == BUNDLED and bundled.is_file():
        return bundled, None
    if name.startswith("hf:"):
        return hub.download(name.removeprefix("hf:")), None
    path = Path(name).expanduser()
    if path.exists():
        return path, None
    architecture, separator, rest = name.partition(":")
    if separator and architecture in ARCHITECTURES:
        if not Path(rest).expanduser().exists():
            raise ClipworksError(f"name_or_path: there is no file {rest!r} for the architecture {architecture!r}.")
        return Path(rest).expanduser(), architecture
    if name in HUB:
        folder = hub.cached(HUB[name][0])
        if folder is None:
            raise ClipworksError(
                f"{name!r} is not in the local Hugging Face cache, and nothing is downloaded unasked. "
                f"To download it: load('hf:{HUB[name][0]}')."
            )
        return folder, None
    raise UnknownName(_unknown(name))


def _unknown(name: str) -> str:
    if name in ARCHITECTURES:
        trained = [n for n in HUB if n.startswith(f"{name.removesuffix('-quickgelu')}/")]
        return (
            f"name_or_path {name!r} is an architecture, not trained weights. "
            + (f"Known weights: {', '.join(trained)}. " if trained else "")
            + f"A state dictionary is loaded by '{name}:path/to/file'."
        )
    first = name.partition(":")[0]
    if first != name and closest(first, ARCHITECTURES):
        return (
            f"name_or_path {name!r}: before the colon stands 'hf' or an architecture. "
            f"Got {first!r}.{closest(first, ARCHITECTURES)}"
        )
    names = [m["name"] for m in models()]
    return (
        "name_or_path must be a name of `clipworks models`, 'hf:org/name', or an existing path. "
        f"Got {name!r}.{closest(name, names)}"
    )


def _read(path: Path, architecture: str | None, sha256: str | None) -> Encoder:
    if path.is_dir():
        path = hub.weights_in(path)
    if path.name.endswith(".index.json"):
        if sha256 is not None:
            raise ClipworksError(f"sha256 needs a single weights file; {path} lists several.")
        tensors = files.read_shards(path)
    else:
        try:
            tensors = files.read(path, sha256)
        except OSError as error:
            raise BadWeights(f"{path} cannot be read: {error}.") from error
    if architecture is not None:
        if not open_clip.matches(tensors):
            raise BadWeights(
                f"an architecture goes with a state dictionary of open_clip's names. Found {tensors.describe()}."
            )
        return open_clip.load(tensors, architecture)
    for layout in (native, openai, huggingface, open_clip):
        if layout.matches(tensors):
            return layout.load(tensors)
    raise BadWeights(
        "unknown layout; known are this library's own, OpenAI's archives, open_clip's state dictionaries and Hugging "
        f"Face's CLIPModel and SiglipModel. Found {tensors.describe()}."
    )
