"""ONNX Runtime: fp32, and int8 by dynamic quantisation of the matrix products. Files are checked before they are used.

An ONNX file may name other files that hold its tensors. Here such a file must lie beside it under a plain name, and
every range must lie inside it: no path leads out of the folder, and neither does a link of either kind.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import BadWeights, need

PRECISIONS = ("fp32", "int8")
SUFFIXES = (".onnx", ".onnx.data")
MOST_INSIDE = 1_900_000_000  # bytes of weights; a file of this format cannot be larger than 2 GiB
MOST_GRAPH = 1 << 31
DOMAINS = ("", "ai.onnx", "com.microsoft")
NUMBER = re.compile("[0-9]{1,18}")


def write(program: torch.export.ExportedProgram, name: str, path: Path) -> None:
    """Convert a traced tower and write `<path>.onnx`; `name` becomes that of its input."""
    need("onnxscript", "export")
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it reports its steps with print
        warnings.simplefilter("ignore")
        torch.onnx.export(program, f=str(path.with_suffix(".onnx")), dynamo=True, external_data=size > MOST_INSIDE,
                          input_names=[name], output_names=["vectors"], verbose=False)  # fmt: skip


def recipes(path: Path) -> list[str]:
    """Ways to quantise, the fastest first: ranges found at run time are by far the most exact here, and need no
    images (docs/runtimes.md has the comparison with calibrated ones)."""
    return ["dynamic"]


def quantise(path: Path, recipe: str, batches: Sequence[torch.Tensor], out: Path) -> None:
    """Write the int8 form of the graph at `path`; `batches` are not used."""
    need("onnx", "export")
    tool = need("onnxruntime.quantization", "export")
    large = path.with_suffix(".onnx.data").exists()
    logging.getLogger().addFilter(_quiet)  # it warns of a preparation that changes nothing here
    try:
        tool.quantize_dynamic(path.with_suffix(".onnx"), out.with_suffix(".onnx"), per_channel=True,
                              weight_type=tool.QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"],
                              use_external_data_format=large)  # fmt: skip
    finally:
        logging.getLogger().removeFilter(_quiet)


def _quiet(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def check(path: Path) -> list[str]:
    """Check an ONNX file before anything runs it.

    Returns
    -------
    names of the files beside it that hold tensors of it

    Raises
    ------
    BadWeights
        If it is no ONNX model, is larger than the format allows, uses operators of foreign libraries, or names
        tensors outside of its folder or beyond the end of a file.
    """
    onnx = need("onnx", "export")
    if path.stat().st_size > MOST_GRAPH:
        raise BadWeights(f"{path} has {path.stat().st_size} bytes; an ONNX file has at most {MOST_GRAPH}.")
    try:
        model = onnx.load_model(path, load_external_data=False)
    except Exception as error:  # protobuf's kinds differ between its versions
        raise BadWeights(f"{path} is not an ONNX model ({str(error).strip()[:120]}).") from error
    foreign = sorted({d.domain for d in model.opset_import} - set(DOMAINS))
    if foreign:
        raise BadWeights(f"{path} uses operators of {', '.join(foreign)}, allowed are those of ONNX and its runtime.")
    names = set()
    for tensor in _tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL and not tensor.external_data:
            continue
        told = {entry.key: entry.value for entry in tensor.external_data}
        if len(told) < len(tensor.external_data):  # which of the two would be followed?
            raise BadWeights(f"{path}: tensor {tensor.name!r:.60} says twice where it lies.")
        names.add(_check_place(path, tensor.name, told))
    return sorted(names)


def _check_place(path: Path, tensor: str, told: dict[str, str]) -> str:
    place = told.get("location", "")
    file = path.parent / place
    if not place or Path(place).name != place or "\\" in place or file.is_symlink() or not file.is_file():
        raise BadWeights(f"{path}: tensor {tensor!r:.60} lies in {place!r:.80}, which is no plain file beside it.")
    facts = file.stat()
    if facts.st_nlink > 1:  # the same file has a name elsewhere, where it may be anything
        raise BadWeights(f"{path}: {place!r:.80} is a hard link, which may lead out of the folder; copy the file.")
    given = [told.get(key, "0") for key in ("offset", "length")]
    begin, length = (int(text) if NUMBER.fullmatch(text) else -1 for text in given)
    if begin < 0 or length < 0 or begin + length > facts.st_size:
        raise BadWeights(f"{path}: tensor {tensor!r:.60} lies beyond the {facts.st_size} bytes of {place}.")
    return place


def _tensors(message: Any) -> Iterator[Any]:
    """All tensors anywhere in a model: weights, constants, those of nested graphs and functions."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in (value if _repeated(value) else [value]):
                yield from _tensors(part)


def _repeated(value: Any) -> bool:
    return not hasattr(value, "DESCRIPTOR")


def open_graph(file: Path) -> Any:
    """The checked (`check`) graph of a file, loaded: an `InferenceSession` on the CPU."""
    runtime = need("onnxruntime", "export")
    outside = check(file)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:  # from bytes where it can be: then there is no folder that a name could be looked up in
        return runtime.InferenceSession(
            str(file) if outside else file.read_bytes(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # the library's own kinds have no common base
        raise BadWeights(f"{file}: ONNX Runtime cannot load it ({str(error).strip()[:160]}).") from error


class Session:
    """A loaded graph; may be called from several threads.

    Parameters
    ----------
    path : the graph, without suffix; it is checked (`check`)
    precision : of the file; nothing depends on it
    """

    def __init__(self, path: Path, precision: str):
        self._session = open_graph(path.with_suffix(".onnx"))
        self._name = self._session.get_inputs()[0].name

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._session.run(None, {self._name: x.contiguous().numpy()})[0])
