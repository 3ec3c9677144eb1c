"""A numpy oracle of the last block of a toy tower, and small inputs, for the tests of this folder."""

import numpy as np
import torch

from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.toy import toy_encoder
from clipworks.segment.common import enter


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def norm(x, module):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + module.eps)
    return x * module.weight.detach().numpy() + module.bias.detach().numpy()


def linear(x, module):
    y = x @ module.weight.detach().numpy().T
    return y if module.bias is None else y + module.bias.detach().numpy()


def toy(**options):
    """A toy encoder in float64 with values of some size everywhere, biases and norms too."""
    encoder = toy_encoder(tokenizer=CLIPTokenizer(), **options).double()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in encoder.visual.parameters():
            p += 0.2 * torch.randn(p.shape, generator=draw, dtype=torch.float64)
    return encoder


def images(n=2, height=16, width=24, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, height, width, generator=draw, dtype=torch.float64)


def made(*shape, seed=0):
    """Normal numbers in float32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hidden(encoder=None, **options):
    with torch.no_grad():
        return enter(encoder or toy(), images(), **options)


def projections(found, layer=-1):
    """q, k, v of a block's input, heads apart: (B, heads, N, channels) each."""
    block = found.visual.blocks[layer]
    y = norm(found.inputs[layer].numpy(), block.norm1)
    heads = block.attention.heads

    def split(x):
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    return [split(linear(y, module)) for module in (block.attention.q, block.attention.k, block.attention.v)]


def attended(found, weights, layer=-1):
    """W_o A v for weights (B, heads, M, N)."""
    v = projections(found, layer)[2]
    mixed = (weights @ v).transpose(0, 2, 1, 3)
    return linear(mixed.reshape(*mixed.shape[:2], -1), found.visual.blocks[layer].attention.out)


def finished(found, y):
    """Residual sum and feed-forward part of the last block."""
    block = found.visual.blocks[-1]
    x = found.inputs[-1].numpy() + y
    hidden = linear(norm(x, block.norm2), block.mlp.up)
    return x + linear(hidden / (1 + np.exp(-1.702 * hidden)), block.mlp.down)


def projected(found, tokens, prefix=1):
    """Patches in the joint space, as a map."""
    visual = found.visual
    flat = linear(norm(tokens[:, prefix:], visual.norm_post), visual.projection)
    return flat.reshape(len(flat), *found.grid, -1)


def like(x):
    """softmax(x x^T / sqrt(channels))"""
    return softmax(x @ x.swapaxes(-2, -1) / np.sqrt(x.shape[-1]))


def photos(count=6, size=(24, 36), seed=0):
    """Red and green with an edge somewhere."""
    draw = np.random.default_rng(seed)
    images, maps = [], []
    for _ in range(count):
        edge = int(draw.integers(8, size[1] - 8))
        labels = np.zeros(size, np.uint8)
        labels[:, edge:] = 1
        shown = draw.integers(0, 60, (*size, 3))
        shown[labels == 0, 0] += 190
        shown[labels == 1, 1] += 190
        images.append(shown.astype(np.uint8)), maps.append(labels)
    return images, maps
