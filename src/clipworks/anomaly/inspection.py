"""`inspect`: learn what good parts look like, judge a folder of others, keep the heat maps as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadImage, ClipworksError, check_choice, check_folder, check_range
from ..progress import Progress
from .result import SUFFIXES, AnomalyMap

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

METHODS = ("patch_memory", "winclip", "anovl")


@dataclass
class Inspection:
    """What was found in many images, without the maps, which are written or dropped one by one.

    Attributes
    ----------
    rows : one dictionary per image as `AnomalyMap.as_row` gives it, with "map", the file of its heat map, if any
    threshold, pixel_threshold : above them an image, a pixel is defective
    errors : images that could not be used
    """

    rows: list[dict[str, Any]]
    threshold: float
    pixel_threshold: float
    errors: list[BadImage] = field(default_factory=list)

    @property
    def defective(self) -> list[str]:
        """Keys of the defective images, the worst first."""
        return [row["key"] for row in sorted(self.rows, key=lambda r: -r["score"]) if row["defective"]]


def inspect(
    images: Any,
    normal: Any = None,
    *,
    method: str = "patch_memory",
    encoder: str | Encoder | None = None,
    name: str = "object",
    image_size: int | None = None,
    layers: Sequence[str] | None = None,
    rate: float = 0.05,
    out: str | Path | None = None,
    form: str = "png",
    batch_size: int = 8,
    progress: bool | None = None,
) -> Inspection:
    """Find defects in images, given images of good parts, words, or both.

    Parameters
    ----------
    images : what is inspected: a folder or another source, or a list of images
    normal : images of good parts; None for the methods that know defects from words ("winclip", "anovl")
    method : "patch_memory" (good images), "winclip" (words, good images or both) or "anovl" (words)
    encoder : a model's name, a path or an encoder (default: the bundled one)
    name : what the images show, in words, for "winclip" and "anovl"
    image_size : side in pixels to which images are squeezed (default: the encoder's)
    layers : feature maps of "patch_memory": numbers of blocks, or stem maps such as stem8
    rate : share of good images that may be called defective
    out : folder for the heat maps, made if it is missing
    form : ending of their files: "png", "jpg", "webp" (pictures), "npz" (arrays) or "json"
    batch_size : images per pass
    progress : None shows a bar on a terminal

    Returns
    -------
    Inspection
    """
    from ..data.sources import open_source

    check_choice("method", method, METHODS)
    check_choice("form", form, [suffix[1:] for suffix in SUFFIXES])
    if normal is None and method == "patch_memory":
        raise ClipworksError("normal must be images of good parts for 'patch_memory'; 'winclip' and 'anovl' need none.")
    check_range("batch_size", batch_size, 1)
    images = open_source(images) if isinstance(images, str | Path) else images
    detector = _detector(method, encoder, name, image_size, layers, rate)
    folder = None if out is None else check_folder("out", out)
    detector.fit(normal)
    rows: list[dict[str, Any]] = []
    errors: list[BadImage] = []
    taken: set[str] = set()
    maps = detector.score_maps(images, batch_size=batch_size, errors=errors)
    for found in Progress(maps, None, "inspecting", unit=lambda _: 1, enabled=progress):
        row = found.as_row()
        if folder is not None:
            row["map"] = str(found.save(folder / _file(found, form, taken)))
        rows.append(row)
    return Inspection(rows, detector.threshold_, detector.pixel_threshold_, errors)


def _detector(method: str, encoder: Any, name: str, image_size: int | None, layers: Any, rate: float) -> Any:
    from ..registry import get_method

    options: dict[str, Any] = {"image_size": image_size, "rate": rate}
    if method == "patch_memory":
        options["layers"] = layers and [int(x) if str(x).lstrip("-").isdigit() else x for x in layers]
    elif layers:
        raise ClipworksError(f"layers are read by 'patch_memory' only. Got them with {method!r}.")
    else:
        options["name"] = name
    return get_method(f"anomaly/{method}")(encoder, **options)


def _file(found: AnomalyMap, form: str, taken: set[str]) -> str:
    """A file name from a key, free of folders, not given before."""
    stem = Path(found.key).with_suffix("").as_posix().replace("/", "-").lstrip(".-") or "image"
    name, number = f"{stem}.{form}", 2
    while name in taken:
        name, number = f"{stem}-{number}.{form}", number + 1
    taken.add(name)
    return name
