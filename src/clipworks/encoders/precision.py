"""Numbers and speed: exact fp32 on the fast matrix kernels, bf16 or fp16 weights where the hardware has them.

On many CPUs torch's default fp32 matrix product takes a slow path; precision "medium" takes one that is twice as
fast and, without special matrix units, just as exact. Whether it is exact here is measured once per process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ..errors import ClipworksError, check_choice

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = (*DTYPES, "auto")
TOLERANCE = 1e-5
# (rows, in, out) of the probe: few and many rows, square, widening and narrowing, odd sizes
SHAPES = ((1, 768, 768), (50, 768, 3072), (400, 3072, 768), (77, 513, 129))

class Switch:
    """A setting that torch keeps per process, at `value` while at least one block of any thread holds it there."""

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], None], value: Any):
        self.read, self.write, self.value = read, write, value
        self._lock, self._users, self._before = threading.Lock(), 0, value

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold it inside the block; what it was before comes back when the last block ends."""
        with self._lock:
            if self._users == 0:
                self._before = self.read()
                self.write(self.value)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self.write(self._before)


MEDIUM = Switch(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium")
NO_TF32 = Switch(lambda: torch.backends.cudnn.allow_tf32,
                 lambda value: setattr(torch.backends.cudnn, "allow_tf32", value), False)  # fmt: skip


def choose(precision: str, device: torch.device | str) -> str:
    """The precision that stands for "auto" on a device, after checking that the asked one can be used there.

    "auto" is bf16 on CUDA (fp16 where bf16 is missing) and fp32 elsewhere.

    Raises
    ------
    ClipworksError
        For an unknown name, and for fp16 on a CPU, where it is about a hundred times slower than bf16.
    """
    check_choice("precision", precision, PRECISIONS)
    kind = torch.device(device).type
    if precision == "auto":
        if kind != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if precision == "fp16" and kind == "cpu":
        raise ClipworksError(
            "precision 'fp16' is not offered on the CPU, which has no fast fp16 arithmetic. Use 'bf16' or 'fp32'."
        )
    return precision


def convert(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Bring weights to `dtype` in place; batch norms and single numbers (scale, bias) stay in float32."""
    for part in module.modules():
        exact = isinstance(part, nn.modules.batchnorm._BatchNorm)
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(torch.float32 if exact or tensor.ndim == 0 else dtype)
                tensor.grad = None
    return module


@lru_cache(maxsize=1)
def fast_matmul_error() -> float:
    """Largest relative error of the fast path over a few products, against float64 (measured once, some ms)."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the user steers torch's newer per-backend switches; hands off
        return float("inf")
    try:
        torch.set_float32_matmul_precision("medium")
        for rows, inner, outer in SHAPES:
            x, w = (torch.randn(n, inner, generator=generator) for n in (rows, outer))
            exact = x.double() @ w.double().T
            for product in (nn.functional.linear(x, w), torch.matmul(x[None], w.T[None])[0]):
                worst = max(worst, float((product.double() - exact).norm() / exact.norm()))
    finally:
        torch.set_float32_matmul_precision(before)
    return worst


@contextmanager
def fast_matmul(device: torch.device | str = "cpu") -> Iterator[bool]:
    """Use the fast fp32 path on the CPU inside the block if it is exact here; always restored afterwards.

    Gives True if the fast path is in use. Blocks may be nested and may run in several threads.
    """
    if torch.device(device).type != "cpu" or fast_matmul_error() >= TOLERANCE:
        yield False
        return
    with MEDIUM.held():
        yield True


@contextmanager
def exact_convolutions(device: torch.device | str) -> Iterator[None]:
    """Convolutions of fp32 in fp32 on a CUDA device too, where torch lets cuDNN round what is multiplied to 10 bits
    (TF32) unless told otherwise: 5e-4 in the vectors of the bundled encoder."""
    if torch.device(device).type != "cuda":
        yield
        return
    with NO_TF32.held():
        yield
