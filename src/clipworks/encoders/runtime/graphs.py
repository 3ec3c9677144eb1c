"""From the towers of an encoder to graphs without Python, from which both runtimes are made.

`torch.export` follows one pass with the number of rows (and of tokens) left open. The graphs return what the towers
return: vectors of the joint space, not yet brought to length one.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...errors import ClipworksError

if TYPE_CHECKING:
    from ..encoder import Encoder

TOWERS = {"image": "pixels", "text": "tokens"}  # the graphs of a folder, and what they are given
MOST_ROWS = 1 << 16


class _Image(nn.Module):
    def __init__(self, encoder: Encoder):
        super().__init__()
        self.tower = encoder.visual

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.tower(pixels).float()


class _Text(nn.Module):
    def __init__(self, encoder: Encoder):
        super().__init__()
        self.tower = encoder.text

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.tower(tokens, cut=False).float()


def program(encoder: Encoder, tower: str) -> torch.export.ExportedProgram:
    """Trace one tower.

    Parameters
    ----------
    encoder : in fp32 on the CPU
    tower : "image" or "text"

    Raises
    ------
    ClipworksError
        If the tower holds something that cannot be traced, as swapped-in modules may.
    """
    rows = torch.export.Dim("rows", min=2, max=MOST_ROWS)
    module: nn.Module
    if tower == "image":
        module, side = _Image(encoder), encoder.image_size
        given, shapes = torch.zeros(2, 3, side, side), {0: rows}
    else:
        module, text = _Text(encoder), encoder.config.text
        length = min(encoder.context_length, 7)
        given = torch.full((2, length), text.pad_id)
        given[:, :-1] = torch.arange(length - 1) % text.vocab_size
        given[:, -1] = text.eot_id
        shapes = {0: rows}
        if text.pool != "last":  # the last position is read: such texts always fill the context
            shapes[1] = torch.export.Dim("length", min=2, max=encoder.context_length)
        else:
            given = torch.nn.functional.pad(given, (0, encoder.context_length - length), value=text.pad_id)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(module.eval(), (given,), dynamic_shapes=(shapes,), strict=False)
    except Exception as error:  # the tracer raises many kinds, of torch's inner workings
        reason = str(error).strip().split("\n")[0][:200]
        raise ClipworksError(f"the {tower} tower of this encoder cannot be exported ({reason}).") from error
