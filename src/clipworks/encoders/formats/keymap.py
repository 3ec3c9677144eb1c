"""One list per layout says which of our parameters is which of theirs; it is read in both directions.

Every layout (`openai`, `open_clip`, `huggingface`) gives a list of `Pair`s, made from the configuration, and
the two functions here carry tensors across: `take` into our names (fused query-key-value matrices are split),
`give` back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from ...errors import BadWeights

# entries of other libraries that hold no learned numbers
IGNORED = ("position_ids", "attn_mask", "input_resolution", "context_length", "vocab_size")


@dataclass(frozen=True)
class Pair:
    """Our parameter(s) and theirs.

    Attributes
    ----------
    ours : one name, or several that are joined along the first axis in their file (q, k, v)
    theirs : the name in their file
    transpose : they store a matrix as (in, out), we as (out, in)
    lead : how many axes of length one they put in front of ours
    """

    ours: tuple[str, ...]
    theirs: str
    transpose: bool = False
    lead: int = 0


def one(ours: str, theirs: str, *, transpose: bool = False, lead: int = 0) -> Pair:
    """A pair with a single parameter on our side."""
    return Pair((ours,), theirs, transpose, lead)


def both(ours: str, theirs: str) -> Iterator[Pair]:
    """Weight and bias of one module."""
    yield one(f"{ours}.weight", f"{theirs}.weight")
    yield one(f"{ours}.bias", f"{theirs}.bias")


def fused(ours: str, parts: Iterable[str], theirs: str, separator: str = "_") -> Iterator[Pair]:
    """Weight and bias of several linears stored as one, e.g. `in_proj_weight` or `qkv.weight`."""
    for kind in ("weight", "bias"):
        yield Pair(tuple(f"{ours}.{p}.{kind}" for p in parts), f"{theirs}{separator}{kind}")


def take(pairs: Iterable[Pair], theirs: Mapping[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    """Translate their tensors into our names.

    Raises
    ------
    BadWeights
        If one is missing, one is left over, or a shape does not allow the split; `what` describes the file.
    """
    left = {n for n in theirs if n.rsplit(".", 1)[-1] not in IGNORED}
    taken: dict[str, torch.Tensor] = {}
    missing = []
    for pair in pairs:
        tensor = theirs.get(pair.theirs)
        if tensor is None:
            missing.append(pair.theirs)
            continue
        left.discard(pair.theirs)
        if tensor.shape[: pair.lead] != (1,) * pair.lead:
            raise BadWeights(f"{pair.theirs} has the shape {tuple(tensor.shape)}, not one in front. {what}")
        tensor = tensor.reshape(tensor.shape[pair.lead :])
        if pair.transpose and tensor.ndim == 2:  # any other shape is named when it is compared
            tensor = tensor.T
        if len(pair.ours) > 1 and (not tensor.ndim or tensor.shape[0] % len(pair.ours)):
            raise BadWeights(
                f"{pair.theirs} of shape {tuple(tensor.shape)} does not split into {len(pair.ours)}. {what}"
            )
        parts = tensor.chunk(len(pair.ours)) if len(pair.ours) > 1 else (tensor,)
        taken.update(zip(pair.ours, parts, strict=True))
    if missing or left:
        raise BadWeights(
            f"the tensors do not fit the configuration: missing {few(missing)}, unexpected {few(sorted(left))}. {what}"
        )
    return taken


def give(pairs: Iterable[Pair], ours: Mapping[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    """Translate our tensors into their names.

    Raises
    ------
    BadWeights
        If the encoder has parameters that this layout has no place for.
    """
    left = set(ours)
    given: dict[str, torch.Tensor] = {}
    for pair in pairs:
        absent = [n for n in pair.ours if n not in ours]
        if absent:
            raise BadWeights(f"this encoder has no {absent[0]}, which the {what} layout needs.")
        left -= set(pair.ours)
        parts = [ours[n].detach() for n in pair.ours]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        tensor = tensor.T if pair.transpose else tensor
        tensor = tensor.reshape((1,) * pair.lead + tuple(tensor.shape))
        given[pair.theirs] = tensor.contiguous()
    if left:
        raise BadWeights(f"the {what} layout has no place for {few(sorted(left))} of this encoder.")
    return given


def depth(names: Iterable[str], prefix: str) -> int:
    """How many numbered children `prefix` has ("prefix.0...", "prefix.1..." -> 2)."""
    found = {n[len(prefix) :].split(".", 1)[0] for n in names if n.startswith(prefix)}
    return len({f for f in found if f.isdigit()})


def few(names: list[str]) -> str:
    """The first five of a list, for errors."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
