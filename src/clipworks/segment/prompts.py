"""Masks of a promptable model in the place of coarse ones: the last stage of Trident, a refinement for `segment`.

Every region of the coarse mask becomes a prompt: its box, its surest pixel, its scores. Where the model is sure of its
mask, the class's score there is sigmoid(mask) times the coarse one; where it is not, the coarse scores stay.

Shi, Dong and Xu 2025, Harnessing Vision Foundation Models for High-Performance, Training-Free Open Vocabulary
Segmentation (ICCV).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import check_range, need
from .affinity import pretrained

# from a box (left, top, right, bottom), a point (x, y) and scores (H, W), any of which may be None, to the logits of a
# mask (H, W) and their IoU
Predict = Callable[
    ["tuple[int, int, int, int] | None", "tuple[int, int] | None", "torch.Tensor | None"], "tuple[torch.Tensor, float]"
]
FAINT = 0.005  # factor of the scores that are handed over as a mask (release)


class Prompted:
    """A refinement for `segment(refine=...)`.

    Parameters
    ----------
    model : from an image (3, H, W) in [0, 255] to a function that answers prompts (`Predict`), such as `open_sam(name)`
    threshold : probability below which a pixel belongs to no region (release: 0.05 to 0.25 by data set)
    smallest : pixels of a region that is asked about (release: 225)
    sure : IoU, as the model predicts it, from which on its mask is taken (release: 0.8)

    Examples
    --------
    >>> def model(image):
    ...     return lambda box, point, scores: (torch.full(image.shape[1:], 9.0), 1.0)
    >>> Prompted(model, smallest=1)(torch.zeros(3, 2, 2), torch.full((1, 2, 2), 0.5)).mean()
    tensor(0.4999)
    """

    def __init__(
        self,
        model: Callable[[torch.Tensor], Predict],
        threshold: float = 0.2,
        smallest: int = 225,
        sure: float = 0.8,
    ):
        self.model, self.threshold = model, check_range("threshold", threshold, 0, 1)
        self.smallest, self.sure = check_range("smallest", smallest, 1), check_range("sure", sure, 0, 1)

    def __call__(self, image: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (K, H, W) of an image, refined; pixels that no region reaches keep theirs."""
        from scipy.ndimage import find_objects, label

        predict = self.model(image)
        best, owner = scores.max(0)
        made = torch.zeros_like(scores)
        for index, score in enumerate(scores):
            places = (owner == index) & (best >= self.threshold)
            numbers, count = label(places.cpu().numpy(), torch.ones(3, 3).numpy())
            regions = torch.from_numpy(numbers)
            for number, (rows, columns) in enumerate(find_objects(numbers)[:count], start=1):
                region = regions == number
                if int(region.sum()) < self.smallest:
                    continue
                inside = torch.where(region, score, -1.0)
                y, x = divmod(int(inside.argmax()), score.shape[1])
                box = (columns.start, rows.start, columns.stop - 1, rows.stop - 1)
                logits, quality = predict(box, (x, y), FAINT * torch.where(score >= self.threshold, score, 0.0))
                if quality > self.sure:
                    new = logits.sigmoid() * score * (logits > 0)
                else:
                    new = torch.where(region, score, 0.0)
                made[index] = torch.maximum(made[index], new.to(made))
        return torch.where(made.amax(0) > 0, made, scores)


class Promptable(ABC):
    """A SAM, whatever runs it; an image is encoded once for all its prompts.

    Attributes
    ----------
    size : side of the square that it sees
    coarse : side of the masks that it takes and gives
    """

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    size: int
    coarse: int

    @abstractmethod
    def encode(self, image: torch.Tensor) -> Any:
        """Embeddings of an image (1, 3, height, width) in [0, 1], the longer side of which is `size`."""

    @abstractmethod
    def decode(
        self, embeddings: Any, box: list[float] | None, point: list[float] | None, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, float]:
        """Logits (coarse, coarse) and IoU at prompts in pixels of the square; `mask` is (1, 1, coarse, coarse)."""

    def padded(self, image: torch.Tensor) -> torch.Tensor:
        """The normalised square (1, 3, size, size) of what `encode` is given."""
        mean, std = (image.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        height, width = image.shape[-2:]
        return F.pad((image - mean) / std, (0, self.size - width, 0, self.size - height))

    def __call__(self, image: torch.Tensor) -> Predict:
        """Encode an image (3, H, W) in [0, 255]; the longer side is brought to SAM's size."""
        height, width = image.shape[-2:]
        factor = self.size / max(height, width)
        tall, wide = max(1, round(height * factor)), max(1, round(width * factor))
        resized = F.interpolate(image[None] / 255, (tall, wide), mode="bilinear", antialias=True)
        embeddings = self.encode(resized.float())
        kept = (max(1, round(tall * self.coarse / self.size)), max(1, round(wide * self.coarse / self.size)))

        def predict(
            box: tuple[int, int, int, int] | None, point: tuple[int, int] | None, scores: torch.Tensor | None
        ) -> tuple[torch.Tensor, float]:
            corners = None if box is None else [value * factor for value in box]
            place = None if point is None else [value * factor for value in point]
            mask = None
            if scores is not None:
                small = F.interpolate(scores[None, None].float(), kept, mode="bilinear")
                mask = F.pad(small, (0, self.coarse - kept[1], 0, self.coarse - kept[0]))
            logits, quality = self.decode(embeddings, corners, place, mask)
            logits = logits[None, None, : kept[0], : kept[1]]
            return F.interpolate(logits, (height, width), mode="bilinear")[0, 0], quality

        return predict


class Sam(Promptable):
    """A SAM through transformers.

    Parameters
    ----------
    name : on the hub ("facebook/sam-vit-base") or a folder; weights are read from safetensors only
    """

    def __init__(self, name: str):
        transformers = need("transformers", "teachers")
        self.name = name
        self.model: Any = pretrained(transformers.SamModel, name, "a SAM").eval().requires_grad_(False)
        self.size = self.model.config.vision_config.image_size
        self.coarse = 4 * self.size // self.model.config.vision_config.patch_size

    def encode(self, image: torch.Tensor) -> Any:
        """See `Promptable`."""
        return self.model.get_image_embeddings(self.padded(image))

    def decode(
        self, embeddings: Any, box: list[float] | None, point: list[float] | None, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, float]:
        """See `Promptable`."""
        asked: dict[str, Any] = {} if mask is None else {"input_masks": mask}
        if box is not None:
            asked["input_boxes"] = torch.tensor([[box]])
        if point is not None:
            asked["input_points"] = torch.tensor([[[point]]])
            asked["input_labels"] = torch.ones(1, 1, 1, dtype=torch.long)
        answer = self.model(image_embeddings=embeddings, multimask_output=False, **asked)
        return answer.pred_masks[0, 0, 0], float(answer.iou_scores.max())


def open_sam(name: str | Path) -> Promptable:
    """A SAM by its name: a folder that holds encoder.onnx and decoder.onnx runs in ONNX Runtime, all else in
    transformers (a name on the hub, with or without "hf:", or a folder)."""
    from .sam_onnx import OnnxSam, is_onnx

    return OnnxSam(name) if is_onnx(name) else Sam(str(name).removeprefix("hf:"))
