"""How fast the towers of ViT-B/32 are on a CPU, against transformers in the same run.

    python benchmarks/encoder_speed.py [--threads 2] [--batch 16] [--repeats 15]

Rows take turns, so that other work on the machine hits all of them alike; the ratio of a row is the median over
turns of (reference of that turn) / (row of that turn), of the wall clock and of the processor time of all threads,
which other work disturbs less (on a busy machine with OMP_WAIT_POLICY=passive, or waiting counts as work). Weights are
random with the right architecture and the same in every row, so the cosines are those of the very same network. The
rate of a plain matrix product of the tower's largest shape is measured in the same turns: it bounds what any
implementation can reach on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from clipworks.encoders.config import EncoderConfig
from clipworks.encoders.encoder import Encoder
from clipworks.encoders.precision import fast_matmul, fast_matmul_error
from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from common import record

SEED = 0
NAMES = ("cat", "golden retriever", "fire engine", "bowl of soup", "sailing boat", "barn owl", "violin", "snow plough")
TEMPLATES = ("a photo of a {}.", "a bad photo of the {}.", "a {} in a video game.", "art of the {}.")
BLOCK = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.q_proj": "attention.q", "mlp.fc1": "mlp.up",
         "self_attn.k_proj": "attention.k", "self_attn.v_proj": "attention.v", "mlp.fc2": "mlp.down",
         "self_attn.out_proj": "attention.out"}  # fmt: skip
CLIP = {
    "vision_model.embeddings.class_embedding": "visual.class_token", "visual_projection": "visual.projection",
    "vision_model.embeddings.patch_embedding": "visual.stem.projection", "text_projection": "text.projection",
    "vision_model.embeddings.position_embedding.weight": "visual.positions", "logit_scale": "log_scale",
    "vision_model.pre_layrnorm": "visual.norm_pre", "vision_model.encoder.layers": "visual.blocks",
    "vision_model.post_layernorm": "visual.norm_post", "text_model.embeddings.token_embedding": "text.tokens",
    "text_model.embeddings.position_embedding.weight": "text.positions", "text_model.encoder.layers": "text.blocks",
    "text_model.final_layer_norm": "text.norm",
}  # fmt: skip


def pair():
    """transformers' ViT-B/32 with random weights, and ours with the same ones."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(SEED)
    theirs = CLIPModel(CLIPConfig(text_config={"eos_token_id": 49407, "pad_token_id": 1})).eval()
    state = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in {**CLIP, **BLOCK}.items():
            if name.startswith(old) or f".{old}." in name:
                name = name.replace(old, new, 1)
        state[name] = tensor
    ours = Encoder(EncoderConfig(), CLIPTokenizer(), seed=None)
    ours.load_state_dict(state)
    return theirs, ours.eval()


@contextlib.contextmanager
def medium() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


Turns = dict[str, list[tuple[float, float]]]


def take_turns(rows: dict[str, Callable[[], torch.Tensor]], repeats: int) -> Turns:
    """Seconds of wall clock and of processor time of every row in every turn, after one turn that is not counted."""
    seconds: Turns = {name: [] for name in rows}
    for turn in range(repeats + 1):
        for name, work in rows.items():
            start, busy = time.perf_counter(), time.process_time()
            work()
            if turn:
                seconds[name].append((time.perf_counter() - start, time.process_time() - busy))
    return seconds


def median(values: list[tuple[float, float]], column: int) -> float:
    """Median of the wall clock (column 0) or the processor time (1)."""
    return statistics.median(value[column] for value in values)


def ratio(reference: list[tuple[float, float]], row: list[tuple[float, float]], column: int) -> float:
    """How many times as fast as the reference: the median over turns."""
    return round(statistics.median(a[column] / b[column] for a, b in zip(reference, row, strict=True)), 3)


