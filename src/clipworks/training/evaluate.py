"""Zero-shot accuracy and retrieval recall while training, on every process's share of the validation set.

Shares are interleaved, padded to equal length for the exchange and cut again, so that no sample counts twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ..errors import ClipworksError, closest
from ..zeroshot.classifier import class_vectors
from .augment import view
from .feed import open_items
from .gather import processes, rank
from .towers import to_device

if TYPE_CHECKING:
    from ..data.item import Item
    from ..encoders.encoder import Encoder

CUTOFFS = (1, 5, 10)
_NO_DRAWS = np.random.default_rng(0)  # a plain view draws nothing


@dataclass
class Probe:
    """A validation set with what is measured on it.

    Attributes
    ----------
    items : images, with labels, captions or both
    names : class name in words of every label, or None without labels
    templates : sentences around the names
    """

    items: list[Item]
    names: dict[str, str] | None
    templates: str | Sequence[str] = "default"

    @classmethod
    def open(
        cls,
        data: Any,
        names: Iterable[str] | Mapping[str, str] | None,
        templates: str | Sequence[str] = "default",
        argument: str = "validation",
    ) -> Probe:
        """Open a validation set, which messages call by the name of the `argument`; without `names`, the labels are
        taken as names.

        Raises
        ------
        ClipworksError
            If the items have neither labels nor captions, or a label is not among the names.
        """
        items = open_items(data, argument)
        labels = [item.label for item in items if item.label]
        if not labels and names is not None:
            raise ClipworksError(f"names need labels, and {argument} has none.")
        if len(labels) < len(items) and not all(item.caption for item in items):
            raise ClipworksError(f"{argument} must give every image a label, or every image a caption.")
        if len(labels) < len(items):
            return cls(items, None, templates)
        table = dict(names) if isinstance(names, Mapping) else {n: n for n in names or sorted(set(labels))}
        if unknown := sorted(set(labels) - set(table)):
            hint = closest(unknown[0], table)
            raise ClipworksError(f"names must hold every label of {argument}. Missing: {unknown[0]!r}.{hint}")
        return cls(items, table, templates)


def change_rows(**measures: Mapping[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """One dictionary per measure: which set, what, before, after, change; of set -> name -> (before, after)."""
    return [
        {"set": where, "measure": name, "before": round(before, 2), "after": round(after, 2),
         "change": round(after - before, 2)}
        for where, found in measures.items()
        for name, (before, after) in found.items()
    ]  # fmt: skip


@torch.no_grad()
def evaluate(
    model: nn.Module, encoder: Encoder, probe: Probe, *, batch_size: int = 64, pool: Executor | None = None
) -> dict[str, float]:
    """Return `zeroshot_accuracy` and `zeroshot_mean_per_class` (labels), `image_to_text_recall@K` and back (captions).

    Parameters
    ----------
    model : the wrapped towers; every process must call
    encoder : its tokenizer and preprocessing
    probe : what to measure
    batch_size : rows per forward pass and process
    pool : decoding threads
    """
    device = next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    training = model.training
    model.eval()

    def features(values: Sequence[Any], make: Callable[[Sequence[Any]], dict[str, Any]], side: str) -> torch.Tensor:
        share = _share(len(values))
        parts = []
        for start in range(0, len(share), batch_size):
            batch = to_device(make([values[i] for i in share[start : start + batch_size]]), device, dtype)
            parts.append(nn.functional.normalize(model(batch, "encode")[side], dim=1))
        return _joined(torch.cat(parts), len(values))

    def pixels(items: Sequence[Item]) -> dict[str, Any]:
        run = map if pool is None else pool.map
        views = run(lambda item: view(item, encoder.preprocess, None, _NO_DRAWS), items)
        return {"pixels": torch.stack(list(views))}

    def words(texts: Sequence[str]) -> dict[str, Any]:
        return {"tokens": encoder.tokenize(list(texts))}

    found: dict[str, float] = {}
    image = features(probe.items, pixels, "image")
    if probe.names is not None:
        sentences = _Words(lambda texts: features(texts, words, "text"))
        classes = class_vectors(list(probe.names.values()), sentences, templates=probe.templates)  # type: ignore[arg-type]
        index = {label: i for i, label in enumerate(probe.names)}
        target = np.array([index[str(item.label)] for item in probe.items])
        found |= zeroshot(image.numpy(), classes.numpy(), target)
    if all(item.caption for item in probe.items):
        captions = list(dict.fromkeys(str(item.caption) for item in probe.items))
        place = {caption: i for i, caption in enumerate(captions)}
        owner = np.array([place[str(item.caption)] for item in probe.items])
        found |= recalls(image.numpy(), features(captions, words, "text").numpy(), owner)
    model.train(training)
    return found


def zeroshot(image: np.ndarray, classes: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Return accuracy and mean accuracy per class in percent, from unit rows."""
    hit = (image @ classes.T).argmax(1) == target
    per_class = [hit[target == c].mean() for c in np.unique(target)]
    return {"zeroshot_accuracy": 100 * float(hit.mean()), "zeroshot_mean_per_class": 100 * float(np.mean(per_class))}


def recalls(
    image: np.ndarray, text: np.ndarray, owner: np.ndarray, cutoffs: Sequence[int] = CUTOFFS
) -> dict[str, float]:
    """Return recall@K in percent in both directions.

    Parameters
    ----------
    image : unit rows of the images, shape (n, dim)
    text : unit rows of the distinct captions, shape (m, dim)
    owner : caption of every image, shape (n,); images that share a caption are all right answers to it
    cutoffs : the values of K
    """
    first = {"image_to_text": np.empty(len(image), int), "text_to_image": np.empty(len(text), int)}
    for start in range(0, len(image), 1024):
        scores = image[start : start + 1024] @ text.T
        own = scores[np.arange(len(scores)), owner[start : start + 1024]]
        first["image_to_text"][start : start + 1024] = (scores > own[:, None]).sum(1)
    for start in range(0, len(text), 1024):
        scores = text[start : start + 1024] @ image.T
        mine = owner[None] == np.arange(start, start + len(scores))[:, None]
        best = np.where(mine, scores, -np.inf).max(1)
        first["text_to_image"][start : start + 1024] = (scores > best[:, None]).sum(1)
    return {f"{way}_recall@{k}": 100 * float((ranks < k).mean()) for way, ranks in first.items() for k in cutoffs}


@dataclass
class _Words:
    """The text side in the shape that `class_vectors` asks of an encoder."""

    texts: Callable[[Sequence[str]], torch.Tensor]


def _share(count: int) -> list[int]:
    """Return this process's rows, every `processes()`-th, padded by the last to the same number everywhere."""
    each = -(-count // processes())
    return [min(rank() + i * processes(), count - 1) for i in range(each)]


def _joined(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Put the shares of all processes back into the order of the set, on the CPU in float32."""
    if processes() > 1:
        parts = [torch.empty_like(rows) for _ in range(processes())]
        dist.all_gather(parts, rows.contiguous())
        rows = torch.stack(parts, 1).flatten(0, 1)[:count]
    return rows.float().cpu()
