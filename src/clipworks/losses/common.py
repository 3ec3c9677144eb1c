"""What the losses share: similarities in float32 or better, cross-entropies over rows, checks of shapes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..errors import ClipworksError, check_range

Scale = torch.Tensor | float


def wide(values: torch.Tensor) -> torch.Tensor:
    """Return the values in float32, or in float64 if they are that already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Return rows of length 1, in float32 or better; a row of zeros stays one."""
    return F.normalize(wide(rows), dim=-1)


def similarities(rows: torch.Tensor, columns: torch.Tensor, scale: Scale = 1.0) -> torch.Tensor:
    """Return `scale * rows @ columns.T` of shape (rows, columns), in float32 or better, also under autocast.

    bfloat16 keeps three digits: at a scale of 100 that is an error of about 0.3 in every logit.
    """
    with torch.autocast(rows.device.type, enabled=False):
        dtype = torch.promote_types(wide(rows).dtype, wide(columns).dtype)
        return scale * (rows.to(dtype) @ columns.to(dtype).T)


def own_columns(logits: torch.Tensor, offset: int = 0) -> torch.Tensor:
    """Return the column of every row's partner: its own number, moved by `offset`."""
    return torch.arange(len(logits), device=logits.device) + offset


def cross_entropy(
    logits: torch.Tensor, offset: int = 0, targets: torch.Tensor | None = None, smoothing: float = 0.0
) -> torch.Tensor:
    """Return the mean over rows of -sum_j target_ij log softmax(logits_i)_j.

    Parameters
    ----------
    logits : shape (n, columns)
    offset : row i belongs to column i + offset, where no targets are given
    targets : probabilities of shape (n, columns); rows sum to 1
    smoothing : share of the target that is spread evenly over all columns
    """
    if targets is None:
        return F.cross_entropy(logits, own_columns(logits, offset), label_smoothing=smoothing)
    if targets.shape != logits.shape:
        raise ClipworksError(f"targets must have the shape of the logits, {tuple(logits.shape)}. "
                             f"Got {tuple(targets.shape)}.")  # fmt: skip
    return F.cross_entropy(logits, targets.to(logits.dtype), label_smoothing=smoothing)


def check_rows(ndim: int = 2, least: int = 1, **named: torch.Tensor) -> None:
    """Raise unless all tensors have the same shape, `ndim` dimensions and at least `least` rows."""
    first, model = next(iter(named.items()))
    form = "(n, dim)" if ndim == 2 else "(n, k, dim)"
    for name, value in named.items():
        if value.ndim != ndim or not value.is_floating_point() or 0 in value.shape:
            raise ClipworksError(f"{name} must be a tensor of real numbers of shape {form}, not empty. "
                                 f"Got {value.dtype} of shape {tuple(value.shape)}.")  # fmt: skip
        if value.shape != model.shape:
            raise ClipworksError(f"{name} must have the shape of {first}, {tuple(model.shape)}. "
                                 f"Got {tuple(value.shape)}.")  # fmt: skip
    if len(model) < least:
        raise ClipworksError(f"{first} must have at least {least} rows. Got {len(model)}.")


def check_gathered(
    one: torch.Tensor,
    other: torch.Tensor,
    all_one: torch.Tensor | None,
    all_other: torch.Tensor | None,
    offset: int,
    first: str = "image",
    second: str = "text",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows to contrast with: the gathered ones, or the local ones where none are given.

    Raises
    ------
    ClipworksError
        If one side only is gathered, the sides do not fit, or the local rows do not lie within the gathered ones.
    """
    if (all_one is None) != (all_other is None):
        raise ClipworksError(f"all_{first} and all_{second} must be given together, or neither.")
    if all_one is None or all_other is None:
        all_one, all_other = one, other
    for name, rows, whole in ((first, one, all_one), (second, other, all_other)):
        if whole.shape[1:] != rows.shape[1:] or len(whole) != len(all_one):
            shape = ", ".join(str(size) for size in (len(all_one), *rows.shape[1:]))
            raise ClipworksError(f"all_{name} must have the shape ({shape}). Got {tuple(whole.shape)}.")
    check_range("offset", offset, 0, len(all_one) - len(one))
    return all_one, all_other
