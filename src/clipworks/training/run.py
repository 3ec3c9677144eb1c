"""One run's moving parts: processes, towers, optimizer, moving average, and their way to disk and back."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from ..atomic import write_atomically, write_json
from ..errors import ClipworksError, check_choice, naming, need
from .checkpoint import checkpoints, newest_checkpoint, read_state, read_tensors, save_checkpoint
from .ema import EMA
from .gather import agree, processes, rank
from .optim import BETAS, adamw, parameter_groups, still
from .optim import freeze as freeze_parameters
from .recipe import Recipe
from .towers import Towers, bare, like, shard, whole

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder
    from .loop import TrainReport


def start_processes(device: str, timeout: float) -> Any:
    """Return accelerate's `Accelerator`, joined with the other processes if a launcher started several."""
    check_choice("device", device, ("auto", "cpu"))
    accelerate = need("accelerate", "train")
    from datetime import timedelta

    cpu = device == "cpu" or not torch.accelerator.is_available()
    if accelerate.state.is_initialized():
        state = accelerate.state.AcceleratorState()
        if state.num_processes == 1 and (state.device.type == "cpu") != cpu:
            state._reset_state(reset_partial_state=True)  # an earlier run of this process was on another device
    return accelerate.Accelerator(
        cpu=cpu,
        kwargs_handlers=[
            # a recipe may leave a tower or the bias out of some losses
            accelerate.DistributedDataParallelKwargs(find_unused_parameters=True),
            accelerate.InitProcessGroupKwargs(timeout=timedelta(seconds=timeout)),
        ],
    )


def resolve_model(model: Any, seed: int) -> Encoder:
    """Return an encoder that may be changed: a copy, a fresh one of a configuration (or its JSON file), or loaded."""
    from ..encoders.config import EncoderConfig
    from ..encoders.encoder import Encoder

    if isinstance(model, str | Path) and str(model).endswith(".json"):
        model = EncoderConfig.from_dict(json.loads(Path(model).read_text(encoding="utf-8")))
    if isinstance(model, Encoder):
        return copy.deepcopy(model)
    if isinstance(model, EncoderConfig):
        from ..encoders.tokenizers.bpe import CLIPTokenizer

        if model.text.tokenizer != "clip-bpe":
            raise ClipworksError(
                f"model is a configuration with the tokenizer {model.text.tokenizer!r}. Only 'clip-bpe' is known by "
                "name; give an Encoder(config, tokenizer) instead."
            )
        return Encoder(model, CLIPTokenizer(model.text.pad_id), seed=seed)
    from ..encoders.loading import load

    with naming("model"):
        return load(model)


