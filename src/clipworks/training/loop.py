"""The one training loop: image-text pairs, one process or many, exact large batches, exact resume.

    for every step:  batch (made ahead in threads) -> losses and gradients -> clip -> AdamW -> clamp scale -> EMA

What a step computes is the recipe's business (`recipe.py`); how gradients of large batches are had on little memory,
`gradcache.py`; how processes share a batch, `gather.py`. Every draw is a function of (seed, step, sample).
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.loader import available_cores, one_core
from ..errors import ClipworksError, check_choice, check_range
from ..progress import Progress
from .augment import Augment, resolve_augment
from .evaluate import Probe, evaluate
from .feed import Feed, Order, ahead, data_digest, open_items, open_pairs
from .gather import mean_over_processes, processes, rank
from .gradcache import cached_backward
from .log import Log
from .recipe import Recipe, resolve_recipe
from .run import Run, resolve_model, start_processes
from .schedule import SCHEDULES, learning_rate, warmup_steps
from .towers import DISTRIBUTED, PRECISIONS, seed_torch, to_device, unsynchronised

if TYPE_CHECKING:
    from ..encoders.config import EncoderConfig
    from ..encoders.encoder import Encoder


@dataclass
class TrainReport:
    """What a run did.

    Attributes
    ----------
    out : its folder; `model` : the trained weights in it (the averaged ones are `ema.safetensors` beside it); None if
        nothing was written
    steps, epochs : optimizer steps, and passes over the data
    losses : the last step's, by name
    before, metrics : the first and the last evaluation, by name, in percent
    resumed_from : step at which this call went on, or None
    seconds, pairs_per_second, wait_share : time of this call, its speed, the share spent waiting for data
    replaced : key -> reason of images that could not be used
    encoder : the trained encoder
    parts : the trained parameters of a recipe that has some, by name
    """

    out: str | None
    model: str | None
    steps: int
    epochs: float
    losses: dict[str, float]
    before: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    resumed_from: int | None = None
    seconds: float = 0.0
    pairs_per_second: float = 0.0
    wait_share: float = 0.0
    replaced: dict[str, str] = field(default_factory=dict)
    encoder: Encoder | None = field(default=None, repr=False)
    parts: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the weights, ready for JSON."""
        return {name: value for name, value in vars(self).items() if name not in ("encoder", "parts")}


