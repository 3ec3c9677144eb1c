"""The ranking adapter against plain numpy attention over pairs, torch's losses, and the checkable facts of its card."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import log_loss

from clipworks.errors import ClipworksError
from clipworks.heads.ranking_adapter import RankingAdapter, RankingNetwork, ranking_loss, regression_loss
from clipworks.types import Features

SMALL = {"tokens": 4, "relations": 3, "attention_heads": 2, "batch_size": 6, "steps": 5, "lr": 1e-3}


def network(width=8, words=6, seed=0):
    torch.manual_seed(seed)
    return RankingNetwork(width, words, tokens=4, relations=3, adapters=1, encoders=1, heads=2, drop=0.1).eval()


def batch(n=5, length=4, width=8, seed=0):
    return torch.randn(n, length, width, generator=torch.Generator().manual_seed(seed))


def softmax(a):
    e = np.exp(a - a.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def plain_differences(made, z):
    """o_ij from one softmax over the tokens of both images, head by head, as the card has it."""
    keys = made.keys(z).detach().numpy().astype(float)
    queries = made.queries.detach().numpy().astype(float)
    n, length, width = z.shape
    size, found = width // made.heads, np.zeros((n, n, len(queries), width))
    for i in range(n):
        for j in range(n):
            both = np.concatenate([keys[i], keys[j]])
            for h in range(made.heads):
                cut = slice(h * size, (h + 1) * size)
                a = softmax(queries[:, cut] @ both[:, cut].T / size**0.5)
                found[i, j, :, cut] = a[:, :length] @ keys[i][:, cut] - a[:, length:] @ keys[j][:, cut]
    return found


def test_the_attention_over_pairs_is_that_over_both_images_together():
    made, z = network(), 3 * batch()
    np.testing.assert_allclose(made.differences(z).detach().numpy(), plain_differences(made, z), atol=1e-5)
    huge = made.differences(1e4 * z)
    assert torch.isfinite(huge).all()


def test_pairs_are_antisymmetric_before_the_projection_and_even_on_the_diagonal():
    """Card, facts 1 and 2."""
    made, z = network(), batch()
    o, g = made.differences(z), made.pairs(z).detach()
    torch.testing.assert_close(o, -o.transpose(0, 1))
    assert o[torch.arange(5), torch.arange(5)].abs().max() == 0
    assert o.abs().max() > 1e-3
    torch.testing.assert_close(g.diagonal(), g[0, 0].expand(5))
    bias = made.ranking(3 * made.out.bias)  # three queries
    torch.testing.assert_close(g[0, 0], bias[0])


def test_ranking_labels():
    """Card, fact 3, by the loss: logits of 0 everywhere but one."""
    y = torch.tensor([3.0, 1.0, 2.0, 2.0])
    g = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    greater = np.array([[float(a > b) for b in y] for a in y])
    assert greater.sum() == 5
    p = torch.sigmoid(g).double().numpy()
    assert ranking_loss(g, y).item() == pytest.approx(log_loss(greater.ravel(), p.ravel()), abs=1e-6)
    differ = np.array([[a != b for b in y] for a in y])
    assert ranking_loss(g, y, ties=False).item() == pytest.approx(log_loss(greater[differ], p[differ]), abs=1e-6)
    assert ranking_loss(g, torch.ones(4), ties=False) == 0
    torch.testing.assert_close(ranking_loss(g, torch.ones(4)), torch.nn.functional.softplus(g).mean())


def test_order_only_permutes_and_scores_do_not_depend_on_the_others():
    """Card, fact 4."""
    made, z, words = network(), batch(), batch(1, 3, 6)[0]
    order = torch.tensor([3, 0, 4, 1, 2])
    seen, moved = made(z, words), made(z[order], words)
    torch.testing.assert_close(made.score(moved), made.score(seen)[order])
    torch.testing.assert_close(made.pairs(moved), made.pairs(seen)[order][:, order])
    torch.testing.assert_close(made.score(made(z[:1], words)), made.score(seen)[:1])


def test_the_regression_loss_grows_slowly():
    """Card, fact 5."""
    r = torch.tensor([-30.0, -0.4, 0.0, 0.7, 1.0, 50.0], requires_grad=True)
    off = r.detach().numpy().astype(float)
    smooth = np.where(np.abs(off) < 1, off**2 / 2, np.abs(off) - 0.5)
    loss = regression_loss(r, torch.zeros(6))
    assert loss.item() == pytest.approx(np.log1p(smooth).mean(), rel=1e-5)
    (slope,) = torch.autograd.grad(loss, r)
    np.testing.assert_allclose(6 * slope.numpy(), np.clip(off, -1, 1) / (1 + smooth), rtol=1e-5)


def test_each_loss_has_its_own_branch():
    """Card, fact 6."""
    made, z, words, y = network(), batch(), batch(1, 3, 6)[0], torch.arange(5.0)
    tower = z.clone()  # frozen tokens carry no gradient
    seen = made(tower, words)
    rank = torch.autograd.grad(ranking_loss(made.pairs(seen), y), list(made.parameters()), allow_unused=True,
                               retain_graph=True)  # fmt: skip
    regress = torch.autograd.grad(regression_loss(made.score(seen), y), list(made.parameters()), allow_unused=True)
    names = [name for name, _ in made.named_parameters()]
    unused_by_rank = {n for n, g in zip(names, rank, strict=True) if g is None}
    unused_by_regression = {n for n, g in zip(names, regress, strict=True) if g is None}
    assert unused_by_rank == {n for n in names if n.startswith("regression.")}
    assert unused_by_regression == {n for n in names if n.split(".")[0] in ("queries", "keys", "out", "ranking")}
    assert tower.grad is None


def test_the_instruction_matters():
    made, z = network(), batch()
    one, two = (made.score(made(z, batch(1, 3, 6, seed)[0])) for seed in (1, 2))
    assert not torch.allclose(one, two)


def counted(n, seed=0, length=6, width=12):
    """Tokens whose sum holds a number, and noise."""
    rng = np.random.default_rng(seed)
    y = rng.uniform(0, 5, n)
    x = 0.25 * rng.normal(size=(n, length, width))  # the sum itself correlates with y by 0.92
    x[:, :, 0] += y[:, None] * rng.dirichlet(np.ones(length), n)
    return x.astype(np.float32), y


def test_it_learns_an_order_that_shuffled_targets_do_not_give():
    """Card, fact 8, and 7: a rank correlation does not change under increasing transforms."""
    x, y = counted(150)
    held, own = counted(80, seed=1)
    options = {"tokens": 4, "relations": 4, "lr": 1e-3, "text": np.ones((2, 12))}
    adapter = RankingAdapter(**options).fit(x, y)
    assert adapter.score(held, own) > 0.8
    assert adapter.score(held, own) == pytest.approx(spearmanr(np.exp(adapter.predict(held)), own**3)[0])
    shuffled = RankingAdapter(**options).fit(x, np.random.default_rng(0).permutation(y))
    assert shuffled.score(held, own) < adapter.score(held, own) - 0.3
    assert adapter.losses_[-50:].mean() < adapter.losses_[:50].mean()


def test_negatives_are_other_instructions_images_with_target_0(monkeypatch):
    x, y = counted(40)
    y += 1  # no target of its own is 0
    which = np.arange(40) % 2
    seen = []

    def spy(score, target):
        seen.append(target.numpy().copy())
        return regression_loss(score, target)

    monkeypatch.setattr("clipworks.heads.ranking_adapter.regression_loss", spy)
    text = [np.eye(2, 12), 2 * np.eye(3, 12)]
    RankingAdapter(text=text, **{**SMALL, "batch_size": 10}).fit(x, y, instruction=which)
    scaled = [(y / y.std())[which == k] for k in (0, 1)]
    for target in seen:
        assert (target[-2:] == 0).all()  # 0.2 of 10
        assert (target[:-2] > 0).all()
        assert any(np.isclose(target[:-2, None], own).any(1).all() for own in scaled)
    seen.clear()
    RankingAdapter(text=text[0], **SMALL).fit(x, y)
    assert min(target.min() for target in seen) > 0


def test_one_vector_per_image_is_one_token():
    x, y = counted(20, length=1)
    one, two = (RankingAdapter(**SMALL).fit(tokens, y).predict(tokens) for tokens in (x, x[:, 0]))
    np.testing.assert_array_equal(one, two)
    features = Features(x[:, 0], labels=y)
    np.testing.assert_array_equal(RankingAdapter(**SMALL).fit(features).predict(features), one)


def test_scores_come_in_units_of_the_targets_and_no_generator_is_moved():
    x, y = counted(20)
    before = torch.get_rng_state()
    one, two = (RankingAdapter(**SMALL).fit(x, factor * y).predict(x) for factor in (1, 1000))
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_allclose(two, 1000 * one, rtol=1e-3)
    other = RankingAdapter(**SMALL, seed=1).fit(x, y).predict(x)
    assert not np.allclose(one, other)


def test_what_cannot_be_used_is_named():
    x, y = counted(10)
    made = RankingAdapter(text=[np.ones(12)], **SMALL).fit(x, y)
    for call, message in (
        (lambda: RankingAdapter(negatives=1).fit(x, y), "negatives must lie in"),
        (lambda: RankingAdapter(tokens=0).fit(x, y), "tokens must be at least 1"),
        (lambda: RankingAdapter(text=[np.ones(3), np.ones(4)]).fit(x, y), "one width"),
        (lambda: RankingAdapter().fit(x, y[:-1]), "one finite number per image"),
        (lambda: RankingAdapter().fit(x, np.full(10, np.nan)), "one finite number per image"),
        (lambda: made.predict(x[:, :-1]), "6 tokens of 12 features"),
        (lambda: made.predict(x, instruction=np.ones(10, int)), "positions in text"),
        (lambda: made.predict(x, instruction=np.zeros(3, int)), "one position per image"),
    ):
        with pytest.raises(ClipworksError, match=message):
            call()
