"""Every pre-training recipe against plain CLIP on real pairs, from scratch, at equal compute, over several seeds.

    apt-get download openclipart-png openclipart-svg
    for f in openclipart-*.deb; do dpkg -x $f PAIRS; done
    python benchmarks/recipes.py --pairs PAIRS [--seeds 3] [--only plain flip ...]

Pairs are clip-art pictures (public domain) with what people wrote about them: the file's name as the noisy caption that
plain CLIP gets, title, description and keywords as further captions. Equal compute means equal floating-point
operations of the training steps (forward and backward, as torch counts them on one step of each recipe), so the load of
the machine does not matter; making the views is not counted. A finished run is a file in `--work`; a second start goes
on with what is missing, and every start rewrites `results/recipes.json` and the table of `docs/recipes.md` from what
there is (`--seeds 0` does that alone).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from clipworks.data.item import Item
from clipworks.encoders.config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from clipworks.encoders.encoder import Encoder
from clipworks.encoders.tokenizers.pretrained import PretrainedTokenizer
from clipworks.training.augment import Augment
from clipworks.training.evaluate import recalls, zeroshot
from clipworks.training.feed import data_digest
from clipworks.training.loop import train
from clipworks.training.recipe import ContrastiveRecipe
from clipworks.training.towers import Towers
from clipworks.zeroshot.classifier import class_vectors
from common import record
from openclipart import Pairs, read_pairs

SIDE, BATCH, LR = 48, 128, 1e-3
WEAK = Augment(scale=(0.5, 1.0))
STRONG = Augment(scale=(0.3, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grey=0.2)
TEMPLATES = ("{}.", "a drawing of {}.")
PAGE = Path(__file__).parents[1] / "docs/recipes.md"
MARKS = ("<!-- table: written by benchmarks/recipes.py -->", "<!-- end of table -->")


# --- towers ----------------------------------------------------------------------------------------------------------


def word_tokenizer(texts: list[str]) -> PretrainedTokenizer:
    """Whole words that occur at least twice in training: 0 pads, 1 starts, 2 ends, 3 is any other word."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    counts = Counter(word for text in texts for word in text.split())
    special = ["<pad>", "<start>", "<end>", "<unknown>"]
    known = special + sorted(w for w, c in counts.items() if c > 1)
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unknown>"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    return PretrainedTokenizer(made.to_str().encode(), pad_id=0, eot_id=2)


def encoder_for(pairs: Pairs, seed: int) -> Encoder:
    """Random towers: 16 patches of 12 pixels, three blocks of width 96; two blocks for words."""
    tokenizer = word_tokenizer([t for i in pairs.raw for t in (i.caption or "", *i.columns["alternatives"])])
    config = EncoderConfig(
        name="small-words", dim=96,
        vision=VisionConfig(image_size=SIDE, patch_size=12, width=96, layers=3, heads=3, mlp_width=384,
                            activation="gelu"),
        text=TextConfig(vocab_size=tokenizer.vocab_size, context_length=16, width=96, layers=2, heads=3, mlp_width=384,
                        activation="gelu", eot_id=2, tokenizer="words.json"),
        preprocess=PreprocessConfig(size=SIDE, mean=(0.5,) * 3, std=(0.25,) * 3),
    )  # fmt: skip
    return Encoder(config, tokenizer, seed=seed)


# --- recipes ---------------------------------------------------------------------------------------------------------


def plain() -> ContrastiveRecipe:
    return ContrastiveRecipe("infonce", WEAK)


def flip() -> Any:
    from clipworks.pretraining.flip import FlipRecipe

    return FlipRecipe(0.5, augment=WEAK)


def laclip() -> Any:
    from clipworks.pretraining.caption_pools import CaptionPools

    return CaptionPools(columns=["alternatives"], min_words=1, augment=WEAK)


def veclip() -> Any:
    from clipworks.pretraining.caption_pools import CaptionPools

    return CaptionPools(columns=["alternatives"], original=0.5, min_words=1, augment=WEAK)


def dreamlip() -> Any:
    from clipworks.pretraining.dreamlip import DreamlipRecipe

    return DreamlipRecipe(columns=["alternatives"], sentences_per_image=2, augment=WEAK)


