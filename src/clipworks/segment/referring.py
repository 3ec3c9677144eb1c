"""`refer`: which region of a photo an expression means, with regions from a file, a list or a SAM."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.decode import decode_pixels
from ..errors import ClipworksError
from .fgvp import Referral, candidates, fgvp

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder


def refer(
    image: Any,
    expression: str,
    *,
    boxes: Any = None,
    sam: str | None = None,
    prompts: Sequence[str] | None = None,
    bank: Sequence[str] = (),
    encoder: str | Encoder | None = None,
    out: str | Path | None = None,
) -> Referral:
    """Find the region of a photo that an expression means, by drawing each of them on the photo.

    Parameters
    ----------
    image : path, bytes, PIL image or uint8 array (H, W, 3)
    expression : what is looked for, by its looks ("the brown dog"); relations ("left of") are not read
    boxes : (N, 4), left, top, right, bottom in pixels, or a file of them: JSON (lists, or objects with "box", or with
        "bbox" as COCO has it: left, top, width, height) or CSV (four columns)
    sam : a SAM: a name on the hub, a folder for transformers, or one of encoder.onnx and decoder.onnx; it makes masks
        of the boxes, or finds regions itself
    prompts : drawings whose logits are added: crop, mask-blur, box-blur, circle-line ... (default: crop and blur)
    bank : sentences about other photos, whose mean is taken off: evens out regions that please any sentence
    encoder : a model's name, a path or an encoder (default: the bundled one)
    out : file of a picture with a line around the region that is meant

    Returns
    -------
    Referral

    Raises
    ------
    ClipworksError
        If there are no regions, or they cannot be used.
    """
    from ..encoders.loading import resolve
    from ..plot.sheet import check_place

    place = None if out is None else check_place(out, "out")
    if boxes is None and sam is None:
        raise ClipworksError("boxes or sam must be given: the expression chooses among regions. Got neither.")
    pixels = decode_pixels(image)
    size = pixels.shape[:2]
    places = read_boxes(boxes) if isinstance(boxes, str | Path) else boxes
    places, masks = None if places is None else candidates(size, places, None)[0], None
    if sam is not None:
        from .prompts import open_sam
        from .proposals import box_masks, point_masks

        predict = open_sam(sam)(torch.from_numpy(pixels.copy()).permute(2, 0, 1).float())
        masks = point_masks(predict, size) if places is None else box_masks(predict, size, places.tolist())
        if not len(masks):
            raise ClipworksError(f"sam must find regions in the image. {sam!r} found none; give boxes.")
    found = fgvp(pixels, expression, resolve(encoder), boxes=places, masks=masks, prompts=prompts, bank=bank)
    if place is not None:
        found.overlay(pixels).save(place)
    return found


def read_boxes(path: str | Path) -> np.ndarray:
    """Boxes float64 (N, 4), left, top, right, bottom in pixels, of a JSON or CSV file as `refer` describes it."""
    path = Path(path)
    if not path.is_file():
        raise ClipworksError(f"boxes must be a file of boxes. There is none at {str(path)!r}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = json.loads(text) if path.suffix.lower() == ".json" else list(csv.reader(text.splitlines()))
        found = [_box(row) for row in rows if row != []]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        told = "JSON (lists of four numbers, or objects with 'box' or 'bbox') or CSV (four columns)"
        raise ClipworksError(f"boxes must be {told}. {str(path)!r} is not: {error}.") from error
    if not found:
        raise ClipworksError(f"boxes must hold at least one box. {str(path)!r} holds none.")
    return np.array(found)


def _box(row: Any) -> list[float]:
    if isinstance(row, dict):
        if "box" not in row:
            left, top, wide, tall = (float(v) for v in row["bbox"])
            return [left, top, left + wide, top + tall]
        row = row["box"]
    left, top, right, bottom = (float(v) for v in row)
    return [left, top, right, bottom]
