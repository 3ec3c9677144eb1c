"""The format of this library: one safetensors file that holds weights, configuration, preprocessing and tokenizer.

The tensors have the names of `Encoder.state_dict()`. The metadata has the one entry "clipworks", a JSON object with
`version`, `config` (preprocessing included) and `tokenizer`. One entry, since the order of several is not kept and
the same encoder shall give the same bytes.

A weight may be stored in eight bits: `name` as int8 and `name.scale` with one float per row (the first axis; the
other axes of a convolution count as columns), value = int8 * scale.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch

from ...atomic import write_atomically
from ...errors import BadWeights, ClipworksError, check_choice
from ..config import EncoderConfig
from ..encoder import Encoder
from ..tokenizers.bpe import CLIPTokenizer
from ..tokenizers.pretrained import NoTokenizer, PretrainedTokenizer
from . import safe
from .build import blank, build
from .files import Tensors
from .keymap import few

KEY, VERSION = "clipworks", 1
SCALE = ".scale"


def matches(tensors: Tensors) -> bool:
    """Whether the file was written by `save`."""
    return KEY in tensors.metadata


def load(tensors: Tensors) -> Encoder:
    """The encoder in a file of this format."""
    record = _record(tensors.metadata, tensors.path)
    try:
        config = EncoderConfig.from_dict(record["config"])
    except ClipworksError as error:
        raise BadWeights(f"{tensors.path}: {error}") from error
    tokenizer = read_tokenizer(record.get("tokenizer"), tensors.path)
    return build(config, expand(tensors.values, str(tensors.path)), tokenizer, str(tensors.path))


def read_config(path: Path) -> EncoderConfig:
    """The configuration alone, from the header of the file; no tensor is read."""
    return EncoderConfig.from_dict(_record(safe.header(path)[1], path)["config"])


def _record(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    try:
        record = json.loads(metadata[KEY])
        version = record["version"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise BadWeights(f"{path}: its metadata entry {KEY!r} is missing or damaged ({error!r:.80}).") from error
    if version != VERSION:
        raise BadWeights(f"{path}: written in version {version!r:.20} of the format, this library reads {VERSION}.")
    if not isinstance(record.get("config"), dict):
        raise BadWeights(f"{path}: its metadata has no configuration.")
    return record


def save(encoder: Encoder, path: str | os.PathLike, quantize: str | None = None) -> Path:
    """Write an encoder into one file that `load` reads back.

    Weights, configuration, preprocessing and tokenizer travel together; without `quantize` the loaded encoder has
    the same fingerprint. The file is written beside its place and moved there when it is complete.

    Parameters
    ----------
    encoder : its towers must have the modules of its configuration (merge adapters before)
    path : file to write, conventionally `.safetensors`
    quantize : "int8" stores weight matrices in eight bits with one scale per row (about a quarter of the size,
        each weight within 1/254 of the largest one of its row); None stores them as they are

    Returns
    -------
    the path

    Raises
    ------
    ClipworksError
        If modules were added or replaced, the tokenizer is of a foreign class, or the path cannot be written.
    """
    from safetensors.torch import save as serialise

    check_choice("quantize", quantize, (None, "int8"))
    path = Path(path)
    config = encoder.config
    preprocess = getattr(encoder.preprocess, "config", config.preprocess)
    if preprocess != config.preprocess:
        config = dataclasses.replace(config, preprocess=preprocess)
    values = {n: t.detach().cpu().contiguous() for n, t in encoder.state_dict().items()}
    _check_structure(encoder, values)
    if quantize:
        values = shrink(values)
    record = {"version": VERSION, "config": config.to_dict(), "tokenizer": write_tokenizer(encoder.tokenizer)}
    metadata = {KEY: json.dumps(record, sort_keys=True)}
    # clones: safetensors refuses tensors that share memory, and two names may well share it in a tied model
    data = serialise({n: t.clone() for n, t in values.items()}, metadata=metadata)
    try:
        write_atomically(path, lambda file: file.write_bytes(data))
    except OSError as error:
        raise ClipworksError(f"path {str(path)!r} cannot be written: {error} ({len(data)} bytes needed).") from error
    return path


def _check_structure(encoder: Encoder, values: dict[str, torch.Tensor]) -> None:
    wanted = blank(encoder.config).state_dict()
    extra, missing = sorted(values.keys() - wanted.keys()), sorted(wanted.keys() - values.keys())
    wrong = [n for n in wanted.keys() & values.keys() if wanted[n].shape != values[n].shape]
    if extra or missing or wrong:
        raise ClipworksError(
            "encoder must have the modules of its configuration to be saved; merge or undo what was swapped in. "
            f"Added {few(extra)}, missing {few(missing)}, other shapes {few(sorted(wrong))}."
        )


# -- eight bits ----------------------------------------------------------------------------------------------------


def shrink(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Store every floating ".weight" of two or more axes in eight bits; the rest stays.

    >>> small = shrink({"a.weight": torch.tensor([[1.0, -0.5], [0.0, 0.0]])})
    >>> small["a.weight"].tolist(), small["a.weight.scale"].shape
    ([[127, -64], [0, 0]], torch.Size([2]))
    """
    out: dict[str, torch.Tensor] = {}
    for name, tensor in values.items():
        if not (name.endswith(".weight") and tensor.ndim >= 2 and tensor.is_floating_point()):
            out[name] = tensor
            continue
        rows = tensor.float().flatten(1)
        scale = rows.abs().amax(1) / 127
        scale[scale == 0] = 1.0
        out[name] = (rows / scale[:, None]).round().clamp(-127, 127).to(torch.int8).reshape(tensor.shape)
        out[name + SCALE] = scale
    return out


