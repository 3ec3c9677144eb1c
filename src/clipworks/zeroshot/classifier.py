"""A classifier made of words: one vector per class from an ensemble of sentences about it.

Claim: with no training image, class names alone make a usable classifier, and averaging the embeddings of
several sentences per name is better than one sentence (ImageNet, ResNet-50: 58.2 % with one template, 60.3 % with
seven).

Formula: for class c with sentences s_1..s_T,  w_c = norm( sum_i norm(text(s_i)) );  the score of an image is
scale * <image, w_c>.

Paper: Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision (CLIP), 3.1.4.
Differs from the paper: nothing in the arithmetic; each distinct sentence is encoded once, however many classes
share it, and in chunks, so memory does not grow with the number of classes. The seven default templates are those
that forward selection kept in CLIP's published notebook.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..errors import ClipworksError, check_range
from ..registry import method
from .templates import resolve_templates

if TYPE_CHECKING:
    import torch

    from ..encoders.encoder import Encoder


@method(card="few-shot-foundations", level="M")
def class_vectors(
    names: Sequence[str],
    encoder: Encoder,
    *,
    templates: str | Sequence[str] = "default",
    chunk: int = 4096,
) -> torch.Tensor:
    """Return one unit vector per class name, the normalised mean of its sentences' unit vectors.

    Parameters
    ----------
    names : C distinct class names in words a reader would use ("golden retriever", not "n02099601")
    encoder : anything with `texts(list of str) -> (n, dim)` unit rows
    templates : name of a set, one template or several; default: the seven of CLIP's forward selection
    chunk : sentences encoded at a time (no effect on the result; 4096 keeps memory under about 10 MB at dim 512)

    Returns
    -------
    Tensor of shape (C, dim), float32, rows of length 1

    Raises
    ------
    ClipworksError
        If names is empty, holds a blank or a repeated name, or a template lacks `{}`.

    Inputs
    ------
    words only; no image and no label is seen

    Relations
    ---------
    With one template this is plain zero-shot CLIP. The rows start most few-shot heads (`text=`).

    References
    ----------
    Radford et al. 2021, Learning Transferable Visual Models From Natural Language Supervision

    Examples
    --------
    >>> import torch
    >>> class Toy:
    ...     def texts(self, sentences): return torch.eye(3)[[len(s) % 3 for s in sentences]]
    >>> class_vectors(["ox", "cat"], Toy(), templates=["{}", "a {}"])
    tensor([[0.0000, 0.7071, 0.7071],
            [0.7071, 0.0000, 0.7071]])
    """
    import torch

    names = check_names(names)
    check_range("chunk", chunk, 1)
    owners: dict[str, list[int]] = {}  # distinct sentence -> classes it speaks for
    for template in resolve_templates(templates):
        for index, name in enumerate(names):
            owners.setdefault(template.replace("{}", name), []).append(index)
    total: torch.Tensor | None = None
    for part in _chunks(owners.items(), chunk):
        vectors = torch.as_tensor(encoder.texts([sentence for sentence, _ in part])).float().cpu()
        rows = [row for row, (_, classes) in enumerate(part) for _ in classes]
        classes = torch.tensor([c for _, owned in part for c in owned])
        total = vectors.new_zeros(len(names), vectors.shape[1]) if total is None else total
        total.index_add_(0, classes, vectors[rows])
    return torch.nn.functional.normalize(total, dim=1)  # type: ignore[arg-type]


def check_names(names: Iterable[str]) -> list[str]:
    """Return class names as a list, or raise where they cannot be told apart."""
    if isinstance(names, str):
        raise ClipworksError(f"names must be a list of class names. Got the string {names!r}.")
    found = list(names)
    if not found:
        raise ClipworksError("names must hold at least one class name. Got none.")
    for name in found:
        if not isinstance(name, str) or not name.strip():
            raise ClipworksError(f"names must be words. Got {name!r}.")
    repeated = (
        sorted({name for name in found if found.count(name) > 1}) if len(set(found)) < len(found) else []
    )
    if repeated:
        raise ClipworksError(
            f"names must be distinct. Given more than once: {', '.join(map(repr, repeated[:5]))}."
        )
    return found


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part
