"""How `clipworks-small` is put together: released parts as the start of both towers, everything else so that the whole
begins as something sensible.

Image tower: EfficientNet-Lite2 as the stem of a small transformer with a class token, and its ImageNet classifier as a
memory, whose values are the vectors of the class names. Text tower: MiniLM-L6. Both lead
into a space of 512 dimensions.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from clipworks.encoders.config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from clipworks.encoders.encoder import Encoder
from clipworks.encoders.tokenizers.pretrained import PretrainedTokenizer

DIM, SIZE, CONTEXT = 512, 224, 77
MEAN, STD = 127 / 255, 128 / 255  # with which EfficientNet-Lite was trained


def config(size: int = SIZE) -> EncoderConfig:
    """Shapes of both towers."""
    vision = VisionConfig(image_size=size, patch_size=32, width=384, layers=3, heads=6, mlp_width=1536,
                          activation="gelu", stem="efficientnet-lite2", memory=1000)  # fmt: skip
    text = TextConfig(vocab_size=30522, context_length=CONTEXT, width=384, layers=6, heads=12, mlp_width=1536,
                      activation="gelu", causal=False, pool="mean", norm_order="post", embedding_norm=True,
                      norm_final=False, projection_bias=True, tokenizer="tokenizer.json", eot_id=102, pad_id=0,
                      mask_padding=True, norm_eps=1e-12)  # fmt: skip
    preprocess = PreprocessConfig(size=size, mean=(MEAN,) * 3, std=(STD,) * 3)
    return EncoderConfig("clipworks-small", DIM, vision, text, preprocess, init_log_scale=math.log(50.0))


def start(stem: Path, sentences: Path, size: int = SIZE) -> Encoder:
    """Return the encoder before any training.

    Parameters
    ----------
    stem : EfficientNet-Lite2's released weights
    sentences : folder of all-MiniLM-L6-v2 (`model.safetensors`, `tokenizer.json`)
    size : side of the images in pixels
    """
    tokenizer = PretrainedTokenizer(sentences / "tokenizer.json", pad_id=0, eot_id=102)
    encoder = Encoder(config(size), tokenizer)
    read_bert(encoder, load_file(sentences / "model.safetensors"))
    encoder.visual.stem.read(torch.load(stem, weights_only=True))
    begin_as_mean(encoder)
    return encoder


@torch.no_grad()
def read_bert(encoder: Encoder, state: dict[str, torch.Tensor]) -> None:
    """Take a BERT model's weights into the text tower; the embedding of the (only) token type joins the positions."""
    text = encoder.text
    text.tokens.weight.copy_(state["embeddings.word_embeddings.weight"])
    positions = state["embeddings.position_embeddings.weight"][:CONTEXT]
    text.positions.copy_(positions + state["embeddings.token_type_embeddings.weight"][0])
    layers = {"norm_embedding": "embeddings.LayerNorm"}
    inside = {"attention.q": "attention.self.query", "attention.k": "attention.self.key",
              "attention.v": "attention.self.value", "attention.out": "attention.output.dense",
              "norm1": "attention.output.LayerNorm", "mlp.up": "intermediate.dense", "mlp.down": "output.dense",
              "norm2": "output.LayerNorm"}  # fmt: skip
    for i in range(len(text.blocks)):
        layers |= {f"blocks.{i}.{own}": f"encoder.layer.{i}.{theirs}" for own, theirs in inside.items()}
    for own, theirs in layers.items():
        module = text.get_submodule(own)
        module.load_state_dict({part: state[f"{theirs}.{part}"] for part in ("weight", "bias")})


@torch.no_grad()
def begin_as_mean(encoder: Encoder) -> None:
    """Let the class token begin as the mean of all tokens, and every block as the identity otherwise.

    The first block's class token attends evenly (its query is zero) and copies; the other residual branches end in
    zeros. So the tower begins as a linear map of the stem's mean features, which `train_image.fit` then fits, and
    training departs from there instead of from noise.
    """
    visual = encoder.visual
    visual.class_token.zero_()
    visual.positions.zero_()
    for i, block in enumerate(visual.blocks):
        block.mlp.down.weight.zero_()
        block.attention.out.weight.zero_()
        if i == 0:
            for layer in (block.attention.v, block.attention.out):
                layer.weight.copy_(torch.eye(len(layer.weight)))
            block.attention.q.weight.mul_(0.1)


def ridge(x: torch.Tensor, y: torch.Tensor, strength: float) -> torch.Tensor:
    """Return W (d, k) that minimises |x W - y|^2 + strength * n * mean diagonal * |W|^2, in float64."""
    x, y = x.double(), y.double()
    gram = x.T @ x
    gram += strength * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram, x.T @ y).float()