def expand(values: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """Undo `shrink`: int8 tensors become float32, their scales go."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in values.items():
        if name.endswith(SCALE) and name.removesuffix(SCALE) in values:
            continue
        if tensor.dtype == torch.int8:
            scale = values.get(name + SCALE)
            if scale is None or not scale.is_floating_point() or tensor.ndim < 2 or scale.shape != tensor.shape[:1]:
                found = "none" if scale is None else f"{scale.dtype} of shape {tuple(scale.shape)}"
                raise BadWeights(
                    f"{where}: {name} is int8 of shape {tuple(tensor.shape)} and needs the scale {name + SCALE} with "
                    f"one number per row. Found {found}."
                )
            tensor = (tensor.flatten(1).float() * scale.float()[:, None]).reshape(tensor.shape)
        out[name] = tensor
    return out


# -- tokenizer -----------------------------------------------------------------------------------------------------


def write_tokenizer(tokenizer: Any) -> dict[str, Any] | None:
    """What a file says of a tokenizer, ready for JSON."""
    if tokenizer is None:
        return None
    if isinstance(tokenizer, CLIPTokenizer):
        return {"kind": "clip-bpe", "pad_id": tokenizer.pad_id}
    if isinstance(tokenizer, PretrainedTokenizer):
        return {"kind": "json", "file": tokenizer.data.decode("utf-8"), "options": tokenizer.options()}
    if isinstance(tokenizer, NoTokenizer):
        names = ("looked_for", "vocab_size", "eot_id", "pad_id", "fixed_length")
        return {"kind": "missing", "options": {n: getattr(tokenizer, n) for n in names}}
    raise ClipworksError(
        f"encoder.tokenizer must be a CLIPTokenizer or PretrainedTokenizer to be saved. Got {type(tokenizer).__name__}."
    )


def read_tokenizer(record: Any, path: Path) -> Any:
    """The tokenizer that such an entry describes; `path` is what errors name."""
    if record is None:
        return None
    try:
        kind = record["kind"]
        if kind == "clip-bpe":
            return CLIPTokenizer(int(record["pad_id"]))
        if kind == "json":
            return PretrainedTokenizer(record["file"].encode("utf-8"), **record["options"])
        if kind == "missing":
            return NoTokenizer(**record["options"])
    except BadWeights as error:
        raise BadWeights(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadWeights(f"{path}: its tokenizer entry is damaged ({error!r:.120}).") from error
    raise BadWeights(f"{path}: unknown kind of tokenizer {kind!r:.40}, this library knows clip-bpe, json and missing.")
