"""Files of learned inputs: named tensors with the settings and class names, without the encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import BadWeights, ClipworksError
from ..registry import get_method, methods
from ..training import learned

if TYPE_CHECKING:
    from .common import PromptMethod

KEY, FORMAT = "clipworks", 1


def write_learned(path: Any, method: PromptMethod, fingerprint: str) -> None:
    """Write the learned tensors of a fitted method as safetensors, with all that `read_learned` returns."""
    settings = {k: v for k, v in method.get_params(deep=False).items() if k not in ("encoder", "names")}
    record = {
        "format": FORMAT,
        "method": _name(type(method)),
        "settings": settings,
        "names": list(method.names_),
        "labels": "numbers" if method.classes_.dtype.kind in "iu" else "names",
        "encoder": fingerprint,
    }
    learned.write_learned(path, KEY, record, method.learned_)


def _read(path: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Record and tensors of a file."""
    record, tensors = learned.read_learned(path, KEY, "learned inputs")
    if record.get("format") != FORMAT:
        raise BadWeights(f"{path} is of format {record.get('format')!r:.20}, this library reads {FORMAT}.")
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
