"""A slow copy of the weights: `slow <- decay * slow + (1 - decay) * fast` after every optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import ClipworksError, check_range


class EMA:
    """Exponential moving average of a module's parameters, kept in at least float32.

    Floating buffers (batch-norm statistics) are averaged as well, whole numbers and frozen parameters
    are copied.

    Parameters
    ----------
    module : the module; its present state is the start
    decay : in [0, 1]; 1 never moves, 0 copies. Usual: 0.996 to 0.9999

    Attributes
    ----------
    state : dict of the averaged tensors, by name
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = check_range("decay", decay, 0.0, 1.0)
        self.state = {name: _wide(value).clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the module's state after an optimizer step."""
        still = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
        for name, value in module.state_dict().items():
            slow = self.state[name]
            if value.is_floating_point() and name not in still:
                # not lerp: m * slow + (1 - m) * fast is exact at m = 0 and m = 1
                slow.mul_(self.decay).add_(value.to(slow.dtype), alpha=1 - self.decay)
            else:
                slow.copy_(value)

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Replace the averaged tensors by those of `state`."""
        if missing := sorted(set(self.state) - set(state)):
            raise ClipworksError(f"state lacks {len(missing)} of the averaged tensors, for example {missing[0]!r}.")
        for name, slow in self.state.items():
            slow.copy_(state[name])

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Let the module work with the averaged weights inside a `with` block."""
        current = module.state_dict()
        fast = {name: value.clone() for name, value in current.items()}
        try:
            _copy(self.state, current)
            yield
        finally:
            _copy(fast, current)


def _wide(value: torch.Tensor) -> torch.Tensor:
    value = value.detach()
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


@torch.no_grad()
def _copy(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> None:
    for name, value in target.items():
        value.copy_(source[name])
