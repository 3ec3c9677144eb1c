"""`load`: from a name, a path or "hf:org/name" to an encoder; `models`: the names; `save`: one file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..errors import BadWeights, ClipworksError, UnknownName, check_range, closest, naming
from .encoder import Encoder
from .formats import files, hub, huggingface, native, open_clip, openai
from .formats.native import save
from .published import ARCHITECTURES, HUB

__all__ = ["load", "models", "resolve", "save"]

BUNDLED = Path(__file__).with_name("weights")
DEFAULT = "clipworks-small"
DEVICE = "CLIPWORKS_DEVICE"  # environment variable: where encoders go that are loaded without saying where
EXPORT = "clipworks-export.json"  # in a folder of another runtime, see `runtime.folder`


def resolve(encoder: str | os.PathLike | Encoder | None, argument: str = "encoder") -> Encoder:
    """Return the encoder that an argument (by default named `encoder`) means: None the bundled one, a name or path what
    `load` finds there, everything else itself."""
    if encoder is None:
        return load()
    if not isinstance(encoder, str | os.PathLike):
        return encoder
    with naming(argument):
        return load(encoder)


def load(
    name_or_path: str | os.PathLike = DEFAULT,
    *,
    device: str | torch.device | None = None,
    precision: str | None = None,
    sha256: str | None = None,
    image_size: int | None = None,
    runtime: str | None = None,
    images: Any = None,
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
        a path to a weights file, to a folder that holds one, or to one that `clipworks export` made,
        "ViT-B-32-quickgelu:weights.pt", an architecture of open_clip and a state dictionary without configuration
    device : where the weights go; "auto" is CUDA where there is one, else the CPU with the fastest runtime that is
        true to fp32 on `images` (torch in fp32 without them); default: what the environment variable
        CLIPWORKS_DEVICE says, else "cpu"
    precision : "fp32", "bf16", "fp16" or "auto" (see `precision.choose`); "int8" where the runtime has it (default:
        fp32; of an exported encoder its own; "auto" with another runtime)
    sha256 : expected digest of the weights file, 64 hexadecimal digits; checked before anything is parsed
    image_size : another side of the images in pixels; positions are interpolated
    runtime : "torch" (default), "openvino", "onnxruntime", or "auto" for the fastest of them; made anew in every
        process, so what is used often is better exported once (`encoders.runtime.export`)
    images : images of yours that another runtime is measured on before it is used, as `open_source` takes them

    Returns
    -------
    `Encoder` in evaluation mode

    Raises
    ------
    UnknownName
        If it is neither a name nor a path; the message offers the closest match.
    BadWeights
        If the file is damaged, is not safe to read, or has an unknown layout; the message says what was found.
    encoders.runtime.Refused
        If no form that was asked for is true to fp32.
    """
    named_by, device = ("device", device) if device is not None else (DEVICE, os.environ.get(DEVICE) or "cpu")
    path, architecture = _find(name_or_path)
    exported = path.is_dir() and (path / EXPORT).is_file()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and not exported else "cpu"
        runtime = runtime or ("auto" if device == "cpu" and images is not None else None)
    place = _device(device, named_by)
    if exported:
        return _exported(path, place, precision, sha256, image_size, runtime)
    if runtime not in (None, "torch"):
        if images is None or place.type != "cpu":
            raise ClipworksError(
                f"runtime {runtime!r} is used on the CPU, after it was measured: give images=, images of yours, "
                f"or export once (`clipworks export`) and load the folder. Got device {str(device)!r}, "
                f"images {images!r:.40}."
            )
        from .runtime import fit

        exact = load(name_or_path, sha256=sha256, image_size=image_size)
        return fit(exact, str(runtime), precision or "auto", images=images)
    encoder = _read(path, architecture, sha256)
    if image_size is not None:
        if not isinstance(image_size, int):
            raise ClipworksError(f"image_size must be a whole number of pixels. Got {image_size!r}.")
        check_range("image_size", image_size, encoder.config.vision.patch_size)
        encoder.resize(image_size=image_size)
    encoder.to(place).to_precision(precision or "fp32")
    name = os.fspath(name_or_path)
    known = os.path.abspath(name) if os.path.exists(name) and path.parent != BUNDLED else name
    return encoder if image_size is not None else encoder.loaded_from(known)


def _exported(
    folder: Path,
    place: torch.device,
    precision: str | None,
    sha256: str | None,
    image_size: int | None,
    runtime: str | None,
) -> Encoder:
    from .runtime import load_export

    if sha256 is not None or image_size is not None:
        raise ClipworksError(f"{folder} is an exported encoder: it has digests of its own, and one size of images.")
    encoder = load_export(folder)
    if runtime not in (None, "auto", encoder.runtime):
        raise ClipworksError(f"runtime of the export {str(folder)!r} is {encoder.runtime!r}. Got {runtime!r}.")
    return encoder.to(place).to_precision(precision or "auto")


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


def _device(device: str | torch.device, named_by: str) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).split("\n")[0].partition(" device type at start")[0]
        raise ClipworksError(
            f"{named_by} must name a device of this machine, or be 'auto'. Got {str(device)!r} ({reason[:120]})."
        ) from error
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