def improved_baselines() -> Any:
    from clipworks.pretraining.improved_baselines import ImprovedRecipe

    return ImprovedRecipe(hidden=256, out=96, weak=WEAK, strong=STRONG)


def slip() -> Any:
    from clipworks.pretraining.slip import SlipRecipe

    return SlipRecipe(hidden=256, out=96, weak=WEAK, strong=STRONG)


def a_clip() -> Any:
    from clipworks.pretraining.a_clip import AttentiveRecipe

    # the slow tower of a run of a few hundred steps must follow faster than that of one of many thousands
    return AttentiveRecipe(momentum=0.98, hidden=256, out=96, crop=WEAK)


def a_clip_masks() -> Any:
    """The masks alone: what `flip` does at random is done by attention, on two views and without extra losses."""
    from clipworks.pretraining.a_clip import AttentiveRecipe

    return AttentiveRecipe(momentum=0.98, simclr=0.0, byol=0.0, crop=WEAK, colour=None)


def cloob() -> Any:
    from clipworks.pretraining.cloob import CloobRecipe

    return CloobRecipe(augment=WEAK)


def m2_mix() -> Any:
    from clipworks.pretraining.m2_mix import M2MixRecipe

    return M2MixRecipe(weight=0.05, augment=WEAK)


def refine() -> Any:
    from clipworks.pretraining.clip_refine import RefineRecipe

    return RefineRecipe(normalise=True, augment=WEAK)


RECIPES: dict[str, Callable[[], Any]] = {
    f.__name__: f
    for f in (plain, flip, laclip, veclip, dreamlip, improved_baselines, slip, a_clip, a_clip_masks, cloob, m2_mix)
}
CURATED = {"plain_raw": None, "metaclip": 20.0}
# after plain training with this share of the budget
STAGED: dict[str, tuple[Callable[[], Any], float, dict[str, Any]]] = {
    "clip_refine": (refine, 0.8, {"lr": 1e-5, "weight_decay": 0.1, "schedule": "constant", "warmup": 0}),
}

# what each paper says gets better
CLAIMS = {
    "flip": "recall10_name", "laclip": "recall10_title", "veclip": "recall10_keywords", "dreamlip": "recall10_keywords",
    "improved_baselines": "zeroshot", "slip": "zeroshot", "a_clip": "zeroshot", "a_clip_masks": "zeroshot",
    "cloob": "zeroshot", "m2_mix": "recall10_name", "metaclip": "zeroshot", "clip_refine": "gap",
}  # fmt: skip


def curated(items: list[Item], t: float | None, seed: int) -> list[Item]:
    """The raw pool, whole or balanced against the words of the class of things that nouns of its own titles name."""
    if t is None:
        return items
    from clipworks.pretraining.metaclip import curate

    known = Counter(w for item in items for w in set((item.caption or "").split()))
    metadata = sorted(word for word, count in known.items() if count > 1)
    return [items[i] for i in curate([item.caption or "" for item in items], metadata, t, seed).indices]


# --- one run ---------------------------------------------------------------------------------------------------------


def operations(recipe: Any, encoder: Encoder, items: list[Item]) -> int:
    """Floating-point operations of one training step, forward and backward."""
    recipe.bind(encoder, None)
    batch = recipe.batch(items[:BATCH], 0, np.random.default_rng(0))
    with FlopCounterMode(display=False) as counter:
        losses = Towers(encoder, recipe)(batch, "forward")
        torch.stack(list(losses.values())).sum().backward()
    return counter.get_total_flops()


