"""`clipworks train`, `clipworks distill`, `clipworks finetune`: the training loop from a shell."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ._command import command
from ._output import Json, emit, facts, note

RESUME = "The same command goes on from the newest checkpoint."
Data = Annotated[str, typer.Argument(help="Folder, table, webdataset or list of images with captions (or labels).")]
Out = Annotated[str, typer.Option("--out", help="Folder of the run.")]


@command("training.loop.train", hide=("data",), resume=RESUME)
def train(data: Data, *, out: Out, json: Json = False, **options: Any) -> None:
    """Train an encoder on image-text pairs, from a configuration file or from given weights.

    \b
    --model takes a name, a weights file, or a JSON file with the configuration of a new model. A run that was
    stopped goes on when the same command is given again. Several processes:
      torchrun --nproc-per-node 2 -m clipworks train pairs.csv --out run

    \b
    Examples:
      clipworks train pairs.csv --out run --epochs 10 --validation held-out.csv
      clipworks train pairs --model model.json --out run --batch-size 1024 --micro-batch 64 --precision bf16
      clipworks train pairs.csv --model model.json --out run --recipe "flip(drop=0.75)"
    """
    from ..training.loop import train as work

    _report(work(data, out=out, **_lists(options)), json)


@command("training.distill.distill", hide=("data", "teacher"), resume=RESUME)
def distill(
    data: Data,
    teacher: Annotated[str, typer.Argument(help="Name or weights of the teacher.")],
    *,
    out: Out,
    json: Json = False,
    **options: Any,
) -> None:
    """Train a small encoder on the vectors of a better one, which are computed once and kept.

    \b
    `clipworks-small`, the model inside the package, was distilled by this engine: its text tower from a large
    sentence model, its image tower from an ImageNet classifier, names and captions, on maps that are computed once.
    The recipe is scripts/small/make.py, for your own pictures too (see its --help and docs/clipworks-small.md).

    \b
    Examples:
      clipworks distill pairs.csv ViT-L-14/openai --student small.json --out run
      clipworks distill pairs.csv ViT-B-32/openai --out run --losses fd=2000,clip=1 --views 4
    """
    from ..training.distill import distill as work

    _report(work(data, teacher, out=out, **_lists(options)), json)


@command("training.finetune.finetune", hide=("data",), resume=RESUME)
def finetune(data: Data, *, out: Out, json: Json = False, **options: Any) -> None:
    """Fine-tune an encoder on a small set with safe defaults, and report what it forgot.

    \b
    A folder without captions takes the names of its subfolders as labels.

    \b
    Examples:
      clipworks finetune flowers --out run --validation flowers-held-out --probe pets
      clipworks finetune flowers.csv --preset wise-ft --out run --probe pets.csv
    """
    from ..training.finetune import finetune as work

    found = work(data, out=out, **_lists(options))
    if not _last_words():
        return
    if json:
        return facts(found.as_dict(), as_json=True)
    emit(found.as_rows(), empty="nothing was measured: --validation shows what was learned, --probe what was forgotten")
    note(f"weights: {found.model}")


def _report(found: Any, as_json: bool) -> None:
    if _last_words():
        facts({k: v for k, v in found.as_dict().items() if v not in (None, {})}, as_json=as_json)


def _lists(options: dict[str, Any]) -> dict[str, Any]:
    """Let `--freeze "text.*,visual.stem.*"` mean two patterns, and drop lists that were not given."""
    found = {}
    for name, value in options.items():
        if isinstance(value, list):
            value = [word for entry in value for word in (entry.split(",") if isinstance(entry, str) else [entry])]
        if value != []:
            found[name] = value
    return found


def _last_words() -> bool:
    """Leave the group of processes and return whether this one speaks for all."""
    import torch.distributed as dist

    from ..training.gather import rank

    first = rank() == 0
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    return first
