"""Which pixels a name means: dense features, windows, background, refinement. Calling the package segments an image."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    """`clipworks.segment` is a package and a task; whichever is imported first, it can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `clipworks.segment.segmenter.segment`."""
        from .segmenter import segment

        return segment(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
