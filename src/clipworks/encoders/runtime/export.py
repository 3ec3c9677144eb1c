"""`export`: an encoder for another runtime, into a folder that `load` reads, if it passes the gate; `fit` without one.

Every form (runtime, precision, recipe of quantisation) is measured against fp32 on the user's own images and texts.
Images that calibrate a quantisation are not among those that judge it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from ...errors import ClipworksError, MissingExtra, check_choice
from .folder import RUNTIMES, backend, is_export, load_export, write_record
from .gate import BOUND, Gate, Measured, read_images, read_texts
from .graphs import TOWERS, program

if TYPE_CHECKING:
    from ..encoder import Encoder

PRECISIONS = ("fp32", "bf16", "int8")
FEW = 30  # images below which a bound says little


@dataclass
class Report:
    """What `export` did.

    Attributes
    ----------
    path : the folder
    chosen : the form that is in it
    rows : every form that was measured, fp32 in torch first
    same : whether its vectors may be mixed with those of fp32 (then it has the same fingerprint)
    images, calibrated : images that judged, and images that calibrated
    notes : what else a person should know, a sentence each
    """

    path: str
    chosen: Measured
    rows: list[Measured]
    same: bool
    images: int
    calibrated: int = 0
    notes: list[str] = field(default_factory=list)

    def as_rows(self) -> list[dict[str, Any]]:
        """A dictionary per form."""
        return [row.as_row() for row in self.rows]


class Refused(ClipworksError):
    """No form passed the gate; `rows` holds what was measured."""

    def __init__(self, message: str, rows: Sequence[Measured] = ()):
        super().__init__(message)
        self.rows = list(rows)


def export(
    model: str | Encoder,
    out: str | Path,
    *,
    images: Any,
    runtime: str = "openvino",
    precision: str = "int8",
    texts: str | Sequence[str] | None = None,
    bound: float = BOUND,
    batch_size: int = 16,
    overwrite: bool = False,
) -> Report:
    """Write an encoder for another runtime into a folder that `load` reads, if it is true to fp32.

    Parameters
    ----------
    model : name or path for `load`, or an encoder in fp32
    out : folder to make
    images : images of yours that it is measured on (and int8 calibrated with), as `open_source` takes them; up to 200
        are drawn
    runtime : "openvino", "onnxruntime", or "auto" for the fastest of those installed
    precision : "fp32", "bf16", "int8", or "auto" for the fastest that passes
    texts : texts of yours, a list or a text file with one per line (default: 32 sentences)
    bound : cosine to fp32 that 95 in 100 images, and texts, must reach
    batch_size : images per pass when speed is measured
    overwrite : replace an export that is there

    Returns
    -------
    Report

    Raises
    ------
    Refused
        If no form asked for passes; nothing is written.
    ClipworksError
        If an argument cannot be used.
    MissingExtra
        If the runtime is not installed.
    """
    out = Path(out)
    if out.exists() and not (overwrite and is_export(out)):
        hint = "give overwrite=True to replace it" if is_export(out) else "choose another place"
        raise ClipworksError(f"there is something at {str(out)!r} already; {hint}.")
    exact = _exact(model)
    with _made(exact, runtime, precision, images, texts, bound, batch_size, out.parent) as (made, report):
        folder = cast(Path, made)  # only torch needs none, and it is not among the forms that are written
        if out.exists():
            shutil.rmtree(out)
        mask = os.umask(0)
        os.umask(mask)
        folder.chmod(0o777 & ~mask)  # temporary folders are for their owner alone
        os.replace(folder, out)
    report.path = str(out)
    return report


def fit(
    encoder: Encoder,
    runtime: str = "auto",
    precision: str = "auto",
    *,
    images: Any,
    texts: str | Sequence[str] | None = None,
    bound: float = BOUND,
    batch_size: int = 16,
) -> Encoder:
    """The fastest form of an encoder that passes the gate, for this process; torch takes part with fp32 and bf16.

    Parameters
    ----------
    encoder : in fp32 on the CPU
    runtime : "torch", "openvino", "onnxruntime", or "auto" for all that are installed
    precision, images, texts, bound, batch_size : as for `export`

    Raises
    ------
    Refused
        If no form asked for passes.
    """
    with _made(encoder, runtime, precision, images, texts, bound, batch_size, None) as (folder, report):
        if folder is not None:
            return load_export(folder)
    return encoder if report.chosen.precision == "fp32" else _half(encoder)


def _exact(model: str | Encoder) -> Encoder:
    if isinstance(model, str | Path):
        from ..loading import load

        model = load(model, precision="fp32")
    if getattr(model, "runtime", "torch") != "torch" or model.precision != "fp32" or model.device.type != "cpu":
        raise ClipworksError("model must be an encoder with weights in fp32 on the CPU, not an exported one.")
    return model


def _half(encoder: Encoder) -> Encoder:
    import copy

    return copy.deepcopy(encoder).to_precision("bf16")


def _forms(runtime: str, precision: str, with_torch: bool) -> list[tuple[str, str]]:
    """Pairs of runtime and precision that are meant."""
    known = ("torch", *RUNTIMES) if with_torch else RUNTIMES
    check_choice("runtime", runtime, (*known, "auto"))
    check_choice("precision", precision, (*PRECISIONS, "auto"))
    names = [n for n in known if n == "torch" or importlib.util.find_spec(n)] if runtime == "auto" else [runtime]
    offered = {n: ("fp32", "bf16") if n == "torch" else backend(n).PRECISIONS for n in names}
    found = [(n, p) for n in names for p in offered[n] if precision in (p, "auto")]
    if not found and not names:
        raise MissingExtra("no runtime is installed. Install them with: pip install 'clipworks[export]'")
    if not found:
        shown = "; ".join(f"{n}: {', '.join(p)}" for n, p in offered.items())
        raise ClipworksError(f"precision {precision!r} is not offered by the runtime. There are {shown}.")
    return found


@contextmanager
def _made(
    exact: Encoder,
    runtime: str,
    precision: str,
    images: Any,
    texts: Any,
    bound: float,
    batch_size: int,
    place: Path | None,
) -> Iterator[tuple[Path | None, Report]]:
    """Make and measure all forms; give the folder of the fastest that passes (None: torch itself) and the report."""
    forms = _forms(runtime, precision, with_torch=place is None)
    pixels, texts = read_images(images, exact), read_texts(texts)
    calibrating = any(p == "int8" and n == "openvino" for n, p in forms)
    share = pixels[1::2] if calibrating else pixels[:0]
    gate = Gate(exact, pixels[::2] if calibrating else pixels, texts, bound, batch_size)
    notes = []
    if len(gate.pixels) < FEW:
        notes.append(f"measured on {len(gate.pixels)} images only; with {FEW} or more the bound means more.")
    rows = [gate.measure(exact, "as it is")]
    best: tuple[Measured, Path | None] | None = None
    if place is not None:
        place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=place) as box:
        for name, kind in forms:
            for measured, folder in _tried(gate, name, kind, share, Path(box)):
                rows.append(measured)
                if measured.accepted and (best is None or measured.ms < best[0].ms):
                    best = measured, folder
        if best is None:
            raise Refused(_why(rows[1:], bound), rows)
        chosen, folder = best
        same = folder is not None and chosen.precision == "fp32" and gate.same(load_export(folder))
        if folder is not None:
            write_record(folder, exact, chosen.runtime, chosen.precision, chosen, same)
        if chosen.ratio < 1:
            notes.append(f"it is not faster than fp32 in torch here ({chosen.ratio:.2f} times).")
        yield folder, Report("", chosen, rows, same, len(gate.pixels), len(share), notes)


def _tried(
    gate: Gate, name: str, kind: str, share: torch.Tensor, box: Path
) -> Iterator[tuple[Measured, Path | None]]:
    """Make one form and measure it; of a quantisation the recipes one after the other, until one passes."""
    if name == "torch":
        yield gate.measure(gate.exact if kind == "fp32" else _half(gate.exact)), None
        return
    base = box / f"{name}-fp32"
    if not base.exists():
        base.mkdir()
        for tower, given in TOWERS.items():
            backend(name).write(program(gate.exact, tower), given, base / tower)
    if kind != "int8":
        yield _measured(gate, name, kind, "", base if kind == "fp32" else _copied(base, box / f"{name}-{kind}"))
        return
    for recipe in backend(name).recipes(base / "image"):
        folder = _copied(base, box / f"{name}-{recipe}", leave="image")
        backend(name).quantise(base / "image", recipe, list(share.split(1)), folder / "image")
        found = _measured(gate, name, kind, recipe, folder)
        yield found
        if found[0].accepted:
            return


def _measured(gate: Gate, name: str, kind: str, recipe: str, folder: Path) -> tuple[Measured, Path]:
    write_record(folder, gate.exact, name, kind, Measured(name, kind, recipe), False)
    return gate.measure(load_export(folder), recipe), folder


def _copied(base: Path, to: Path, leave: str = "-") -> Path:
    to.mkdir()
    for file in base.iterdir():
        if not file.name.startswith(leave) and file.suffix != ".json":
            _link(file, to / file.name)
    return to


def _link(source: Path, to: Path) -> None:
    try:
        os.link(source, to)
    except OSError:  # a file system without hard links
        shutil.copy(source, to)


def _why(rows: Sequence[Measured], bound: float) -> str:
    best = max(rows, key=lambda row: min(row.low, row.text_low))
    low, what = min((best.low, "images"), (best.text_low, "texts"))
    return (
        f"refused, and nothing was written: 95 in 100 {what} reach a cosine to fp32 of {low:.4f} with {best.runtime} "
        f"{best.precision}, the bound is {bound}. Another precision is closer to fp32; a lower bound accepts this one."
    )
