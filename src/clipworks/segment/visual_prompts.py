"""Visual prompts: a region of a picture is pointed out by drawing on the picture, as pure functions of pixels.

A prompt is a shape (box, inscribed circle, mask) with an ink: "line" around it, "colour" over it, "grey" or "blur" for
all that lies outside. `visual_prompt` draws one by its name ("box-line", "mask-blur" ...); "crop", "crop-colour" and
"keypoint" stand beside the twelve. Pictures are uint8 (H, W, 3), regions bool (H, W); nothing is changed in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

from ..errors import ClipworksError, check_choice, check_range

SHAPES, INKS = ("box", "circle", "mask"), ("line", "colour", "grey", "blur")
PROMPTS = ("crop", "crop-colour", "keypoint", *(f"{shape}-{ink}" for shape in SHAPES for ink in INKS))
LUMINANCE = np.array([0.299, 0.587, 0.114])  # of ITU-R 601, as Pillow's


@dataclass(frozen=True)
class Style:
    """How prompts are drawn; the values are FGVP's release.

    Attributes
    ----------
    sigma : of the blur, in pixels of the picture
    share : of the colour in an overlay
    thickness : of lines, in pixels, drawn inside the region
    line, fill : colours of lines and of overlays
    dot : radius of a keypoint in pixels
    """

    sigma: float = 100.0
    share: float = 0.5
    thickness: int = 2
    line: tuple[int, int, int] = (255, 0, 0)
    fill: tuple[int, int, int] = (0, 255, 0)
    dot: float = 5.0

    def __post_init__(self) -> None:
        check_range("sigma", self.sigma, 0)
        check_range("share", self.share, 0, 1)
        check_range("thickness", self.thickness, 1)
        check_range("dot", self.dot, 1)


STYLE = Style()


def visual_prompt(
    pixels: np.ndarray,
    box: Sequence[float],
    prompt: str,
    mask: np.ndarray | None = None,
    style: Style = STYLE,
    blurred: np.ndarray | None = None,
) -> np.ndarray:
    """Draw one prompt.

    Parameters
    ----------
    pixels : uint8 (H, W, 3)
    box : left, top, right, bottom in pixels
    prompt : one of `PROMPTS`
    mask : bool (H, W), for prompts of a mask
    style : colours, thickness, blur
    blurred : the picture out of focus, where it is at hand (it is the same for every region)

    Returns
    -------
    uint8 of the picture's size, or of the box's for crops

    >>> grey = visual_prompt(np.full((4, 4, 3), (200, 0, 0), np.uint8), (0, 0, 2, 4), "box-grey")
    >>> grey[0, :, 0].tolist(), grey[0, :, 1].tolist()
    ([200, 200, 60, 60], [0, 0, 60, 60])
    """
    check_choice("prompt", prompt, PROMPTS)
    height, width = pixels.shape[:2]
    rows, columns = _window(box, height, width)
    if prompt == "crop":
        return pixels[rows, columns].copy()
    if prompt == "crop-colour":
        return overlay(pixels, box_region(height, width, box), style.share, style.fill)[rows, columns]
    if prompt == "keypoint":
        return keypoint(pixels, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), style.dot, style.line)
    shape, ink = prompt.split("-")
    region = shape_region(shape, height, width, box, mask)
    if ink == "line":
        return outline(pixels, region, style.thickness, style.line)
    if ink == "colour":
        return overlay(pixels, region, style.share, style.fill)
    if ink == "grey":
        return grey_outside(pixels, region)
    return blur_outside(pixels, region, gaussian_blur(pixels, style.sigma) if blurred is None else blurred)


def shape_region(shape: str, height: int, width: int, box: Sequence[float], mask: np.ndarray | None) -> np.ndarray:
    """The pixels of a shape, bool (H, W)."""
    if shape == "mask":
        if mask is None:
            raise ClipworksError("prompts that draw a mask need masks, or a sam that makes them. Got boxes alone.")
        return np.asarray(mask, bool)
    return (box_region if shape == "box" else circle_region)(height, width, box)


def box_region(height: int, width: int, box: Sequence[float]) -> np.ndarray:
    """Every pixel that a box touches."""
    region = np.zeros((height, width), bool)
    region[_window(box, height, width)] = True
    return region


def circle_region(height: int, width: int, box: Sequence[float]) -> np.ndarray:
    """The pixels whose centres lie in the ellipse that fits into those of a box."""
    rows, columns = _window(box, height, width)
    tall, wide = rows.stop - rows.start, columns.stop - columns.start
    y = (np.arange(tall) + 0.5) * 2 / tall - 1
    x = (np.arange(wide) + 0.5) * 2 / wide - 1
    region = np.zeros((height, width), bool)
    region[rows, columns] = y[:, None] ** 2 + x**2 <= 1
    return region


def outline(pixels: np.ndarray, region: np.ndarray, thickness: int, colour: Sequence[int]) -> np.ndarray:
    """A line inside the region's border, also where the border is the picture's."""
    from scipy.ndimage import binary_erosion

    edge = region & ~binary_erosion(region, np.ones((3, 3), bool), iterations=thickness)
    return np.where(edge[..., None], np.array(colour, np.uint8), pixels)


def overlay(pixels: np.ndarray, region: np.ndarray, share: float, colour: Sequence[int]) -> np.ndarray:
    """(1 - share) pixels + share colour in the region."""
    mixed = np.rint((1 - share) * pixels + share * np.asarray(colour)).astype(np.uint8)
    return np.where(region[..., None], mixed, pixels)


def keypoint(pixels: np.ndarray, centre: tuple[float, float], radius: float, colour: Sequence[int]) -> np.ndarray:
    """A dot around a point (x, y)."""
    y, x = np.ogrid[: pixels.shape[0], : pixels.shape[1]]
    near = (y + 0.5 - centre[1]) ** 2 + (x + 0.5 - centre[0]) ** 2 <= radius**2
    return np.where(near[..., None], np.array(colour, np.uint8), pixels)


def grey_outside(pixels: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Colours in the region alone."""
    grey = np.rint(pixels @ LUMINANCE).astype(np.uint8)
    return np.where(region[..., None], pixels, grey[..., None])


