"""Fine-tuning with safe defaults, and a report of what was forgotten.

A preset says what learns; a probe set, on which the model was good before, is measured before and after. Labels train
a classifier head that begins as the class words (so step 0 is the zero-shot model); captions train contrastively.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from ..atomic import write_atomically, write_json
from ..data.item import Item
from ..errors import ClipworksError, check_choice, check_range, closest
from ..zeroshot.classifier import class_vectors
from ..zeroshot.templates import resolve_templates
from .augment import Augment, resolve_augment
from .evaluate import Probe, change_rows, evaluate
from .feed import open_items
from .gather import rank
from .loop import train
from .presets import PRESETS, Stage
from .recipe import ContrastiveRecipe
from .run import resolve_model, start_processes
from .towers import Towers
from .wise_ft import interpolate

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder


@dataclass
class FinetuneReport:
    """What fine-tuning did, on the task and on what the model could do before.

    Attributes
    ----------
    out, model, preset, alpha : the folder, the weights in it, how they came about
    stages : the report of every training run
    task, probe : name of a measure -> (before, after), in percent
    forgotten : name of a measure of the probe -> points lost (negative: gained)
    head : the classifier's file, if labels were trained; its rows are `names`
    encoder : the fine-tuned encoder
    """

    out: str
    model: str
    preset: str
    alpha: float
    stages: list[dict[str, Any]]
    task: dict[str, tuple[float, float]] = field(default_factory=dict)
    probe: dict[str, tuple[float, float]] = field(default_factory=dict)
    forgotten: dict[str, float] = field(default_factory=dict)
    head: str | None = None
    names: list[str] | None = None
    encoder: Encoder | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the encoder, ready for JSON."""
        return {name: value for name, value in vars(self).items() if name != "encoder"}

    def as_rows(self) -> list[dict[str, Any]]:
        """One dictionary per measure: where, what, before, after, change."""
        return change_rows(task=self.task, probe=self.probe)


