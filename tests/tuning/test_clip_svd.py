"""CLIP-SVD: the checkable facts of its card."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from clipworks.tuning.clip_svd import CLIPSVD, SingularLinear
from clipworks.tuning.common import learning, linears

from .toys import clip_shaped, coloured, quick, vit_b16


def linear(rows=5, columns=7, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(columns, rows).double()


def test_as_many_numbers_learn_as_published():
    """Card, fact 2: on ViT-B/16, 12 layers x 6 matrices x (768 + 512)."""
    encoder = vit_b16()
    CLIPSVD()._shape(encoder)
    found = learning(encoder, CLIPSVD.frozen)
    assert sum(p.numel() for p in found.values()) == 92_160
    assert len(found) == 2 * 12 * 6


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (6, 6)])
def test_the_factored_map_is_the_map(shape):
    """Card, fact 1, and 4: a factor on all values is a factor on the weight."""
    plain, x = linear(*shape), torch.randn(4, shape[1], dtype=torch.float64)
    factored = SingularLinear(plain)
    assert factored.scales.numel() == min(shape)
    torch.testing.assert_close(factored(x), plain(x))
    with torch.no_grad():
        factored.scales.mul_(1.7)
    torch.testing.assert_close(factored(x), 1.7 * (plain(x) - plain.bias) + plain.bias)


def test_the_gradient_of_a_value_is_that_of_its_direction():
    """Card, fact 3: dL/dS_i = u_i^T (dL/dW) v_i."""
    plain, x = linear(), torch.randn(4, 7, dtype=torch.float64)
    factored = SingularLinear(plain)
    plain(x).pow(3).sum().backward()
    factored(x).pow(3).sum().backward()
    u, _, vt = np.linalg.svd(plain.weight.detach().numpy(), full_matrices=False)
    expected = [u[:, i] @ plain.weight.grad.numpy() @ vt[i] for i in range(5)]
    np.testing.assert_allclose(factored.scales.grad[0], expected, rtol=1e-9)


def test_signs_of_pairs_of_directions_do_not_matter():
    """Card, fact 8."""
    factored, x = SingularLinear(linear()), torch.randn(4, 7, dtype=torch.float64)
    before = factored(x)
    flip = torch.tensor([1, -1, -1, 1, -1], dtype=torch.float64)
    factored.left.mul_(flip)
    factored.right.mul_(flip[:, None])
    torch.testing.assert_close(factored(x), before)


def test_no_direction_is_added_in_training():
    """Card, facts 5 and 6: U and V stay orthonormal, and U^T (W' - W) V is diagonal."""
    x, y = coloured()
    encoder = clip_shaped()
    method = quick(CLIPSVD, encoder=encoder, lr=3e-2, steps_per_shot=2).fit(x, y)
    merged = method.merge()
    for path in linears(encoder):
        old, new = encoder.get_submodule(path), merged.get_submodule(path)
        u, _, vt = torch.linalg.svd(old.weight.detach().double(), full_matrices=False)
        moved = u.T @ (new.weight - old.weight).double() @ vt.T
        diagonal = moved.diagonal().abs()
        assert (moved - moved.diagonal().diag()).abs().max() < 1e-5
        assert diagonal.max() > 1e-3
        assert torch.equal(old.bias, new.bias)
        part = method.encoder_.get_submodule(path)
        eye = torch.eye(part.left.shape[1])
        torch.testing.assert_close(part.left.T @ part.left, eye, atol=1e-5, rtol=0)
        torch.testing.assert_close(part.right @ part.right.T, eye, atol=1e-5, rtol=0)


def test_it_learns_and_lowers_the_loss():
    x, y = coloured()
    settings = {"encoder": clip_shaped(), "batch_size": 12}
    once = quick(CLIPSVD, lr=0.0, steps_per_shot=0.25, **settings).fit(x, y)
    long = quick(CLIPSVD, lr=3e-2, steps_per_shot=10, **settings).fit(x, y)
    assert long.losses_["loss"] < once.losses_["loss"] - 0.3
    assert long.score(x, y) > once.score(x, y)


def test_only_the_named_maps_are_factored():
    method = quick(CLIPSVD, encoder=clip_shaped(), parts=["v", "down"], towers="text").fit(*coloured())
    kinds = {n for n, m in method.encoder_.named_modules() if isinstance(m, SingularLinear)}
    assert kinds == {"text.blocks.0.attention.v", "text.blocks.0.mlp.down"}


def test_decay_pulls_the_values_to_zero():
    """Card, pitfall: to zero, not to where they began; so the loop must decay them although they are no matrices."""
    encoder, (x, y) = clip_shaped(), coloured()
    settings = {"encoder": encoder, "steps_per_shot": 0.25, "lr": 1e-3}
    free, pulled = (quick(CLIPSVD, weight_decay=w, **settings).fit(x, y).encoder_ for w in (0.0, 10.0))
    name = "visual.blocks.0.attention.q.scales"
    start = CLIPSVD()._shaped(encoder).state_dict()[name]
    torch.testing.assert_close(free.state_dict()[name] - pulled.state_dict()[name], 1e-2 * start, atol=1e-6, rtol=1e-3)
