"""CLIPN: both losses and both rules by loops, every fact of the card, and a tower that learns to say no."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from clipworks.encoders.toy import toy_encoder
from clipworks.errors import ClipworksError
from clipworks.metrics.detection import auroc
from clipworks.ood.clipn import CLIPN, NoTower, itbo_loss, teach_no, tso_loss


def rows(n, seed, dim=6):
    made = np.random.default_rng(seed).normal(size=(n, dim))
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def tensors(*arrays):
    return [torch.from_numpy(a) for a in arrays]


X, YES, NO = rows(9, 0), rows(4, 1), rows(4, 2)


@pytest.mark.parametrize("rule", ["atd", "ctw"])
def test_rules_by_loops(rule):
    s = 7.0
    judge = CLIPN(YES, NO, rule=rule, scale=s)
    for number, x in enumerate(X):
        z = [s * x @ t for t in YES]
        p = [math.exp(v) / sum(math.exp(w) for w in z) for v in z]
        no = [math.exp(s * x @ n) / (math.exp(s * x @ n) + math.exp(s * x @ t)) for t, n in zip(YES, NO, strict=True)]
        best = int(np.argmax(p))
        if rule == "ctw":
            score, refused = 1 - no[best], no[best] > 0.5
        else:
            score = sum(a * (1 - b) for a, b in zip(p, no, strict=True))
            refused = sum(a * b for a, b in zip(p, no, strict=True)) > max(
                a * (1 - b) for a, b in zip(p, no, strict=True)
            )
        assert judge.score_samples(X)[number] == pytest.approx(score, abs=1e-6)
        assert judge.predict(X)[number] == (-1 if refused else best)
    assert {-1} < set(judge.predict(X).tolist())


def test_probabilities_sum_to_one():
    """Card, fact 2."""
    judge = CLIPN(YES, NO, scale=20)
    p = judge.probabilities(X)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(1 - p[:, -1], judge.score_samples(X), atol=1e-6)


@pytest.mark.parametrize("rule", ["atd", "ctw"])
def test_equal_texts_know_nothing(rule):
    """Card, fact 1."""
    scores = CLIPN(YES, YES, rule=rule, scale=100).score_samples(X)
    np.testing.assert_allclose(scores, 0.5, atol=1e-9)
    assert auroc(scores.round(6), np.arange(9) < 4) == 0.5


def test_losses_by_loops():
    image, yes, no = rows(5, 3), rows(5, 4), rows(5, 5)
    s, own, other, tso = 6.0, 0.0, 0.0, 0.0
    for i in range(5):
        for j in range(5):
            a, b = math.exp(s * image[i] @ yes[j]), math.exp(s * image[i] @ no[j])
            if i == j:
                own -= math.log(a / (a + b)) / 5
            else:
                other -= math.log(b / (a + b)) / 20
        tso += (2 - math.sqrt(2 - 2 * yes[i] @ no[i] + 1e-4)) / 5
    assert float(itbo_loss(*tensors(image, yes, no), s)) == pytest.approx(own + other, abs=1e-9)
    assert float(tso_loss(*tensors(yes, no))) == pytest.approx(tso, abs=1e-9)


def test_losses_at_their_limits():
    """Card, facts 3 and 4."""
    yes, image = tensors(YES, rows(4, 9))
    assert float(tso_loss(yes, -yes)) == pytest.approx(0, abs=1e-4)
    assert float(tso_loss(yes, yes)) == pytest.approx(1.99, abs=1e-6)
    assert float(itbo_loss(image, yes, yes, 50.0)) == pytest.approx(2 * math.log(2), abs=1e-9)


def test_a_small_network_learns_to_say_no():
    """Card, fact 9: ten class vectors, a network in the place of the tower."""
    torch.manual_seed(0)
    words = torch.from_numpy(rows(10, 6, 16)).float()
    image = torch.nn.functional.normalize(words + 0.1 * torch.randn(10, 16), dim=1)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    optimizer, history = torch.optim.Adam(net.parameters(), lr=1e-2), []
    for _ in range(300):
        no = torch.nn.functional.normalize(net(words), dim=1)
        loss = (itbo_loss(image, words, no, 20.0) + tso_loss(words, no)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.5 < 1.2 < history[0]
    no = torch.nn.functional.normalize(net(words), dim=1).detach()
    p_no = torch.sigmoid(20 * image @ (no - words).T)
    assert p_no[~torch.eye(10, dtype=torch.bool)].mean() > 0.8
    assert p_no.diagonal().mean() < 0.1


def captions(n, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 60, (n, 6), generator=draw)
    ids[:, -1] = 63
    return ids


def test_a_fresh_tower_says_what_the_usual_one_says():
    encoder, ids = toy_encoder(), captions(5)
    tower = NoTower(encoder)
    torch.testing.assert_close(tower(ids), encoder.encode_text(ids))
    torch.testing.assert_close(tower(ids, 3), encoder.encode_text(ids))
    tower.prompts.data[2] += torch.randn(77, 16)
    assert (tower(ids, 2) - tower(ids, 1)).abs().max() > 1e-3


def test_teaching_changes_the_no_tower_alone():
    encoder, ids = toy_encoder(), captions(24)
    with torch.no_grad():
        yes = encoder.encode_text(ids)
    before = encoder.fingerprint
    tower = teach_no(encoder, yes, ids, epochs=30, batch_size=12, lr=3e-3, prompts=2)
    assert encoder.refresh() == before
    with torch.no_grad():
        scale = encoder.logit_scale
        first, last = (itbo_loss(yes, yes, n, scale) + tso_loss(yes, n) for n in (yes, tower(ids)))
    assert last < 0.7 * first
    again = teach_no(encoder, yes, ids, epochs=30, batch_size=12, lr=3e-3, prompts=2)
    torch.testing.assert_close(again(ids), tower(ids), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "atp"}, "Did you mean 'atd'"),
        ({"no_text": NO[:2]}, r"one row per class \(4\). Got 2"),
        ({"no_text": NO[:, :3]}, r"no_text must be a matrix of shape \(n, 6\)"),
        ({"names": ["a"]}, "names must have one entry"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ClipworksError, match=message):
        CLIPN(**{"text": YES, "no_text": NO, **settings})


def test_pairs_must_fit():
    with pytest.raises(ClipworksError, match=r"as many, at least 2\. Got 3 and 5"):
        teach_no(toy_encoder(), torch.zeros(3, 8), captions(5))
