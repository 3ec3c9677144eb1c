"""clipworks: one house for everything that people do with CLIP. Public names load lazily, on first use."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> module that holds it (the only table; methods are discovered, see `registry`)
_PUBLIC = {
    "load": "encoders.loading",
    "models": "encoders.loading",
    "Encoder": "encoders.encoder",
    "Features": "types",
    "Ranking": "types",
    "embed": "store.embed",
    "Collection": "store.collection",
    "search": "store.search",
    "classify": "zeroshot.classify",
    "segment": "segment.segmenter",
    "inspect": "anomaly.inspection",
    "explain": "analysis.explain",
    "methods": "registry",
    "get_method": "registry",
    "BadImage": "errors",
    "BadWeights": "errors",
    "ClipworksError": "errors",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        from .errors import closest

        raise AttributeError(f"module 'clipworks' has no attribute {name!r}.{closest(name, _PUBLIC)}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
