"""How fast CoOp learns against its released loop, on the same work in the same run; and its memory with many classes.

    python benchmarks/prompt_speed.py [--threads 1] [--classes 37] [--batch 32] [--epochs 2] [--many 1000]

The released step is written out here on the same towers: image tower and all sentences at 77 tokens in every step, the
gradient through all of it. Both start from the same context, see the same batches in the same order, and their losses
are compared step by step. Weights are random in the shapes of ViT-B/32. Seconds are those of the processor (all
threads), which other work on the machine disturbs less than the wall clock; both are kept. Memory is the most that a
process of its own ever held, weights and libraries included, for one step on `--many` classes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from clipworks.encoders.config import EncoderConfig
from clipworks.encoders.encoder import Encoder
from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.prompts.common import batches
from clipworks.prompts.coop import CoOp
from common import record

SEED = 0
KINDS = ("red", "small", "wooden", "old", "northern", "spotted", "long eared", "paper", "wild", "iron")
THINGS = (
    "cat",
    "fire engine",
    "barn owl",
    "violin",
    "teapot",
    "sailing boat",
    "mountain goat",
    "bridge",
    "lamp",
    "fern",
)
PLACES = (
    "",
    "of the river",
    "by night",
    "in winter",
    "from above",
    "in a box",
    "with a lid",
    "at sea",
    "on sand",
    "on ice",
)


def names(count: int) -> list[str]:
    """Distinct class names of one to eight tokens."""
    made = [f"{kind} {thing} {place}".strip() for place in PLACES for kind in KINDS for thing in THINGS]
    return made[:count]


def released(method: CoOp, pixels: torch.Tensor, y: torch.Tensor) -> tuple[list[float], list[float], list[float]]:
    """Losses, processor seconds and wall seconds of every step of the released loop."""
    model, rng = method.encoder.requires_grad_(False), np.random.default_rng(method.seed)
    context = method.start(model)["context"].clone().requires_grad_()
    optimizer = torch.optim.SGD([context], lr=method.lr, momentum=0.9, weight_decay=5e-4)
    tokens = model.tokenize([f"{' '.join(['X'] * method.context)} {name}." for name in method.names])
    tokens = F.pad(tokens, (0, model.context_length - tokens.shape[1]))
    fixed, end = model.text.tokens(tokens), model.text.end(tokens)
    losses, busy, wall = [], [], []
    for epoch in range(method.epochs):
        optimizer.param_groups[0]["lr"] = method.rate(epoch)
        for rows in batches(rng.permutation(len(y)), method.batch_size):
            rng.integers(1, size=len(rows))
            started, used = time.perf_counter(), time.process_time()
            x = F.normalize(model.visual.run(pixels[rows]).pooled, dim=-1)
            own = context.expand(len(fixed), -1, -1)
            sentences = torch.cat([fixed[:, :1], own, fixed[:, 1 + method.context :]], 1)
            text = F.normalize(model.text.run(embeddings=sentences, eot=end, cut=False).pooled, dim=-1)
            loss = F.cross_entropy(model.logit_scale * x @ text.T, y[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            busy.append(time.process_time() - used)
            wall.append(time.perf_counter() - started)
    model.requires_grad_(True)
    return losses, busy, wall


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """The two loops on the same images."""
    model = Encoder(EncoderConfig(), CLIPTokenizer(), seed=SEED).eval()
    settings = dict(encoder=model, epochs=given.epochs, batch_size=given.batch, seed=SEED)
    method = CoOp(names(given.classes), **settings)
    draw = torch.Generator().manual_seed(SEED)
    pixels = torch.randn(2 * given.batch, 3, 224, 224, generator=draw)
    y = torch.randint(given.classes, (len(pixels),), generator=draw)
    used, started = time.process_time(), time.perf_counter()
    kept = method.keep(pixels)
    looked = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - used}
    method.fit(kept, y)  # once for nothing: threads, tables and memory are then there
    used, started = time.process_time(), time.perf_counter()
    method.fit(kept, y)
    busy, wall = time.process_time() - used, time.perf_counter() - started
    steps = len(method.losses_)
    losses, theirs, their_wall = released(method, pixels, y)
    off = float(np.max(np.abs(np.array(losses) / method.losses_ - 1)))
    found = {
        "released": {"cpu_seconds_per_step": round(sum(theirs) / steps, 4),
                     "seconds_per_step": round(sum(their_wall) / steps, 4), "losses": losses},
        "clipworks": {"cpu_seconds_per_step": round(busy / steps, 4), "seconds_per_step": round(wall / steps, 4),
                      "losses": method.losses_.tolist()},
        "once_for_all_images": {name: round(value, 4) for name, value in looked.items()},
        "steps": steps,
        "times_as_fast_per_step": round(sum(theirs) / busy, 2),
        "times_as_fast_with_the_images": round(sum(theirs) / (busy + looked["cpu_seconds"]), 2),
        "largest_relative_difference_of_the_losses": off,
    }  # fmt: skip
    print({k: v for k, v in found.items() if not isinstance(v, dict)}, flush=True)
    return found


def most_held() -> float:
    """The most memory this process ever held, in MB (Linux). `getrusage` would count what its parent held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def many(count: int, chunk: int | None) -> None:
    """One step on many classes; prints what this process held at most."""
    model = Encoder(EncoderConfig(), CLIPTokenizer(), seed=SEED).eval()
    draw = torch.Generator().manual_seed(SEED)
    x = F.normalize(torch.randn(32, model.dim, generator=draw), dim=-1)
    before = most_held()
    method = CoOp(names(count), encoder=model, epochs=1, chunk=chunk, seed=SEED)
    used = time.process_time()
    method.fit(x, torch.randint(count, (32,), generator=draw))
    peak = most_held()
    found = {"classes": count, "peak_mb": round(peak), "peak_mb_before_learning": round(before),
             "cpu_seconds": round(time.process_time() - used, 2), "loss": float(method.losses_[0])}  # fmt: skip
    print(json.dumps(found))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, default=1)
    options.add_argument("--classes", type=int, default=37)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--epochs", type=int, default=2, help="of two steps each")
    options.add_argument("--many", type=int, default=1000, help="classes for the memory, at most 1000")
    options.add_argument("--memory-only", action="store_true", help="print the memory of one step, record nothing")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    if given.memory_only:
        many(given.many, None)
        return
    results = compare(given)
    command = [sys.executable, __file__, "--memory-only", "--threads", str(given.threads), "--many"]
    results["memory"] = [
        json.loads(subprocess.run([*command, str(count)], capture_output=True, text=True, check=True).stdout)
        for count in (given.many // 10, given.many)
    ]
    print(results["memory"])
    results["settings"] = {"model": "ViT-B/32, random weights", "context": 16, **vars(given)}
    print(record("prompt_speed", results, SEED))


if __name__ == "__main__":
    main()