def train(
    data: Any,
    model: EncoderConfig | str | Encoder = "clipworks-small",
    *,
    out: str | Path | None,
    loss: str | Callable[..., Any] = "infonce",
    recipe: Recipe | str | None = None,
    epochs: int = 32,
    steps: int | None = None,
    batch_size: int = 256,
    micro_batch: int | None = None,
    lr: float = 5e-4,
    weight_decay: float = 0.2,
    betas: Sequence[float] | None = None,
    eps: float | None = None,
    warmup: float = 0.1,
    schedule: str = "cosine",
    end_lr: float = 0.0,
    clip: float | None = None,
    max_scale: float = 100.0,
    precision: str = "fp32",
    ema: float | None = None,
    freeze: Sequence[str] = (),
    layer_decay: float | None = None,
    rates: Mapping[str, float] | None = None,
    no_decay: Sequence[str] = (),
    augment: str | Augment = "light",
    validation: str | Any = None,
    names: Sequence[str] | Mapping[str, str] | None = None,
    templates: str | Sequence[str] = "default",
    evaluate_every: int | None = None,
    save_every: int | None = None,
    keep: int = 2,
    log_every: int = 10,
    tensorboard: bool = False,
    distributed: str = "ddp",
    device: str = "auto",
    workers: int | None = None,
    on_error: str = "raise",
    timeout: float = 600.0,
    seed: int = 0,
    resume: str = "auto",
    progress: bool | None = None,
) -> TrainReport:
    """Train or fine-tune an encoder on image-text pairs.

    Parameters
    ----------
    data : anything `open_source` takes (folder, table, webdataset ...), or a list of (image, caption) pairs
    model : configuration (or JSON file of one) to train from scratch; name, weights file or encoder to go on from
    out : folder of the run: log.jsonl, checkpoints, model.safetensors, report.json; None writes nothing
    loss : registered loss (`clipworks methods losses`), or a function; a recipe has its own
    recipe : what a step does: a method of `pretraining/` by name, "slip" or "flip(drop=0.75)", or an object (see
        `training.recipe.Recipe`); default: one view, one caption, one loss
    epochs : passes over the data; whole batches only (CLIP: 32)
    steps : optimizer steps instead of epochs
    batch_size : pairs per step, over all processes together
    micro_batch : pairs encoded at a time per process; same gradient, less memory, a second forward pass
    lr : highest learning rate (5e-4: open_clip)
    weight_decay : of matrices; norms, biases, the scale get none (0.2: CLIP)
    betas, eps : of AdamW (open_clip: .9, .98 and 1e-6 for ViT, .9, .999 and 1e-8 for ResNet)
    warmup : steps of linear warm-up, or below 1 their share of the run
    schedule : "cosine", "linear" or "constant" after warm-up
    end_lr : where the schedule ends
    clip : greatest norm of the gradient
    max_scale : greatest logit scale; the scale stays in [1, max_scale] (100: CLIP)
    precision : "fp32", or "bf16" (weights, losses and optimizer stay float32)
    ema : decay of a moving average of the weights, saved as ema.safetensors (0.999 for short runs)
    freeze : shell patterns of parameters that do not learn, for example "text.*"
    layer_decay : factor on the learning rate per layer towards the input (fine-tuning: 0.75)
    rates : shell pattern of parameters -> factor on their learning rate, for example {"visual.*": 0.1}
    no_decay : shell patterns of further parameters without weight decay
    augment : views, of a named recipe too unless it has its own: "none", "light" (crop of 90 % and more), "standard"
        (50 %, flip), "strong"
    validation : set evaluated at the start and during training: labels give zero-shot accuracy, captions recall
    names : class names of the validation labels, or label -> name (default: the labels)
    templates : sentences around the names
    evaluate_every, save_every : steps between evaluations and checkpoints (default: an epoch)
    keep : checkpoints that stay
    log_every : steps between lines of the log
    tensorboard : also write TensorBoard files
    distributed : "ddp" or "fsdp" under torchrun or accelerate launch
    device : "auto" or "cpu"
    workers : decoding threads per process (default: one per core)
    on_error : "raise" at an unusable image, or "skip" to take another in its place
    timeout : seconds after which a process that waits for a dead one gives up
    seed : of weights, order, views and dropout
    resume : "auto" goes on from the newest checkpoint in `out`, "never" refuses a folder that has one
    progress : show a bar (default: on a terminal)

    Returns
    -------
    TrainReport

    Raises
    ------
    ClipworksError
        If an argument is out of range, the data has no captions, or the checkpoint belongs to another run.
    """
    check_choice("schedule", schedule, SCHEDULES)
    check_choice("precision", precision, PRECISIONS)
    check_choice("distributed", distributed, DISTRIBUTED)
    check_choice("resume", resume, ("auto", "never"))
    check_choice("on_error", on_error, ("raise", "skip"))
    for name, value in {"epochs": epochs, "keep": keep, "log_every": log_every, "max_scale": max_scale}.items():
        check_range(name, value, 1)
    check_range("lr", lr, 0)
    accelerator = start_processes(device, timeout)
    recipe = resolve_recipe(recipe, loss, resolve_augment(augment))
    items = open_pairs(data) if getattr(recipe, "captions", True) else open_items(data)
    probe = None if validation is None else Probe.open(validation, names, templates)
    order = getattr(recipe, "order", Order)(len(items), batch_size, seed)
    total = order.steps_per_epoch * epochs if steps is None else int(check_range("steps", steps, 1))
    split = bool(getattr(recipe, "split", False))
    if micro_batch is not None and not split:
        name = type(recipe).__name__
        raise ClipworksError(f"micro_batch needs a recipe split into features and losses. {name} is not.")
    pool = ThreadPoolExecutor(workers or available_cores(), "clipworks-decode", initializer=one_core)
    with _quiet_generators(), pool:
        run = Run(
            accelerator, resolve_model(model, seed), recipe, None if out is None else Path(out),
            precision=precision, distributed=distributed, freeze=freeze, lr=lr, weight_decay=weight_decay,
            layer_decay=layer_decay, betas=betas, eps=eps, ema=ema, pool=pool, rates=rates, no_decay=no_decay,
        )  # fmt: skip
        settings = {
            "recipe": type(recipe).__name__, **getattr(recipe, "settings", {}), "total": total,
            "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "warmup": warmup, "schedule": schedule,
            "end_lr": end_lr, "clip": clip, "precision": precision, "ema": ema, "freeze": list(freeze),
            "layer_decay": layer_decay, "seed": seed, "data": data_digest(items), "rates": dict(rates or {}),
            "no_decay": list(no_decay),
        }  # fmt: skip
        first = run.resume(settings, resume)
        feed = Feed(items, order, recipe, rank(), processes(), on_error)
        log = None
        if run.out is not None and rank() == 0:
            log = Log(run.out / "log.jsonl", step=first, tensorboard=tensorboard)
        saving, evaluating = save_every or order.steps_per_epoch, evaluate_every or order.steps_per_epoch
        warm = warmup_steps(warmup, total)

        def measure(step: int) -> None:
            if probe is None:
                return
            found = evaluate(run.model, run.encoder, probe, batch_size=min(64, batch_size), pool=pool)
            if run.average is not None and step:
                with run.average.applied(run.towers):
                    averaged = evaluate(run.model, run.encoder, probe, batch_size=min(64, batch_size), pool=pool)
                found |= {f"ema_{name}": value for name, value in averaged.items()}
            run.record(step, found)
            if log:
                log.write(step, found)

        if first == 0:
            measure(0)
        batches = ahead(feed.batch, range(first, total))
        bar = Progress(batches, total - first, "training", enabled=False if rank() else progress)
        began = time.perf_counter()
        with stoppable() as stop:
            for step, batch in enumerate(bar, first):
                rate = learning_rate(step, lr=lr, total=total, warmup=warm, schedule=schedule, end=end_lr)
                losses, norm = take_step(run, batch, step, rate, split=split, micro_batch=micro_batch, clip=clip,
                                         max_scale=max_scale, seed=seed)  # fmt: skip
                done = step + 1
                if done % log_every == 0 or done == total:
                    run.losses = _shown(losses, done)
                    numbers = {**run.losses, "lr": rate, "scale": run.scale, "gradient_norm": norm.item()}
                    speed = (done - first) * batch_size / (time.perf_counter() - began)
                    if log:
                        numbers |= {"pairs_per_second": round(speed, 2), "data_wait": round(bar.wait_share, 4)}
                        log.write(done, numbers)
                if done % evaluating == 0 or done == total:
                    measure(done)
                if done % saving == 0 or done == total or stop.is_set():
                    run.save(done, keep)
                if stop.is_set():
                    raise KeyboardInterrupt
        if log:
            log.close()
        seconds = time.perf_counter() - began
        folder, model_file = (None, None) if run.out is None else (str(run.out), str(run.out / "model.safetensors"))
        return run.finish(TrainReport(
            folder, model_file, total, total / order.steps_per_epoch, run.losses,
            run.metrics.get("before", {}), run.metrics.get("last", {}), first or None, round(seconds, 3),
            round((total - first) * batch_size / seconds, 2), round(bar.wait_share, 4), feed.bad,
        ))  # fmt: skip


