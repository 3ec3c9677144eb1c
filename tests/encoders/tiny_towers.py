"""Small encoders with random weights for the tests of this folder."""

import torch

from clipworks.encoders.config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from clipworks.encoders.encoder import Encoder

VISION = dict(image_size=32, patch_size=8, width=24, layers=3, heads=3, mlp_width=40)
TEXT = dict(vocab_size=50, context_length=12, width=20, layers=3, heads=2, mlp_width=36, eot_id=49)
SIGLIP_VISION = dict(class_token=False, pool="attention", norm_pre=False, projection=False, patch_bias=True,
                     norm_eps=1e-6, activation="gelu_tanh")  # fmt: skip
SIGLIP_TEXT = dict(causal=False, pool="last", projection_bias=True, norm_eps=1e-6, activation="gelu_tanh", pad_id=1)
BERT_TEXT = dict(causal=False, pool="mean", norm_order="post", embedding_norm=True, norm_final=False,
                 projection=False, mask_padding=True, activation="gelu", norm_eps=1e-12)  # fmt: skip


def shake(module, seed=1, std=0.3):
    """Random values everywhere, biases and norms too, so that no parameter can be forgotten unnoticed."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim == 0:
                continue
            noise = torch.randn(p.shape, generator=draw, dtype=torch.float64).to(p.dtype)
            p.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else std * noise)
        for name, b in module.named_buffers():
            if "running" in name:
                b.copy_(0.5 + torch.rand(b.shape, generator=draw))
    return module


def encoder(vision=(), text=(), dim=16, shaken=True, **options):
    """A tiny encoder in float64; `vision` and `text` change the configurations above."""
    v, t = VisionConfig(**{**VISION, **dict(vision)}), TextConfig(**{**TEXT, **dict(text)})
    config = EncoderConfig("tiny", dim, v, t, PreprocessConfig(size=v.image_size), **options)
    made = Encoder(config).double().eval()
    return shake(made) if shaken else made


def pixels(n=2, side=32, seed=0, wide=None):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, side, wide or side, generator=draw, dtype=torch.float64)


def tokens(lengths=(5, 9, 12), seed=0, total=12, eot=49, pad=0):
    """Random ids with the end token at the given lengths, padded behind."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.full((len(lengths), total), pad)
    for row, length in zip(rows, lengths, strict=True):
        row[: length - 1] = torch.randint(2, 48, (length - 1,), generator=draw)
        row[length - 1] = eot
    return rows