def one_run(name: str, seed: int, pairs: Pairs, plain_steps: int) -> dict[str, Any]:
    """Train with one recipe within the budget of `plain_steps` plain steps and measure on the held-out pairs."""
    budget = plain_steps * operations(plain(), encoder_for(pairs, 0), pairs.clean)
    items = curated(pairs.raw, CURATED[name], seed) if name in CURATED else pairs.clean
    make, share, options = STAGED.get(name) or (RECIPES.get(name, plain), 0.0, {})
    each = operations(make(), encoder_for(pairs, 0), items)
    before, steps = int(share * plain_steps), int((1 - share) * budget) // each
    began, cpu = time.perf_counter(), time.process_time()
    encoder = encoder_for(pairs, seed)
    if before:
        encoder = fitted(items, encoder, plain(), before, seed)
    encoder = fitted(items, encoder, make(), steps, seed, **options)
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    seconds = {"wall_seconds": round(wall, 1), "cpu_seconds": round(cpu, 1)}
    return {"recipe": name, "seed": seed, "steps": steps, "gflop_per_step": round(each / 1e9, 3),
            "pairs": len(items), "pairs_seen": (before + steps) * BATCH, **seconds,
            **{k: round(v, 3) for k, v in measure(encoder, pairs.held_out).items()}}  # fmt: skip


def fitted(items: list[Item], encoder: Encoder, recipe: Any, steps: int, seed: int, **options: Any) -> Encoder:
    """Train in a folder that is thrown away."""
    out = tempfile.mkdtemp()
    settings = {"lr": LR, "weight_decay": 0.2, "clip": 1.0, **options}
    try:
        report = train(items, encoder, out=out, recipe=recipe, steps=steps, batch_size=BATCH, save_every=steps,
                       log_every=50, workers=1, device="cpu", seed=seed, progress=False, **settings)  # fmt: skip
    finally:
        shutil.rmtree(out)
    assert report.encoder is not None
    return report.encoder


@torch.no_grad()
def measure(encoder: Encoder, items: list[Item]) -> dict[str, float]:
    """Recall@10 against file names, titles and keywords, zero-shot accuracy on folder names, modality gap; percent."""
    encoder.eval()
    size = (SIDE, SIDE)
    arrays = np.stack([np.asarray(Image.fromarray(i.image).resize(size, Image.Resampling.BICUBIC)) for i in items])
    pixels = torch.from_numpy(arrays).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.25)
    image = encoder.images(pixels, batch_size=100).numpy()
    found: dict[str, float] = {}
    for style in ("name", "title", "keywords"):
        texts = [str(i.caption if style == "name" else i.columns[style]) for i in items]
        with_words = [n for n, t in enumerate(texts) if t]
        distinct = list(dict.fromkeys(texts[n] for n in with_words))
        owner = np.array([distinct.index(texts[n]) for n in with_words])
        hits = recalls(image[with_words], encoder.texts(distinct).numpy(), owner)
        found[f"recall10_{style}"] = (hits["image_to_text_recall@10"] + hits["text_to_image_recall@10"]) / 2
        found[f"recall1_{style}"] = (hits["image_to_text_recall@1"] + hits["text_to_image_recall@1"]) / 2
        if style == "name":
            gap = image[with_words].mean(0) - encoder.texts([texts[n] for n in with_words]).numpy().mean(0)
            found["gap"] = float(np.linalg.norm(gap))
    count = Counter(i.label for i in items)
    names = sorted(str(n) for n, c in count.items() if c >= 8)
    rows = [n for n, i in enumerate(items) if i.label in names]
    classes = class_vectors(names, encoder, templates=TEMPLATES).numpy()
    target = np.array([names.index(str(items[n].label)) for n in rows])
    found["zeroshot"] = zeroshot(image[rows], classes, target)["zeroshot_mean_per_class"]
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of every recipe, and the difference to its baseline seed by seed."""
    table: dict[str, Any] = {}
    measured = [k for k in runs[0] if k.startswith(("recall", "zeroshot", "gap"))]
    by = {(r["recipe"], r["seed"]): r for r in runs}
    for name in dict.fromkeys(r["recipe"] for r in runs):
        own = [r for r in runs if r["recipe"] == name]
        base = "plain_raw" if name in CURATED else "plain"
        entry: dict[str, Any] = {"seeds": len(own), "baseline": base}
        if name in CLAIMS:
            entry["claim"] = CLAIMS[name]
            pairs = [(r[CLAIMS[name]], by[base, r["seed"]][CLAIMS[name]]) for r in own if (base, r["seed"]) in by]
            entry["shows"] = verdict([b - a if CLAIMS[name] == "gap" else a - b for a, b in pairs])
        for key in measured:
            values = [r[key] for r in own]
            paired = [r[key] - by[base, r["seed"]][key] for r in own if (base, r["seed"]) in by]
            entry[key] = {"mean": mean(values), "sd": spread(values), "gain": mean(paired), "gain_sd": spread(paired)}
        table[name] = entry
    return table


def verdict(gains: list[float]) -> str:
    """Whether a claim shows: "yes" or "reversed" if all seeds agree and the mean exceeds the spread, else "no"."""
    if len(gains) < 3:
        return "too few seeds"
    clear = abs(statistics.fmean(gains)) > statistics.stdev(gains) and len({g > 0 for g in gains}) == 1
    return ("yes" if gains[0] > 0 else "reversed") if clear else "no"


def table(found: dict[str, Any]) -> str:
    """The summary as Markdown: means, and in brackets the gain over the baseline seed by seed, +- its spread."""
    columns = {"recall10_name": "names", "recall10_title": "titles", "recall10_keywords": "keywords",
               "zeroshot": "zero-shot", "gap": "gap"}  # fmt: skip
    lines = [f"| recipe | seeds | {' | '.join(columns.values())} | claim shows |", "|---" * (3 + len(columns)) + "|"]
    for name, entry in found.items():
        cells = []
        for key in columns:
            value, digits = entry[key], 2 if key == "gap" else 1
            cell = f"{value['mean']:.{digits}f}"
            if name != entry["baseline"] and value["gain"] is not None:
                spread = "" if value["gain_sd"] is None else f" +- {value['gain_sd']:.{digits}f}"
                cell += f" ({value['gain']:+.{digits}f}{spread})"
            cells.append(cell)
        said = f"{columns[entry['claim']]}: {entry['shows']}" if "claim" in entry else ""
        lines.append(f"| {name} | {entry['seeds']} | {' | '.join(cells)} | {said} |")
    return "\n".join(lines)


def write_page(found: dict[str, Any]) -> None:
    """Put the table between its marks in `docs/recipes.md`."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    PAGE.write_text(f"{before}{MARKS[0]}\n\n{table(found)}\n\n{MARKS[1]}{after}", encoding="utf-8")