class Run:
    """Everything that a step changes.

    Parameters
    ----------
    accelerator : from `start_processes`
    encoder : where training starts
    recipe : what a step does
    out : folder of the run; None writes nothing
    precision, distributed, freeze, lr, weight_decay, layer_decay, betas, eps, ema, rates, no_decay : as in `train`
    pool : decoding threads

    Attributes
    ----------
    model : the towers as wrapped for the processes; `towers` : the same without the wrapper
    encoder : the encoder as given (tokenizer, preprocessing; it receives the weights at the end)
    optimizer, average : AdamW, and the moving average or None
    losses, metrics : last numbers
    """

    def __init__(
        self,
        accelerator: Any,
        encoder: Encoder,
        recipe: Recipe,
        out: Path | None,
        *,
        precision: str,
        distributed: str,
        freeze: Sequence[str],
        lr: float,
        weight_decay: float,
        layer_decay: float | None,
        betas: Sequence[float] | None,
        eps: float | None,
        ema: float | None,
        pool: Executor | None,
        rates: Mapping[str, float] | None = None,
        no_decay: Sequence[str] = (),
    ):
        self.out, self.recipe, self.encoder = out, recipe, encoder
        self.device = accelerator.device
        self.losses: dict[str, float] = {}
        self.metrics: dict[str, dict[str, float]] = {}
        if hasattr(recipe, "bind"):
            recipe.bind(encoder, pool)
        towers = Towers(copy.deepcopy(encoder), recipe, precision).to(self.device)
        if freeze:
            freeze_parameters(towers, freeze, prefix="encoder.")
        self.sharded = distributed == "fsdp"
        self.model = shard(towers) if self.sharded else accelerator.prepare_model(towers)
        self.towers = bare(self.model)
        usual, tiny = BETAS["resnet" if encoder.config.vision.kind == "resnet" else "vit"]
        groups = parameter_groups(self.towers.named_parameters(), weight_decay=weight_decay, layer_decay=layer_decay,
                                  rates=rates, no_decay=no_decay)  # fmt: skip
        first, second = betas or usual
        self.optimizer = adamw(groups, lr=lr, betas=(first, second), eps=tiny if eps is None else eps)
        self.learning = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.average = None if ema is None else EMA(self.towers, ema)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.towers.encoder.parameters()).dtype

    @property
    def scale(self) -> float:
        """The logit scale."""
        return float(whole(self.towers.encoder.log_scale).exp().item())

    def keep_still(self) -> None:
        """Put frozen batch normalisation into evaluation mode."""
        still(self.towers)

    @torch.no_grad()
    def clamp_scale(self, highest: float) -> None:
        """Keep the log of the logit scale in [0, log(highest)]."""
        if self.towers.encoder.log_scale.requires_grad:
            self.towers.encoder.log_scale.clamp_(0.0, math.log(highest))

    def record(self, step: int, found: dict[str, float]) -> None:
        """Remember the first and the last evaluation."""
        self.metrics.setdefault("before", found)
        self.metrics["last"] = found

    def save(self, step: int, keep: int) -> None:
        """Write a checkpoint; all processes call, the first one writes."""
        if self.out is None or (rank() and not self.sharded):
            return
        tensors = {f"model.{name}": whole(value) for name, value in self.towers.state_dict().items()}
        for name, parameter in self._learning_by_name():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = whole(value)
        if self.average is not None:
            tensors |= {f"ema.{name}": whole(value) for name, value in self.average.state.items()}
        if rank() == 0:
            state = {"processes": processes(), "settings": self.settings}
            numbers = {"losses": self.losses, "metrics": self.metrics}
            save_checkpoint(self.out / "checkpoints", step, tensors, state | numbers, keep)

    def resume(self, settings: dict[str, Any], resume: str) -> int:
        """Return the step to go on from: 0, or that of the newest undamaged checkpoint, whose state is loaded."""
        self.settings = settings
        if self.out is None:
            return 0
        folder = self.out / "checkpoints"
        if resume == "never" and checkpoints(folder):
            raise ClipworksError(f"out must be a new folder with resume='never'. {str(self.out)!r} has checkpoints.")
        found = newest_checkpoint(folder) if rank() == 0 else None
        step = agree(found[0]["step"] if found else 0, self.device)
        if not step:
            return 0
        path = folder / f"step-{step:09d}.json"
        state = found[0] if found else read_state(path)
        self._check(state)
        self._load(read_tensors(path.with_suffix(".safetensors")))
        self.losses, self.metrics = state["losses"], state["metrics"]
        return step

    def _check(self, state: dict[str, Any]) -> None:
        for name, value in self.settings.items():
            if state["settings"].get(name) != value:
                raise ClipworksError(
                    f"{name} differs from the run in {str(self.out)!r}: it began with {state['settings'].get(name)!r}, "
                    f"now {value!r}. Take another out, or the same {name}."
                )
        if state["processes"] != processes():
            warnings.warn(f"going on with {processes()} processes; the run began with {state['processes']}. "
                          "Sums are rounded in another order.", stacklevel=3)  # fmt: skip

    @torch.no_grad()
    def _load(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, value in self.towers.state_dict().items():
            value.copy_(like(tensors[f"model.{name}"].reshape(value.shape), value))
        for name, parameter in self._learning_by_name():
            prefix = f"optimizer.{name}."
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if own:
                self.optimizer.state[parameter] = {
                    key: value if key == "step" else like(value.reshape(parameter.shape), parameter)
                    for key, value in own.items()
                }
        if self.average is not None:
            now = self.average.state
            self.average.load({name: like(tensors[f"ema.{name}"].reshape(v.shape), v) for name, v in now.items()})

    def _learning_by_name(self) -> list[tuple[str, torch.nn.Parameter]]:
        groups = self.optimizer.param_groups
        return [pair for group in groups for pair in zip(group["names"], group["params"], strict=True)]

    def finish(self, report: TrainReport) -> TrainReport:
        """Write the trained weights and the report, and hand over the encoder."""
        from ..encoders.loading import save

        weights = {"model": self.towers.state_dict()}
        if self.average is not None:
            weights = {"ema": self.average.state} | weights  # the model last: its encoder is handed over
        for file, state in weights.items():
            everything = {n: whole(v) for n, v in state.items()}
            full = {n.removeprefix("encoder."): v for n, v in everything.items() if n.startswith("encoder.")}
            report.parts = {n.removeprefix("recipe."): v for n, v in everything.items() if n.startswith("recipe.")}
            own = self.encoder.state_dict()
            self.encoder.load_state_dict({n: v.reshape(own[n].shape) for n, v in full.items()})
            self.encoder.refresh()
            if self.out is not None and rank() == 0:
                save(self.encoder, self.out / f"{file}.safetensors")
        report.encoder = self.encoder
        if self.out is not None and rank() == 0:
            if report.parts:
                parts = {name: value.contiguous() for name, value in report.parts.items()}
                write_atomically(self.out / "parts.safetensors", lambda path: save_file(parts, path))
            write_json(self.out / "report.json", report.as_dict())
        return report