def take_step(
    run: Run,
    batch: dict[str, Any],
    step: int,
    rate: float,
    *,
    split: bool,
    micro_batch: int | None,
    clip: float | None,
    max_scale: float,
    seed: int,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Do one optimizer step; return this process's losses and the norm of the gradient before clipping."""
    run.model.train()
    run.keep_still()
    batch = to_device(batch, run.device, run.dtype)
    if split:
        losses = cached_backward(
            run.model, run.recipe.losses, batch, micro_batch=micro_batch,  # type: ignore[attr-defined]
            before=lambda piece: seed_torch(seed, step, rank(), piece),
            unsynchronised=lambda: unsynchronised(run.model),
        )  # fmt: skip
    else:
        seed_torch(seed, step, rank(), 0)
        losses = run.model(batch, "forward")
        torch.stack(list(losses.values())).sum().backward()
        losses = {name: value.detach() for name, value in losses.items()}
    norm = torch.nn.utils.clip_grad_norm_(run.learning, math.inf if clip is None else clip)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.clamp_scale(max_scale)
    if run.average is not None:
        run.average.update(run.towers)
    return losses, norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _shown(losses: dict[str, torch.Tensor], step: int) -> dict[str, float]:
    """Return the losses averaged over processes with their sum; a loss that is not finite ends the run."""
    values = mean_over_processes(torch.stack(list(losses.values()))).tolist()
    total = sum(values)
    if not math.isfinite(total):
        raise ClipworksError(f"the loss is {total} at step {step}. Lower lr, lengthen warmup or set clip (usual: 1.0).")
    return {"loss": total, **(dict(zip(losses, values, strict=True)) if len(values) > 1 else {})}


@contextmanager
def _quiet_generators() -> Iterator[None]:
    """Leave the caller's torch generators as they were."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def stoppable() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into an event, so that the step under way ends and is saved.

    With several processes, or outside the main thread, signals keep their meaning and the last checkpoint stands.
    """
    asked = threading.Event()
    if processes() > 1 or threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def stop(*_: Any) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in before:
        signal.signal(number, stop)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
