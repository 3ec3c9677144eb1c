"""A SAM as the two ONNX files that segment-anything, MobileSAM and samexporter write: it needs no transformers.

encoder.onnx : an image to embeddings (1, channels, g, g). It takes either the normalised square (1, 3, size, size), or
    (height, width, 3) in [0, 255] and normalises itself (`--use-preprocess`).
decoder.onnx : image_embeddings, point_coords (1, N, 2), point_labels (1, N), mask_input (1, 1, 4 g, 4 g),
    has_mask_input (1,), orig_im_size (2,) to low_res_masks (1, M, 4 g, 4 g) and iou_predictions (1, M).

Labels are 1 for a point, 2 and 3 for the corners of a box, -1 for the padding that stands where there is no box. The
third output, masks, is not used: the crop in it was traced as a constant by some exports and is wrong for other shapes.

Kirillov et al. 2023, Segment Anything (ICCV); `scripts/export_onnx_model.py` of its release.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..encoders.runtime.onnxruntime import open_graph
from ..errors import BadWeights
from .prompts import Promptable

FILES = ("encoder.onnx", "decoder.onnx")
INPUTS = ("image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input", "orig_im_size")
OUTPUTS = ("low_res_masks", "iou_predictions")
FLOAT = "tensor(float)"
PATCH = 16  # pixels of a SAM's square per cell of its embeddings
LARGEST = 4096  # side of the square; every SAM has 1024
ALL = 4  # masks of a decoder that leaves the choice: the first is the one for a prompt that is not ambiguous


def is_onnx(name: str | Path) -> bool:
    """Whether a folder is an export: one of the two files is enough, so that the other is missed by its name."""
    return any((Path(name) / file).is_file() for file in FILES)


class OnnxSam(Promptable):
    """A SAM in ONNX Runtime.

    Parameters
    ----------
    folder : holds encoder.onnx and decoder.onnx; both are checked before they are loaded (tensors outside of the
        folder, foreign operators)

    Raises
    ------
    BadWeights
        If a file is missing, unsafe, or takes or gives something else than this form has.
    """

    def __init__(self, folder: str | Path):
        self.name = str(folder)
        files = [Path(folder) / file for file in FILES]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            found = ", ".join(sorted(file.name for file in Path(folder).glob("*"))[:9]) or "nothing"
            raise BadWeights(f"{self.name!r} must hold {' and '.join(FILES)}; {missing[0]} is missing. Found: {found}.")
        self._encoder, self._decoder = (open_graph(file) for file in files)
        self._image, self._embeddings = _ends(files[0], self._encoder)
        shapes = _checked(files[1], self._decoder)
        self.coarse = _side(files[1], "mask_input", shapes["mask_input"], 4 * LARGEST // PATCH)
        self._whole = len(self._image.shape) == 3
        self.size = self.coarse * PATCH // 4
        if not self._whole:
            self.size = _side(files[0], self._image.name, self._image.shape, LARGEST)
        made, taken = self._embeddings.shape, shapes["image_embeddings"]
        if len(made) != len(taken) or any(
            isinstance(m, int) and isinstance(t, int) and m != t for m, t in zip(made, taken, strict=True)
        ):
            raise BadWeights(
                f"{self.name!r}: the two files must be of one SAM. {FILES[0]} gives embeddings of shape {made}, "
                f"{FILES[1]} takes {taken}."
            )

    def encode(self, image: torch.Tensor) -> Any:
        """See `Promptable`."""
        pixels = 255 * image[0].permute(1, 2, 0) if self._whole else self.padded(image)
        given = {self._image.name: pixels.cpu().contiguous().numpy()}
        return self._run(FILES[0], self._encoder, (self._embeddings.name,), given)[0]

    def decode(
        self, embeddings: Any, box: list[float] | None, point: list[float] | None, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, float]:
        """See `Promptable`. A decoder that gives one mask has chosen itself."""
        places = ([] if point is None else [point]) + ([[0.0, 0.0]] if box is None else [box[:2], box[2:]])
        labels = ([] if point is None else [1]) + ([-1] if box is None else [2, 3])
        hint = np.zeros((1, 1, self.coarse, self.coarse)) if mask is None else mask.cpu().numpy()
        values = [embeddings, [places], [labels], hint, [mask is not None], [self.size, self.size]]
        given = {name: np.asarray(value, np.float32) for name, value in zip(INPUTS, values, strict=True)}
        masks, scores = self._run(FILES[1], self._decoder, OUTPUTS, given)
        if masks.shape != (1, scores.size, self.coarse, self.coarse):
            raise BadWeights(
                f"{self.name!r}: {FILES[1]} must give masks of shape (1, {scores.size}, {self.coarse}, {self.coarse}), "
                f"one per score. Got {masks.shape}."
            )
        best = 0 if scores.size == ALL else int(scores.argmax())
        return torch.from_numpy(masks[0, best]), float(scores.ravel()[best])

    def _run(self, file: str, session: Any, names: tuple[str, ...], given: dict[str, np.ndarray]) -> list[np.ndarray]:
        try:
            return session.run(list(names), given)
        except Exception as error:  # the library's own kinds have no common base
            raise BadWeights(f"{self.name!r}: {file} does not run ({str(error).strip()[:160]}).") from error


def _ends(file: Path, encoder: Any) -> tuple[Any, Any]:
    """The encoder's one input, and its embeddings."""
    takes, gives = encoder.get_inputs(), encoder.get_outputs()
    named = gives if len(gives) == 1 else [end for end in gives if end.name == INPUTS[0]]
    if len(takes) != 1 or len(takes[0].shape) not in (3, 4) or takes[0].type != FLOAT or len(named) != 1:
        raise BadWeights(
            f"{file} must take one image, {FLOAT} (1, 3, size, size) or (height, width, 3), and give {INPUTS[0]}. "
            f"Found: {_told(takes)} to {_told(gives)}."
        )
    return takes[0], named[0]


def _checked(file: Path, decoder: Any) -> dict[str, list[Any]]:
    """Shapes of a decoder's inputs, which must be `INPUTS`; `OUTPUTS` must be among what it gives."""
    takes, gives = decoder.get_inputs(), decoder.get_outputs()
    if {(end.name, end.type) for end in takes} != {(name, FLOAT) for name in INPUTS}:
        raise BadWeights(f"{file} must take {', '.join(INPUTS)}, each {FLOAT}. Found: {_told(takes)}.")
    if not set(OUTPUTS) <= {end.name for end in gives}:
        raise BadWeights(f"{file} must give {', '.join(OUTPUTS)}. Found: {_told(gives)}.")
    return {end.name: end.shape for end in takes}


def _told(ends: Any) -> str:
    return ", ".join(f"{end.name} {end.type} {end.shape}" for end in ends) or "nothing"


def _side(file: Path, name: str, shape: list[Any], most: int) -> int:
    """The side of a square input (1, channels, side, side), which must be written in the file."""
    side = shape[-1] if len(shape) == 4 and shape[-1] == shape[-2] else None
    if not isinstance(side, int) or not 1 <= side <= most:
        raise BadWeights(f"{file} must take {name} as a square of a fixed side up to {most}. Found the shape {shape}.")
    return side
