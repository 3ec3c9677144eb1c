"""From a configuration and named tensors to an encoder, with every name and shape checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ...errors import BadWeights
from ..config import EncoderConfig
from ..encoder import Encoder
from .keymap import few


class _NoDice(TorchFunctionMode):
    """Leave out random initial values: without memory they mean nothing, and torch imports its compiler for them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "normal_":  # torch.nn.init's and the tensor's own
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def blank(config: EncoderConfig, tokenizer: Any = None) -> Encoder:
    """An encoder of this shape without memory behind its weights."""
    with torch.device("meta"), _NoDice():
        return Encoder(config, tokenizer, seed=None)


def check_depth(config: EncoderConfig, count: int, where: str) -> None:
    """Refuse a configuration that asks for more layers than a file of `count` tensors can hold; building them would
    otherwise not end."""
    depths = [*([config.vision.layers] if isinstance(config.vision.layers, int) else config.vision.layers)]
    depths.append(config.text.layers)
    if not all(isinstance(d, int) and d >= 0 for d in depths) or sum(depths) > count:
        raise BadWeights(f"{where}: {count} tensors cannot be the layers {depths!r:.80} that the configuration names.")


def build(config: EncoderConfig, values: Mapping[str, torch.Tensor], tokenizer: Any, where: str) -> Encoder:
    """Make the encoder of a configuration from tensors under our names, in the precision that they have.

    Parameters
    ----------
    config : shapes
    values : our parameter name -> tensor; they are copied, so the file behind them may go
    tokenizer : as in `Encoder`
    where : what the tensors are called in errors

    Raises
    ------
    BadWeights
        For a missing or unexpected name, a wrong shape, or numbers that are not finite; all of them are counted
        and the first are named.
    """
    check_depth(config, len(values), where)
    try:
        encoder = blank(config, tokenizer)
    except (RuntimeError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise BadWeights(f"{where}: no encoder can be built from the configuration ({error!s:.200}).") from error
    wanted = encoder.state_dict()
    # a counter that nothing reads; not every file has it
    counters = {n: torch.tensor(0) for n in wanted if n.endswith("num_batches_tracked")}
    values = {**counters, **values}
    missing, extra = sorted(wanted.keys() - values.keys()), sorted(values.keys() - wanted.keys())
    if missing or extra:
        raise BadWeights(
            f"{where}: the tensors do not fit the configuration: missing {few(missing)}, unexpected {few(extra)}."
        )
    wrong = [
        f"{n} is {tuple(values[n].shape)}, expected {tuple(t.shape)}"
        for n, t in wanted.items()
        if values[n].shape != t.shape
    ]
    if wrong:
        raise BadWeights(f"{where}: the shapes do not fit the configuration: {few(wrong)}.")
    for name, tensor in values.items():
        if wanted[name].is_floating_point() != tensor.is_floating_point():
            raise BadWeights(f"{where}: {name} has the type {tensor.dtype}, expected {wanted[name].dtype}.")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise BadWeights(f"{where}: {name} holds numbers that are not finite.")
    copies = {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in values.items()}
    encoder.load_state_dict(copies, assign=True)
    return encoder.requires_grad_(True).eval()
