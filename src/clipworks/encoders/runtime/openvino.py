"""OpenVINO: fp32, bf16 where the processor has it, and int8 by post-training quantisation with NNCF."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ...errors import ClipworksError, need

PRECISIONS = ("fp32", "bf16", "int8")
SUFFIXES = (".xml", ".bin")
FIRST = 4  # convolutions at the front that the careful recipe leaves in floating point
_HINTS = {"fp32": "f32", "int8": "f32", "bf16": "bf16"}


def library() -> Any:
    """OpenVINO, silent and without its usage reports: importing it would otherwise contact a server of its makers."""
    # where the reporting package cannot be imported, OpenVINO and NNCF put an empty stand-in in its place
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return need("openvino", "export")


def write(program: torch.export.ExportedProgram, name: str, path: Path) -> None:
    """Convert a traced tower and write `<path>.xml` and `<path>.bin`; `name` becomes that of its input."""
    openvino = library()
    with warnings.catch_warnings():  # torch's, of what OpenVINO still uses
        warnings.simplefilter("ignore")
        model = openvino.convert_model(program)
    model.inputs[0].get_tensor().set_names({name})
    openvino.save_model(model, path.with_suffix(".xml"), compress_to_fp16=False)


def recipes(path: Path) -> list[str]:
    """Ways to quantise the graph at `path`, the fastest result first: "careful" keeps depthwise convolutions and the
    first ones in floating point, "smooth" moves outliers of a transformer's channels into its weights."""
    model = library().Core().read_model(path.with_suffix(".xml"))
    depthwise = any(op.get_type_name() == "GroupConvolution" for op in model.get_ordered_ops())
    return ["plain", "careful"] if depthwise else ["smooth", "plain"]


def quantise(path: Path, recipe: str, batches: Sequence[torch.Tensor], out: Path) -> None:
    """Write the int8 form of the graph at `path`, its ranges taken from batches of the user's own images."""
    openvino = library()
    nncf = need("nncf", "export")
    logging.getLogger("nncf").setLevel(logging.ERROR)
    model = openvino.Core().read_model(path.with_suffix(".xml"))
    options: dict[str, Any] = {"preset": nncf.QuantizationPreset.MIXED, "subset_size": len(batches)}
    if recipe == "smooth":
        options["model_type"] = nncf.ModelType.TRANSFORMER
    if recipe == "careful":
        dense = [op.get_friendly_name() for op in model.get_ordered_ops() if op.get_type_name() == "Convolution"]
        options["ignored_scope"] = nncf.IgnoredScope(names=dense[:FIRST], types=["GroupConvolution"])
    with contextlib.redirect_stdout(sys.stderr):  # its progress bars
        small = _apart(nncf.quantize, model, nncf.Dataset([batch.numpy() for batch in batches]), **options)
    openvino.save_model(small, out.with_suffix(".xml"), compress_to_fp16=False)


def _apart(work: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Do what loads OpenVINO's plugin for the processor in a thread of its own.

    The plugin gives the thread that loads it another stack for signals. Two of them that are dropped in the order in
    which they came leave a stack there that is freed, and the next signal to the main thread ended the process.
    """
    with ThreadPoolExecutor(1, "clipworks-openvino") as thread:
        return thread.submit(work, *args, **options).result()


class Session:
    """A compiled graph; may be called from several threads.

    Parameters
    ----------
    path : the graph, without suffix
    precision : in which what is not quantised is computed, "fp32", "bf16" or "int8" (fp32)

    Raises
    ------
    ClipworksError
        If this processor does not compute in that precision, so that other vectors than those measured would come.
    """

    def __init__(self, path: Path, precision: str):
        core = library().Core()
        # without it a file that is still mapped could not be replaced or removed everywhere
        core.set_property({"ENABLE_MMAP": False})
        options = {"INFERENCE_PRECISION_HINT": _HINTS[precision], "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        try:
            self._model = _apart(core.compile_model, core.read_model(path.with_suffix(".xml")), "CPU", options)
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[-1][:200]
            raise ClipworksError(f"{path}: OpenVINO cannot compile it ({reason}).") from error
        used = str(self._model.get_property("INFERENCE_PRECISION_HINT"))
        if precision == "bf16" and "bfloat16" not in used:
            raise ClipworksError(f"precision 'bf16' needs a processor that has bf16. This one would use {used}.")
        self._request = self._model.create_infer_request()
        self._lock = threading.Lock()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        with self._lock:
            found = self._request.infer([x.contiguous().numpy()], share_inputs=True)
            return torch.from_numpy(found[0].copy())