class ClassifierRecipe(nn.Module):
    """Cross-entropy of a linear head on unit image features, at the encoder's logit scale.

    Parameters
    ----------
    names : class of every label, in the order of the rows
    vectors : start of the head, unit rows of shape (classes, dim)
    augment : how views are drawn
    """

    split, captions = True, False

    def __init__(self, names: Sequence[str], vectors: torch.Tensor, augment: Augment | None):
        super().__init__()
        self.plain = ContrastiveRecipe("infonce", augment)
        self.place = {name: i for i, name in enumerate(names)}
        self.head = nn.Linear(vectors.shape[1], vectors.shape[0], bias=False, dtype=vectors.dtype)
        with torch.no_grad():
            self.head.weight.copy_(vectors)

    @property
    def settings(self) -> dict[str, Any]:
        return {"names": list(self.place), "augment": repr(self.plain.augment)}

    def bind(self, encoder: Encoder, pool: Any) -> None:
        self.plain.bind(encoder, pool)

    def batch(self, items: Sequence[Item], step: int, rng: np.random.Generator) -> dict[str, Any]:
        labels = torch.tensor([self.place[str(item.label)] for item in items])
        return {"pixels": self.plain.pixels(items, rng.spawn(len(items))), "labels": labels}

    def features(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        logits = encoder.log_scale.exp() * self.head(encoder.encode_image(batch["pixels"]))
        return {"logits": logits, "labels": batch["labels"]}

    def losses(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # the mean over processes of the means over their rows: no gathering is needed
        return {"cross_entropy": F.cross_entropy(features["logits"], features["labels"])}

    def forward(self, encoder: Encoder, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return self.losses(self.features(encoder, batch))


class SentenceRecipe(ContrastiveRecipe):
    """Contrastive training in which a label speaks through a random template (FLYP); captions speak for themselves."""

    def __init__(self, names: Mapping[str, str] | None, templates: Sequence[str], augment: Augment | None):
        super().__init__("infonce", augment)
        self.names, self.templates, self.captions = names, list(templates), names is None

    def texts(self, items: Sequence[Item], draws: Sequence[np.random.Generator]) -> list[str]:
        if self.names is None:
            return super().texts(items, draws)
        chosen = [self.templates[int(draw.integers(len(self.templates)))] for draw in draws]
        return [t.replace("{}", self.names[str(item.label)]) for t, item in zip(chosen, items, strict=True)]


def finetune(
    data: Any,
    model: str | Encoder = "clipworks-small",
    preset: str = "full",
    *,
    out: str | Path,
    names: Sequence[str] | Mapping[str, str] | None = None,
    templates: str | Sequence[str] = "default",
    validation: str | Any = None,
    probe: str | Any = None,
    probe_names: Sequence[str] | Mapping[str, str] | None = None,
    alpha: float | None = None,
    lr: float | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    micro_batch: int | None = None,
    layer_decay: float | None = None,
    augment: str | Augment = "light",
    clip: float | None = 1.0,
    precision: str = "fp32",
    distributed: str = "ddp",
    device: str = "auto",
    workers: int | None = None,
    on_error: str = "raise",
    seed: int = 0,
    resume: str = "auto",
    progress: bool | None = None,
) -> FinetuneReport:
    """Fine-tune an encoder on a small set and report what it forgot.

    Parameters
    ----------
    data : images with labels, or with captions; anything `open_source` takes
    model : name, path or encoder; an encoder is not changed
    preset : "full" (image tower and head), "head" (linear probe from the class words), "lp-ft" (head, then full),
        "flyp" (contrast with class sentences), "wise-ft" (full, averaged with the start)
    out : folder of the run: stages, model.safetensors, head.safetensors, forgetting.json
    names : class names, or label -> name (default: the labels)
    templates : sentences around the names
    validation : set on which the task is measured before and after (never trained on)
    probe : set on which the model should stay good: labels give zero-shot accuracy, captions recall
    probe_names : class names of the probe's labels
    alpha : share of the fine-tuned weights in the result (default: the preset's; wise-ft 0.5)
    lr, epochs, batch_size : instead of the preset's
    micro_batch, layer_decay, augment, precision, distributed, device, workers, on_error, seed, resume : as in `train`
    clip : greatest norm of the gradient
    progress : show a bar

    Returns
    -------
    FinetuneReport

    Raises
    ------
    ClipworksError
        If the data has neither labels nor captions, or a label has no name.
    """
    chosen = PRESETS[check_choice("preset", preset, PRESETS)]
    alpha = check_range("alpha", chosen.alpha if alpha is None else alpha, 0, 1)
    accelerator = start_processes(device, 600.0)
    out, items = Path(out), open_items(data)
    encoder = resolve_model(model, seed).to(accelerator.device)
    table = _names(items, names)
    probes = {
        "task": None if validation is None else Probe.open(validation, table, templates),
        "probe": None if probe is None else Probe.open(probe, probe_names, templates, "probe"),
    }
    before = {name: _measure(encoder, p) for name, p in probes.items() if p is not None}
    start = {name: value.clone() for name, value in encoder.state_dict().items()}
    head = None if table is None else class_vectors(list(table.values()), encoder, templates=templates).cpu()
    words, views, reports = head, resolve_augment(augment), []
    size = min(len(items), chosen.batch_size if batch_size is None else batch_size)
    for number, planned in enumerate(chosen.stages, 1):
        stage = _changed(planned, table, lr, epochs)
        if stage.objective == "classify":
            recipe: Any = ClassifierRecipe(list(table or ()), head, views)  # type: ignore[arg-type]
        else:
            recipe = SentenceRecipe(table, resolve_templates(templates), views)
        report = train(
            items, encoder, out=out / f"stage-{number}", recipe=recipe, epochs=stage.epochs, batch_size=size,
            micro_batch=micro_batch, lr=stage.lr, weight_decay=stage.weight_decay, warmup=stage.warmup, clip=clip,
            freeze=_freeze(stage, encoder), layer_decay=layer_decay, precision=precision, distributed=distributed,
            device=device, workers=workers, on_error=on_error, seed=seed, resume=resume, progress=progress,
        )  # fmt: skip
        reports.append(report.as_dict())
        encoder = report.encoder  # type: ignore[assignment]
        if stage.objective == "classify":
            head = report.parts["head.weight"]
    encoder.load_state_dict(interpolate(start, encoder.state_dict(), alpha))
    encoder.refresh()
    found = FinetuneReport(str(out), str(out / "model.safetensors"), preset, alpha, reports, encoder=encoder)
    after = {name: _measure(encoder, p) for name, p in probes.items() if p is not None}
    found.task, found.probe = ({k: (v, after[n][k]) for k, v in before.get(n, {}).items()} for n in ("task", "probe"))
    found.forgotten = {name: one - two for name, (one, two) in found.probe.items()}
    if table is not None and chosen.stages[-1].objective == "classify":
        head = interpolate({"weight": words}, {"weight": head}, alpha)["weight"]  # type: ignore[dict-item]
        found.head, found.names = str(out / "head.safetensors"), list(table.values())
        if probes["task"] is not None:
            first = before["task"]["zeroshot_accuracy"]
            found.task["head_accuracy"] = (first, _head_accuracy(encoder, head, probes["task"], list(table)))
    _write(found, head)
    return found


def _names(items: Sequence[Item], names: Sequence[str] | Mapping[str, str] | None) -> dict[str, str] | None:
    """Return label -> name, or None where the items have captions and no labels."""
    labels = sorted({str(item.label) for item in items if item.label})
    if not labels:
        if names is not None:
            raise ClipworksError("names need labels, and data has none.")
        return None
    if bare := [item.key for item in items if not item.label]:
        raise ClipworksError(f"data must give every image a label. {len(bare)} have none, for example {bare[0]!r}.")
    table = dict(names) if isinstance(names, Mapping) else {name: name for name in names or labels}
    if unknown := [label for label in labels if label not in table]:
        hint = closest(unknown[0], table)
        raise ClipworksError(f"names must hold every label of data. Missing: {unknown[0]!r}.{hint}")
    return table


def _changed(stage: Stage, table: dict[str, str] | None, lr: float | None, epochs: int | None) -> Stage:
    """Return the stage with the user's numbers; captions can only be contrasted."""
    objective = stage.objective if table is not None else "contrast"
    lr, epochs = stage.lr if lr is None else lr, epochs or stage.epochs
    return dataclasses.replace(stage, objective=objective, lr=lr, epochs=epochs)


def _freeze(stage: Stage, encoder: Encoder) -> tuple[str, ...]:
    """Return what does not learn. The scale never does: small sets make it drift."""
    if stage.objective == "classify":
        return ("text.*", "log_scale") if stage.learns == "all" else ("*", "!recipe.head.weight")
    if stage.learns == "all":
        return ("log_scale",)
    names = [name for name, _ in encoder.named_parameters()]
    lasts = ("visual.projection", "visual.pool", "visual.norm_post"), ("text.projection", "text.norm")
    tops = [next((last for last in each if any(n.startswith(f"{last}.") for n in names)), None) for each in lasts]
    return ("*", *(f"!{top}.*" for top in tops if top))


def _measure(encoder: Encoder, probe: Probe) -> dict[str, float]:
    return evaluate(Towers(encoder, None), encoder, probe)  # type: ignore[arg-type]


def _head_accuracy(encoder: Encoder, head: torch.Tensor, probe: Probe, labels: list[str]) -> float:
    rows = encoder.images([item.source() for item in probe.items])
    head = head.cpu()
    hit = (rows @ head.T).argmax(1) == torch.tensor([labels.index(str(item.label)) for item in probe.items])
    return 100 * hit.double().mean().item()


def _write(report: FinetuneReport, head: torch.Tensor | None) -> None:
    from ..encoders.loading import save

    if rank():
        return
    out = Path(report.out)
    save(report.encoder, out / "model.safetensors")  # type: ignore[arg-type]
    if report.head is not None and head is not None:
        write_atomically(Path(report.head), lambda path: save_file({"weight": head.contiguous()}, path))
    write_json(out / "forgetting.json", report.as_dict())