def table(rows: dict[str, Callable[[], torch.Tensor]], seconds: Turns, per: int, unit: str) -> dict:
    """One entry per row; the first row is the reference of ratios and cosines."""
    reference, *_ = rows
    exact = F.normalize(rows[reference]().float(), dim=-1)
    entries = {}
    for name, work in rows.items():
        taken = seconds[name]
        cosines = (F.normalize(work().float(), dim=-1) * exact).sum(-1)
        entries[name] = {
            f"ms_per_{unit}": round(median(taken, 0) * 1e3 / per, 3),
            f"cpu_ms_per_{unit}": round(median(taken, 1) * 1e3 / per, 3),
            f"best_ms_per_{unit}": round(min(wall for wall, _ in taken) * 1e3 / per, 3),
            "ratio": ratio(seconds[reference], taken, 0),
            "cpu_ratio": ratio(seconds[reference], taken, 1),
            "min_cosine": round(float(cosines.min()), 7),
        }
        shown = "  ".join(f"{key} {value}" for key, value in entries[name].items())
        print(f"{name:38s} {shown}", flush=True)
    return entries


def products(batch: int) -> dict[str, Callable[[], torch.Tensor]]:
    """The largest matrix product of the tower: every token of the batch, 768 to 3072 channels."""
    x, w = torch.randn(batch * 50, 768), torch.randn(3072, 768)
    xb, wb = x.bfloat16(), w.bfloat16()

    def fast() -> torch.Tensor:
        with medium():
            return F.linear(x, w)

    return {"product fp32 default": lambda: F.linear(x, w), "product fp32 medium": fast,
            "product bf16": lambda: F.linear(xb, wb)}  # fmt: skip


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--repeats", type=int, default=15)
    options.add_argument("--name", default="encoder_speed", help="of the result file")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    theirs, ours = pair()
    half = copy.deepcopy(ours).to_precision("bf16")
    pixels = torch.randn(given.batch, 3, 224, 224, generator=torch.Generator().manual_seed(SEED))
    texts = [template.format(name) for template in TEMPLATES for name in NAMES]
    tokens = ours.tokenize(texts)
    padded = F.pad(tokens, (0, 77 - tokens.shape[1]), value=49407)

    def their_images() -> torch.Tensor:
        return theirs.visual_projection(theirs.vision_model(pixels).pooler_output)

    def their_images_medium() -> torch.Tensor:
        with medium():
            return their_images()

    images = {
        "transformers fp32 (default)": their_images,
        "transformers fp32, medium": their_images_medium,
        "clipworks fp32 (exact)": lambda: ours.images(pixels, batch_size=given.batch),
        "clipworks bf16": lambda: half.images(pixels, batch_size=given.batch),
    }

    def whole() -> torch.Tensor:
        with fast_matmul():
            return ours.encode_text(padded, cut=False)

    words = {
        "transformers fp32, 77 positions": lambda: theirs.text_projection(theirs.text_model(padded).pooler_output),
        "clipworks fp32, 77 positions": whole,
        "clipworks fp32, cut at the end token": lambda: ours.texts(texts),
        "clipworks bf16, cut at the end token": lambda: half.texts(texts),
    }
    limits = products(given.batch)
    with torch.inference_mode():
        seconds = take_turns({**images, **limits}, given.repeats)
        results = {"images": table(images, seconds, given.batch, "image")}
        work = 2 * given.batch * 50 * 768 * 3072 / 1e9
        results["products"] = {
            name: {"gflops": round(work / median(seconds[name], 0), 1),
                   "cpu_gflops_per_core": round(work / median(seconds[name], 1), 1)} for name in limits
        }  # fmt: skip
        print(results["products"])
        results["texts"] = table(words, take_turns(words, max(3, given.repeats // 3)), len(texts), "text")
    usual = seconds["product fp32 default"]
    results["limit"] = {
        kind: {"ratio": ratio(usual, seconds[name], 0), "cpu_ratio": ratio(usual, seconds[name], 1)}
        for kind, name in (("fp32", "product fp32 medium"), ("bf16", "product bf16"))
    }
    print(f"this machine's products alone allow ratios of {results['limit']}")
    results["settings"] = {"model": "ViT-B/32, random weights", "threads": given.threads, "batch": given.batch,
                           "repeats": given.repeats, "fast_matmul_error": fast_matmul_error(),
                           "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default")}  # fmt: skip
    print(record(given.name, results, SEED))


if __name__ == "__main__":
    main()