def blur_outside(pixels: np.ndarray, region: np.ndarray, blurred: np.ndarray) -> np.ndarray:
    """In focus in the region alone: the reverse blur."""
    return np.where(region[..., None], pixels, blurred)


def gaussian_blur(pixels: np.ndarray, sigma: float) -> np.ndarray:
    """The picture out of focus; beyond its borders their pixels are repeated without end.

    >>> gaussian_blur(np.array([[[0] * 3, [100] * 3]], np.uint8), 1000)[0, :, 0].tolist()
    [50, 50]
    """
    down, right = (gaussian_matrix(n, sigma).astype(np.float32) for n in pixels.shape[:2])
    channels = pixels.transpose(2, 0, 1).astype(np.float32)
    return np.rint(down @ channels @ right.T).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def gaussian_matrix(size: int, sigma: float) -> np.ndarray:
    """Weights (size, size) of every pixel for every blurred one: a Gaussian's share of the pixel, rows to sum 1.

    The first and the last pixel stand for all that lies beyond them, so nothing is cut off however wide the blur is.
    """
    if not sigma:
        return np.eye(size)
    edges = np.arange(1, size) - 0.5 - np.arange(size)[:, None]  # borders between pixels, from each pixel's centre
    below = np.pad(ndtr(edges / sigma), ((0, 0), (1, 1)), constant_values=((0, 0), (0, 1)))
    return np.diff(below, axis=1)


def _window(box: Sequence[float], height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of the pixels that a box touches."""
    left, top, right, bottom = (float(v) for v in box)
    rows = slice(max(0, int(np.floor(top))), min(height, int(np.ceil(bottom))))
    columns = slice(max(0, int(np.floor(left))), min(width, int(np.ceil(right))))
    if rows.stop <= rows.start or columns.stop <= columns.start:
        got = [float(v) for v in box]
        raise ClipworksError(f"a box must cover part of the picture, {width} x {height} pixels. Got {got}.")
    return rows, columns
