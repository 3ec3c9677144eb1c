"""Files of what was learned: named tensors with the settings and class names, without the encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import BadWeights, ClipworksError
from ..registry import get_method, methods
from ..training.checkpoint import write_atomically

if TYPE_CHECKING:
    from .common import PromptMethod

KEY = "clipworks"


def write_learned(path: Any, method: PromptMethod, fingerprint: str) -> None:
    """Write the learned tensors of a fitted method as safetensors, with all that `read_learned` returns."""
    settings = {k: v for k, v in method.get_params(deep=False).items() if k not in ("encoder", "names")}
    record = {
        "format": 1,
        "method": _name(type(method)),
        "settings": settings,
        "names": list(method.names_),
        "labels": "numbers" if method.classes_.dtype.kind in "iu" else "names",
        "encoder": fingerprint,
    }
    tensors = {name: value.contiguous() for name, value in method.learned_.items()}
    write_atomically(Path(path), lambda file: save_file(tensors, file, metadata={KEY: json.dumps(record)}))


def _read(path: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Record and tensors of a file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            record = json.loads((file.metadata() or {}).get(KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    except (OSError, SafetensorError, ValueError) as error:
        raise BadWeights(f"{path} cannot be read: {error}.") from error
    if not isinstance(record, dict) or record.get("format") != 1:
        raise BadWeights(f"{path} holds no learned inputs of this library.")
    return record, tensors


def read_learned(
    path: Any, kind: type | None = None
) -> tuple[dict[str, Any], list[str], np.ndarray, dict[str, torch.Tensor], str]:
    """Return settings, class names, labels, learned tensors and the encoder's fingerprint of a file.

    Raises
    ------
    ClipworksError
        If the file is none of ours or holds another method than `kind`.
    """
    record, tensors = _read(path)
    if kind is not None and record["method"] != _name(kind):
        raise ClipworksError(f"path must hold {_name(kind)}. {path} holds {record['method']}.")
    names = record["names"]
    labels = np.arange(len(names)) if record["labels"] == "numbers" else np.array(names)
    return record["settings"], names, labels, tensors, record["encoder"]


def load_learned(path: Any, encoder: Any = None) -> PromptMethod:
    """Read a file of any method of this room; arguments as for its `load`."""
    return get_method(_read(path)[0]["method"]).load(path, encoder)


def _name(kind: type) -> str:
    found = [f"{m.area}/{m.name}" for m in methods("prompts") if m.object == kind.__name__]
    return found[0] if found else kind.__name__
