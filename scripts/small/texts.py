"""Step 1 of `clipworks-small`: the words that its text tower learns from, and what a large sentence model says of them.

The words are the captions and names of the training pairs, ImageNet's class names, and the nouns of WordNet for things
that can be seen, each in a sentence as people write it about pictures, some with WordNet's gloss. The teacher,
all-mpnet-base-v2, reads every sentence once; its vectors are centred and turned into the 512 directions of most
variance.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from clipworks.progress import Progress

SEEN = {"05", "06", "08", "13", "17", "18", "19", "20", "25", "27"}  # WordNet's files of animals, artifacts, ... food
TEMPLATES = (
    "a photo of a {}.", "{}", "a {}", "a close-up photo of the {}.", "a drawing of a {}.", "a sketch of a {}.",
    "a painting of a {}.", "a blurry photo of a {}.", "a cartoon {}.",
)  # fmt: skip


def nouns(path: Path) -> Iterable[tuple[str, str]]:
    """Yield (noun, gloss) of every thing that can be seen from WordNet's `data.noun`; proper names are left out."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence
            continue
        head, gloss = line.split(" | ", 1)
        fields = head.split()
        words = [fields[4 + 2 * i].replace("_", " ") for i in range(int(fields[3], 16))]
        plain = [word for word in words if word == word.lower()]
        if fields[1] in SEEN:
            yield from ((word, gloss.split(";")[0].strip()) for word in plain[:2])


def sentences(names: Sequence[str], captions: Sequence[str], wordnet: Path, seed: int = 0) -> list[str]:
    """Return the distinct sentences to learn from, in a fixed order."""
    draw = np.random.default_rng(seed)
    found = dict.fromkeys(captions)
    for name in names:
        found.update(dict.fromkeys(template.format(name) for template in TEMPLATES))
    for noun, gloss in nouns(wordnet):
        found[TEMPLATES[draw.integers(len(TEMPLATES))].format(noun)] = None
        if draw.random() < 0.1:
            found[f"a photo of a {noun}, {gloss}."] = None
    return list(found)


@torch.inference_mode()
def teacher_vectors(texts: Sequence[str], folder: Path, batch_size: int = 128) -> torch.Tensor:
    """Return unit vectors (N, 768) of the sentence model in `folder`, the mean of its tokens, in bfloat16."""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(list(texts), truncation=True, max_length=64)["input_ids"]
    order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
    rows = torch.empty(len(texts), model.config.hidden_size)
    groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for group in Progress(groups, len(groups), "teacher reads"):
        batch = tokenizer.pad({"input_ids": [ids[i] for i in group]}, return_tensors="pt")
        states = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None]
        rows[group] = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    return rows


def principal(rows: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and the `dim` directions of most variance, (768,) and (768, dim)."""
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean))
    return mean, vectors[:, values.argsort(descending=True)[:dim]]


def write(texts: Sequence[str], rows: torch.Tensor, out: Path, dim: int = 512) -> None:
    """Save sentences and their target vectors, unit rows in the space of the encoder."""
    mean, directions = principal(rows, dim)
    out.mkdir(parents=True, exist_ok=True)
    torch.save({"mean": mean, "directions": directions}, out / "space.pt")
    targets = F.normalize((rows - mean) @ directions, dim=-1)
    np.save(out / "targets.npy", targets.numpy().astype(np.float16))
    (out / "sentences.json").write_text(json.dumps(list(texts)), encoding="utf-8")