def mean(values: list[float]) -> float | None:
    return round(statistics.fmean(values), 2) if values else None


def spread(values: list[float]) -> float | None:
    return round(statistics.stdev(values), 2) if len(values) > 1 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, help="folder of the unpacked packages; without it nothing is measured")
    parser.add_argument("--work", type=Path, default=Path("recipes-work"))
    parser.add_argument("--steps", type=int, default=160, help="of plain CLIP; all others get the same operations")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*")
    given = parser.parse_args()
    if given.pairs is None:
        print("recipes: --pairs is not given, so nothing is measured (the two lines above the command fetch them).")
        return
    given.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    pairs = read_pairs(given.pairs, given.work)
    names = given.only or [*RECIPES, *CURATED, *STAGED]
    for seed in range(given.seeds):
        for name in names:
            file = given.work / f"{name}-{seed}.json"
            if not file.exists():
                entry = one_run(name, seed, pairs, given.steps)
                file.write_text(json.dumps(entry) + "\n", encoding="utf-8")
                print(json.dumps(entry), flush=True)
    order = [*RECIPES, *CURATED, *STAGED]
    runs = [json.loads(f.read_text(encoding="utf-8")) for f in sorted(given.work.glob("*-[0-9].json"))]
    runs = sorted((r for r in runs if r["recipe"] in order), key=lambda r: (order.index(r["recipe"]), r["seed"]))
    sizes = {"clean": len(pairs.clean), "raw": len(pairs.raw), "held_out": len(pairs.held_out)}
    results = {"plain_steps": given.steps, "batch": BATCH, "pairs": sizes, "summary": summary(runs), "runs": runs}
    record("recipes", results, seed=0, data_digest=data_digest([*pairs.raw, *pairs.held_out]))
    write_page(results["summary"])


if __name__ == "__main__":
    main()
