"""Step 4 of `clipworks-small`: the text tower learns what the large sentence model says of every sentence.

MiniLM's mean token, through a linear map fitted in closed form, is already near; then all of the tower learns to give
the teacher's direction (1 - cosine) and to tell the sentences of a batch apart by the teacher's vectors (InfoNCE).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from towers import ridge

from clipworks.encoders.encoder import Encoder
from clipworks.training.loop import train


class SentenceRecipe:
    """Sentences and their teacher's rows; no images."""

    split = False

    def __init__(self, sentences: Sequence[str], rows: torch.Tensor, scale: float = 20.0):
        self.rows, self.scale = rows, scale
        self.place = {sentence: i for i, sentence in enumerate(sentences)}
        self.encoder: Encoder | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {"scale": self.scale}

    def bind(self, encoder: Encoder, pool: Any) -> None:
        self.encoder = encoder

    def batch(self, items: Sequence[Any], step: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        texts = [item.caption for item in items]
        return {"tokens": self.encoder.tokenize(texts), "rows": self.rows[[self.place[text] for text in texts]].float()}

    def forward(self, encoder: Encoder, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own, theirs = encode(encoder, batch["tokens"]), batch["rows"]
        logits = self.scale * own @ theirs.T
        target = torch.arange(len(own))
        return {"direction": 4 * (1 - (own * theirs).sum(1)).mean(), "apart": F.cross_entropy(logits, target)}


def encode(encoder: Encoder, tokens: torch.Tensor, parts: int = 6) -> torch.Tensor:
    """Encode a batch in parts of like length, so that short sentences do not pay for the longest, in bfloat16."""
    order = encoder.text.lengths(tokens).argsort()
    with torch.autocast(tokens.device.type, torch.bfloat16):
        rows = torch.cat([encoder.encode_text(tokens[part]) for part in order.tensor_split(parts)])
    return rows[order.argsort()]


@torch.no_grad()
def fit_projection(encoder: Encoder, sentences: Sequence[str], rows: torch.Tensor, most: int = 8000) -> None:
    """Fit the last linear map, with its bias, on the first sentences."""
    encoder.text.projection.weight.copy_(torch.eye(*encoder.text.projection.weight.shape))
    encoder.text.projection.bias.zero_()
    x = encoder.texts(list(sentences[:most]), normalize=False)[:, : encoder.config.text.width]
    mean = x.mean(0)
    weight = ridge(x - mean, rows[:most].float(), 1e-3)
    encoder.text.projection.weight.copy_(weight.T)
    encoder.text.projection.bias.copy_(-mean @ weight)


def main(
    encoder: Encoder, folder: Path, out: Path, *, epochs: float = 1.3, batch_size: int = 192, lr: float = 2e-4,
    **options: Any,
) -> Encoder:  # fmt: skip
    """Distil into the text tower; the image tower stays."""
    sentences = json.loads((folder / "sentences.json").read_text(encoding="utf-8"))
    rows = torch.from_numpy(np.load(folder / "targets.npy"))
    held = len(sentences) // 50  # the last ones are held out, to see what generalises
    fit_projection(encoder, sentences, rows)
    print(f"cosine to the teacher, held out, after the linear map: {agreement(encoder, sentences, rows, held):.4f}")
    pairs = [("", sentence) for sentence in sentences[:-held]]
    report = train(
        pairs, encoder, out=out, recipe=SentenceRecipe(sentences, rows), steps=round(epochs * len(pairs) / batch_size),
        batch_size=batch_size, lr=lr, weight_decay=0.01, warmup=100, freeze=["visual.*", "log_scale"], clip=1.0,
        save_every=200, **options,
    )  # fmt: skip
    print(f"cosine to the teacher, held out, after training: {agreement(report.encoder, sentences, rows, held):.4f}")
    return report.encoder


def agreement(encoder: Encoder, sentences: Sequence[str], rows: torch.Tensor, held: int) -> float:
    """Mean cosine on the last `held` sentences."""
    return float((encoder.texts(sentences[-held:]) * rows[-held:].float()).sum(1).mean())
