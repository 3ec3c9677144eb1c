"""An exported encoder: a folder of two graphs and one JSON that says everything about them, and what loads it.

`clipworks-export.json` holds configuration, tokenizer, the fingerprint of the encoder it was made from, what the gate
measured, and size and SHA-256 of every file. Nothing else in the folder is read, and no file outside of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import BadWeights, ClipworksError, check_choice
from ...training.checkpoint import file_digest
from ..config import EncoderConfig
from ..encoder import Encoder
from ..formats.native import read_tokenizer, write_tokenizer
from ..loading import EXPORT as MANIFEST
from ..preprocess import Preprocess
from ..text import TextTransformer
from .graphs import TOWERS

if TYPE_CHECKING:
    from .gate import Measured

VERSION = 1
RUNTIMES = ("openvino", "onnxruntime")
MOST_MANIFEST = 64 << 20
MOST_BYTES = 16 << 30


def backend(runtime: str) -> ModuleType:
    """The module of a runtime: PRECISIONS, SUFFIXES, write, recipes, quantise, Session."""
    return importlib.import_module(f".{check_choice('runtime', runtime, RUNTIMES)}", __package__)


class Tower(nn.Module):
    """A graph in the place of a tower; it has no inside that a method could reach into."""

    def __init__(self, session: Any, config: Any):
        super().__init__()
        self.session, self.config = session, config

    def forward(self, x: torch.Tensor, **seams: Any) -> torch.Tensor:
        if any(value is not None for value in seams.values()):
            self.run()
        return self.session(x)

    def run(self, *_: Any, **__: Any) -> Any:
        """Refused: only weights have an inside."""
        raise ClipworksError(
            "this encoder was exported, so only whole images and texts go through it; methods that look inside, train "
            "or adapt it need the weights it was made from."
        )

    project = stem = run

    def __deepcopy__(self, memo: Any) -> Tower:
        return self  # nothing in it changes


class TextTower(Tower):
    """The same for texts, cut at the longest one of a batch as the tower itself does."""

    end, lengths = TextTransformer.end, TextTransformer.lengths

    def forward(self, x: torch.Tensor, **seams: Any) -> torch.Tensor:
        return super().forward(x[:, : int(self.lengths(x).max())], **seams)  # type: ignore[misc]


class ExportedEncoder(Encoder):
    """An `Encoder` whose towers run in another runtime; made by `load_export`.

    Parameters
    ----------
    record : the folder's JSON
    image, text : the loaded graphs
    tokenizer : as for `Encoder`

    Attributes
    ----------
    runtime : "openvino" or "onnxruntime"
    measured : what the gate found when it was made
    fingerprint : that of the fp32 encoder where every measured vector was the same to the rounding of a collection's
        storage, so that both may be used on one collection; else one of its own
    """

    def __init__(self, record: dict[str, Any], image: Any, text: Any, tokenizer: Any):
        nn.Module.__init__(self)  # not Encoder's: it would build the towers
        self.config, self.tokenizer = EncoderConfig.from_dict(record["config"]), tokenizer
        self._preprocess = Preprocess(self.config.preprocess, fast=bool(record["fast"]))
        self.visual = Tower(image, self.config.vision)
        self.text = TextTower(text, self.config.text)  # type: ignore[assignment]
        self.log_scale = nn.Parameter(torch.tensor(float(record["log_scale"])), requires_grad=False)
        bias = record["bias"]
        self.register_parameter("bias", None if bias is None else nn.Parameter(torch.tensor(float(bias)), False))
        self.truncated = 0
        self.runtime, self.measured = str(record["runtime"]), record["measured"]
        self._precision, self._made = str(record["precision"]), (self._preprocess_key(), fingerprint(record))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def precision(self) -> str:
        return self._precision

    @property
    def fingerprint(self) -> str:
        key, made = self._made
        now = self._preprocess_key()
        return made if now == key else hashlib.sha256(f"{made} {now}".encode()).hexdigest()

    def refresh(self) -> str:
        return self.fingerprint

    def to_precision(self, precision: str) -> ExportedEncoder:
        """Itself, if that is its precision or "auto"; an exported encoder cannot change it."""
        if precision not in ("auto", self.precision):
            raise ClipworksError(
                f"precision of this exported encoder is {self.precision!r} and cannot be changed. Got {precision!r}."
            )
        return self

    def resize(self, **sizes: Any) -> Encoder:
        """Refused: the sizes are part of the graphs."""
        raise ClipworksError("an exported encoder cannot be resized; load the weights, resize, and export again.")

    def _apply(self, function: Any, recurse: bool = True) -> ExportedEncoder:
        moved = function(torch.empty(0))
        if moved.device.type != "cpu":
            raise ClipworksError(f"device of an exported encoder must be 'cpu'. Got {str(moved.device)!r}.")
        return self


def is_export(folder: Path) -> bool:
    """Whether `export` wrote this folder."""
    return (folder / MANIFEST).is_file()


def fingerprint(record: dict[str, Any]) -> str:
    """See `ExportedEncoder.fingerprint`."""
    if record["same"]:
        return str(record["source"]["fingerprint"])
    parts = {k: record[k] for k in ("source", "runtime", "precision")} | {"files": record["files"]}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def write_record(folder: Path, encoder: Encoder, runtime: str, precision: str, found: Measured, same: bool) -> None:
    """Describe the graphs of a folder; written last, so that a folder with this file is complete."""
    config = encoder.config
    bias: Any = encoder.bias
    preprocess = getattr(encoder.preprocess, "config", config.preprocess)
    names = [f"{tower}{suffix}" for tower in TOWERS for suffix in backend(runtime).SUFFIXES]
    record = {
        "version": VERSION,
        "runtime": runtime,
        "precision": precision,
        "config": dataclasses.replace(config, preprocess=preprocess).to_dict(),
        "tokenizer": write_tokenizer(encoder.tokenizer),
        "fast": bool(getattr(encoder.preprocess, "fast", False)),
        "log_scale": float(encoder.log_scale.detach()),
        "bias": None if bias is None else float(bias.detach()),
        "source": {"name": config.name, "fingerprint": encoder.fingerprint},
        "same": same,
        "measured": found.as_row(),
        "versions": {name: version(name) for name in ("torch", runtime)},
        "files": {n: _facts(folder / n) for n in names if (folder / n).exists()},
    }
    (folder / MANIFEST).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load_export(folder: Path) -> ExportedEncoder:
    """Load what `export` wrote, after checking every file.

    Raises
    ------
    BadWeights
        If a file is missing, damaged, too large, or not inside the folder.
    MissingExtra
        If the runtime is not installed.
    """
    record = _read(folder)
    for name, told in record["files"].items():
        _check(folder, name, told, backend(record["runtime"]).SUFFIXES)
    try:
        EncoderConfig.from_dict(record["config"])
    except (ClipworksError, KeyError, TypeError, AttributeError) as error:
        raise BadWeights(f"{folder / MANIFEST}: its configuration is damaged ({error!s:.160}).") from error
    try:
        make = backend(record["runtime"]).Session
        image, text = (make(folder / tower, record["precision"]) for tower in TOWERS)
        return ExportedEncoder(record, image, text, read_tokenizer(record["tokenizer"], folder / MANIFEST)).eval()
    except (KeyError, TypeError, AttributeError) as error:
        raise BadWeights(f"{folder / MANIFEST}: an entry is missing or damaged ({error!r:.80}).") from error


def _read(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if path.stat().st_size > MOST_MANIFEST:
        raise BadWeights(f"{path} has {path.stat().st_size} bytes, allowed are {MOST_MANIFEST}.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        number, files = record["version"], record["files"]
        known = record["runtime"] in RUNTIMES and record["precision"] in backend(record["runtime"]).PRECISIONS
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadWeights(f"{path} is damaged ({error!r:.80}).") from error
    if number != VERSION or not known:
        raise BadWeights(f"{path}: version {number!r:.20}, runtime and precision must be ones that this library has.")
    needed = {f"{tower}{backend(record['runtime']).SUFFIXES[0]}" for tower in TOWERS}
    if not isinstance(files, dict) or not needed <= files.keys():
        raise BadWeights(f"{path} must list {', '.join(sorted(needed))}.")
    if not all(isinstance(f, dict) and type(f.get("bytes")) is int for f in files.values()):
        raise BadWeights(f"{path}: every file needs its bytes and sha256.")
    if sum(f["bytes"] for f in files.values()) > MOST_BYTES:
        raise BadWeights(f"{path} lists more than {MOST_BYTES} bytes.")
    return record


def _check(folder: Path, name: str, told: dict[str, Any], suffixes: tuple[str, ...]) -> None:
    path = folder / name
    if name not in {f"{tower}{suffix}" for tower in TOWERS for suffix in suffixes}:
        raise BadWeights(f"{folder / MANIFEST} lists {name!r:.80}, which is no file of an export.")
    if path.is_symlink() or not path.is_file():
        raise BadWeights(f"{path} is missing, or no plain file of this folder.")
    if path.stat().st_size != told["bytes"] or _facts(path)["sha256"] != told.get("sha256"):
        raise BadWeights(f"{path} is not the file that was exported (size or SHA-256 differ).")


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}
