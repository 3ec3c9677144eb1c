"""Encoders and checks for the tests of both directions of modality inversion."""

import numpy as np
import torch

from clipworks.encoders.toy import toy_encoder


def encoder(seed=0, **vision):
    return toy_encoder(seed, **vision)


def rows(n, dim=8, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(before, model):
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def adamw(start, gradient, steps, lr=0.02, decay=0.01):
    """AdamW on one array, written out."""
    x, m, v = start.copy(), 0, 0
    for t in range(1, steps + 1):
        g = gradient(x)
        x = x * (1 - lr * decay)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        x = x - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return x
