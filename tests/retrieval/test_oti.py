"""Textual inversion: AdamW written out, no cross-talk, where the end token stands, and the paper's linear world."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inversion_checks import adamw, encoder, rows, state, unchanged
from sklearn.metrics import average_precision_score

from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.toy import toy_encoder
from clipworks.errors import ClipworksError
from clipworks.metrics.retrieval import image_retrieval
from clipworks.retrieval.common import average_precision_at_r
from clipworks.retrieval.oti import pseudo_sentence, textual_inversion


def test_the_loss_falls_within_its_bounds_and_the_encoder_is_as_before():
    model = encoder().train()
    before, learning = state(model), [q.requires_grad for q in model.parameters()]
    found = textual_inversion(rows(3), model, steps=40)
    assert (found.losses >= 0).all()
    assert (found.losses <= 2).all()
    assert (found.losses[:, -5:].mean(1) < found.losses[:, :5].mean(1)).all()
    assert unchanged(before, model)
    assert model.training
    assert [q.requires_grad for q in model.parameters()] == learning
    assert all(q.grad is None for q in model.parameters())
    np.testing.assert_allclose(1 - (found.vectors * rows(3)).sum(1), found.losses[:, -1], atol=1e-6)


def test_against_adamw_written_out():
    model, goal = encoder(), rows(1)
    ids = model.tokenize("a photo of *")
    end = int((ids == model.tokenizer.eot_id).int().argmax())

    def text(vector):
        words = model.text.tokens(ids).detach().clone()
        words[0, end - 1] = vector
        return F.normalize(model.text.run(embeddings=words, eot=torch.tensor([end])).pooled, dim=-1)[0]

    def gradient(x):
        vector = torch.tensor(x, dtype=torch.float32, requires_grad=True)
        (1 - text(vector) @ torch.from_numpy(goal[0])).backward()
        return vector.grad.numpy().astype(float)

    start = textual_inversion(goal, model, steps=0).tokens[0, 0].astype(float)
    found = textual_inversion(goal, model, steps=6)
    np.testing.assert_allclose(found.tokens[0, 0], adamw(start, gradient, 6), atol=2e-4)


def test_a_batch_is_as_many_single_ones():
    model, goals = encoder(), rows(5)
    together = textual_inversion(goals, model, steps=20)
    in_parts = textual_inversion(goals, model, steps=20, batch_size=2)
    alone = np.concatenate([textual_inversion(g[None], model, steps=20).vectors for g in goals])
    assert np.abs(together.vectors - alone).max() < 1e-4
    assert np.abs(together.vectors - in_parts.vectors).max() < 1e-4


def test_without_steps_it_does_not_depend_on_the_vector():
    found = textual_inversion(rows(4), encoder(), steps=0)
    assert np.ptp(found.vectors, axis=0).max() < 1e-6
    other = textual_inversion(rows(4), encoder(), steps=0, seed=1)
    assert np.abs(found.vectors - other.vectors).max() > 1e-3


@pytest.mark.parametrize(("count", "tokenizer"), [(1, None), (3, None), (2, CLIPTokenizer)])
def test_a_real_word_in_the_slot_gives_that_sentence(count, tokenizer):
    model = toy_encoder(tokenizer=tokenizer and tokenizer())
    sentence = pseudo_sentence(model, "a photo of", count)
    text = "a photo of " + " ".join(["cat"] * count)
    ids = model.tokenize(text)[0]
    word = model.text.tokens(ids[4:5]).detach()
    found = sentence.encode_own(word.expand(1, count, -1), torch.zeros(1, dtype=torch.long)).detach()
    np.testing.assert_allclose(found.numpy(), model.texts([text]).numpy(), atol=1e-6)


def test_the_linear_world_of_the_paper():
    """image = A s + c C u + m e with u private to images; inversion keeps span(A) alone, and ranks better by it."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(48, 48)))[0]
    labels = np.repeat(np.arange(20), 20)

    def precision(c, m):
        shared = rng.normal(size=(20, 16))[labels] + 0.9 * rng.normal(size=(400, 16))
        own = rng.normal(size=(400, 16)) * 16**0.5 / 4
        shared /= np.linalg.norm(shared, axis=1, keepdims=True)
        image = shared @ basis[:, :16].T + c * own @ basis[:, 16:32].T + m * basis[:, 32]
        image /= np.linalg.norm(image, axis=1, keepdims=True)
        inverted = image @ basis[:, :16] @ basis[:, :16].T
        plain = image_retrieval(image, labels).mean_average_precision
        across = image_retrieval(inverted, labels, gallery=image, gallery_labels=labels, ignore=np.eye(400))
        return plain, across.mean_average_precision

    plain, across = precision(0.0, 0.0)
    assert across == pytest.approx(plain, abs=1e-4)
    for c in (0.3, 0.6):
        plain, across = precision(c, 0.0)
        assert across > plain + 0.005


def test_average_precision_at_r_and_the_release_s_count():
    rng = np.random.default_rng(0)
    scores, labels = rng.random((12, 12)), rng.integers(0, 3, 12)
    np.fill_diagonal(scores, -np.inf)
    relevant = labels[:, None] == labels
    for i, found in enumerate(average_precision_at_r(scores, relevant)):
        order = [j for j in np.argsort(-scores[i]) if j != i]
        hits = [labels[j] == labels[i] for j in order]
        r = sum(hits)
        assert found == pytest.approx(sum(sum(hits[: k + 1]) / (k + 1) for k in range(r) if hits[k]) / r)
    assert (average_precision_at_r(scores, relevant, itself=True) < 1).all()
    perfect = np.where(relevant, 1.0, 0.0)
    np.fill_diagonal(perfect, -np.inf)
    assert (average_precision_at_r(perfect, relevant) == 1).all()
    count = relevant.sum(1)
    np.testing.assert_allclose(average_precision_at_r(perfect, relevant, itself=True), (count - 1) / count)


def test_mean_average_precision_leaves_the_query_out():
    x, labels = rows(20), np.random.default_rng(1).integers(0, 3, 20)
    score = x @ x.T
    expected = [average_precision_score(np.delete(labels == labels[i], i), np.delete(score[i], i)) for i in range(20)]
    found = image_retrieval(x, labels, gallery=x, gallery_labels=labels, ignore=np.eye(20))
    np.testing.assert_allclose(found.average_precision, expected, atol=1e-6)


def test_mistakes_are_named():
    with pytest.raises(ClipworksError, match=r"features must be a matrix of shape \(n, 8\)"):
        textual_inversion(rows(2, 5), encoder())
    with pytest.raises(ClipworksError, match="room for 1 pseudo-words"):
        textual_inversion(rows(2), encoder(), prompt="a " * 100)
    mute = encoder()
    mute.tokenizer = None
    with pytest.raises(ClipworksError, match="tokenizer"):
        textual_inversion(rows(2), mute)
    with pytest.raises(ClipworksError, match="tokens must lie in"):
        textual_inversion(rows(2), encoder(), tokens=0)
    assert textual_inversion(rows(2)[:0], encoder()).vectors.shape == (0, 8)
