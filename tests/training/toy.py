"""Small things that the training tests share: numpy losses, toy towers, coloured shapes with captions, processes."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn

from clipworks.encoders.config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from clipworks.encoders.encoder import Encoder
from clipworks.encoders.tokenizers.pretrained import PretrainedTokenizer

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 70, 230), "yellow": (240, 220, 40)}
SHAPES = ("square", "cross")
CLASSES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


def infonce(image: Any, text: Any, scale: Any, *, all_image: Any = None, all_text: Any = None, offset: int = 0) -> Any:
    """Mean cross-entropy of local rows against all, both ways."""
    all_image, all_text = (image if all_image is None else all_image), (text if all_text is None else all_text)
    target = torch.arange(len(image)) + offset
    rows, columns = scale * image @ all_text.T, scale * text @ all_image.T
    return (nn.functional.cross_entropy(rows, target) + nn.functional.cross_entropy(columns, target)) / 2


class Pair(nn.Module):
    """Two linear towers and a scale, in float64."""

    def __init__(self, seed: int = 0, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(seed)
        self.visual = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4)).double()
        self.text = nn.Linear(5, 4).double()
        self.log_scale = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        image = nn.functional.normalize(self.visual(batch["pixels"]), dim=1)
        text = nn.functional.normalize(self.text(batch["words"]), dim=1)
        return {"image": image, "text": text, "scale": self.log_scale.exp()}


def vectors(rows: int, seed: int = 1) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    make = lambda width: torch.randn(rows, width, generator=draw, dtype=torch.float64)  # noqa: E731
    return {"pixels": make(6), "words": make(5)}


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def drawing(colour: str, shape: str, rng: np.random.Generator, size: int = 32) -> Image.Image:
    image = Image.new("RGB", (size, size), tuple(int(v) for v in rng.integers(0, 50, 3)))
    side = int(rng.integers(15, 23))
    left, top = (int(v) for v in rng.integers(2, size - side - 2, 2))
    draw = ImageDraw.Draw(image)
    if shape == "square":
        draw.rectangle((left, top, left + side, top + side), fill=COLOURS[colour])
    else:
        middle, arm = side // 2, side // 8
        draw.rectangle((left + middle - arm, top, left + middle + arm, top + side), fill=COLOURS[colour])
        draw.rectangle((left, top + middle - arm, left + side, top + middle + arm), fill=COLOURS[colour])
    return image


def drawings(count: int, seed: int = 0) -> list[tuple[Image.Image, str]]:
    """Pairs of a coloured shape and its caption, classes in turn."""
    rng = np.random.default_rng(seed)
    names = [CLASSES[i % len(CLASSES)] for i in range(count)]
    return [(drawing(*name.split(), rng), f"a photo of a {name}") for name in names]


class Words(PretrainedTokenizer):
    """A tokenizer of whole words: 1 starts, 2 ends, 0 pads, unknown words are 3."""

    known = ("a", "photo", "of", "the", *COLOURS, *SHAPES)
    vocab_size = 4 + len(known)

    def __init__(self):
        ids = {word: i for i, word in enumerate(("<pad>", "<start>", "<end>", "<unknown>", *self.known))}
        made = Tokenizer(models.WordLevel(ids, unk_token="<unknown>"))
        made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
        made.post_processor = processors.TemplateProcessing(
            single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
        )
        super().__init__(made.to_str().encode(), pad_id=0, eot_id=2)


def tiny(seed: int = 0, double: bool = False, **changes: Any) -> Encoder:
    """A two-tower encoder of 32 pixels, width 32, two layers."""
    config = EncoderConfig(
        name="tiny", dim=32,
        vision=VisionConfig(image_size=32, patch_size=8, width=32, layers=2, heads=2, mlp_width=64, activation="gelu"),
        text=TextConfig(vocab_size=Words.vocab_size, context_length=8, width=32, layers=2, heads=2, mlp_width=64,
                        activation="gelu", eot_id=2, tokenizer="toy-words"),
        preprocess=PreprocessConfig(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)), **changes,
    )  # fmt: skip
    encoder = Encoder(config, Words(), seed=seed)
    return encoder.double() if double else encoder


def weights(encoder: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in encoder.state_dict().items()}


def spawn(work: Callable[..., None], count: int, *arguments: Any) -> None:
    """Run `work(rank, count, *arguments)` in gloo processes; raises if one of them does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_worker, (work, count, port, arguments), nprocs=count)


def _worker(rank: int, work: Callable[..., None], count: int, port: int, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(count),
                      LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(count), OMP_NUM_THREADS="1")  # fmt: skip
    torch.distributed.init_process_group("gloo", rank=rank, world_size=count)
    work(rank, count, *arguments)
    torch.distributed.destroy_process_group()
