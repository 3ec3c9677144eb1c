"""The module that is trained: an encoder and its recipe behind one `forward`, so that DDP and FSDP can wrap it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..errors import ClipworksError
from .gather import processes
from .recipe import Recipe

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

PRECISIONS = ("fp32", "bf16")
DISTRIBUTED = ("ddp", "fsdp")


class Towers(nn.Module):
    """An encoder with its recipe.

    Parameters
    ----------
    encoder : the encoder
    recipe : what a step does with it; a recipe that is an `nn.Module` has its parameters trained as well
    precision : "fp32", or "bf16" to compute the forward pass in bfloat16 with float32 weights and losses
    """

    def __init__(self, encoder: Encoder, recipe: Recipe, precision: str = "fp32"):
        super().__init__()
        self.encoder = encoder
        self.recipe = recipe
        self.precision = precision

    def forward(self, batch: dict[str, Any], task: str = "features") -> dict[str, torch.Tensor]:
        """Run `recipe.features`, `recipe.forward`, or plain encoding ("encode") on a batch."""
        run = encode if task == "encode" else getattr(self.recipe, task)
        device = next(self.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
            found = run(self.encoder, batch)
        # similarities and log-sum-exp in float32
        return {k: v.float() if v.dtype in (torch.bfloat16, torch.float16) else v for k, v in found.items()}


def encode(encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Encode whatever a batch holds of `pixels` and `tokens`."""
    found = {}
    if "pixels" in batch:
        found["image"] = encoder.encode_image(batch["pixels"])
    if "tokens" in batch:
        found["text"] = encoder.encode_text(batch["tokens"])
    return found


def to_device(batch: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Move a batch's tensors; floating ones take the weights' dtype."""

    def move(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None, non_blocking=True)

    return {name: move(value) for name, value in batch.items()}


def seed_torch(*numbers: int) -> None:
    """Seed torch's generators from a tuple such as (seed, step, process, piece): dropout is a function of these."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def shard(towers: Towers) -> nn.Module:
    """Shard parameters, gradients and optimizer state over the processes (FSDP), block by block."""
    if processes() == 1:
        raise ClipworksError("distributed='fsdp' needs several processes: torchrun --nproc-per-node N -m clipworks ...")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(towers.parameters()).device.type, (processes(),))
    for part in towers.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.ndim == 0:  # a scalar cannot be sharded; features() reshapes log_scale.exp() to ()
                setattr(part, name, nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad))
    for name, part in list(towers.named_modules()):
        if isinstance(part, nn.ModuleList) and name.endswith("blocks"):
            for block in part:
                fully_shard(block, mesh=mesh)
    fully_shard(towers, mesh=mesh)  # in place: the module gets a class that shards
    return towers


def unsynchronised(model: Any) -> AbstractContextManager:
    """Return the context in which a wrapped model does not yet average gradients over processes."""
    if hasattr(model, "no_sync"):
        return model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):
        return _Unsynchronised(model)
    return nullcontext()


class _Unsynchronised(AbstractContextManager):
    def __init__(self, model: Any):
        self.model = model

    def __enter__(self) -> None:
        self.model.set_requires_gradient_sync(False)

    def __exit__(self, *_: Any) -> None:
        self.model.set_requires_gradient_sync(True)


def bare(model: Any) -> Towers:
    """Return the `Towers` inside a DDP wrapper, or the (possibly sharded) `Towers` itself."""
    return getattr(model, "module", model)


@torch.no_grad()
def whole(value: torch.Tensor) -> torch.Tensor:
    """Return a tensor in full on the CPU; of a sharded one every process must ask."""
    value = value.detach()
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).cpu()


@torch.no_grad()
def like(value: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Return a full tensor placed, sharded and typed as `model` is."""
    if hasattr(model, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value.to(model.device), model.device_mesh, model.placements)  # type: ignore[attr-defined]
    return value.to(model.device)
