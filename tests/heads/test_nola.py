"""NoLA's alignment head against numpy, torch's own layers, and the checkable facts of its card."""

import numpy as np
import pytest
import torch
from few_shots import assert_sklearn_accepts, nll, shots, softmax, unit

from clipworks.errors import ClipworksError
from clipworks.heads.nola import NoLA, description_vectors, surest
from clipworks.types import Features
from clipworks.zeroshot.classifier import class_vectors


class Words:
    def texts(self, sentences):
        rows = [np.random.default_rng(list(s.encode())).normal(size=12) for s in sentences]
        return torch.from_numpy(unit(np.stack(rows)))


def test_one_description_that_is_the_template_gives_the_zero_shot_weights():
    """Card, fact 1."""
    names = ["hen", "cat"]
    plain = class_vectors(names, Words(), templates="a photo of a {}.").numpy()
    told = {n: [f"a photo of a {n}."] for n in names}
    found = description_vectors(names, Words(), told, "a photo of a {}.")
    np.testing.assert_allclose(found, plain, atol=1e-6)
    more = description_vectors(names, Words(), {"hen": ["it has a comb", "it is red"]}, ["{}", "one {}"])
    sentences = Words().texts(["hen", "one hen", "it has a comb", "it is red"]).numpy()
    np.testing.assert_allclose(more[0], unit(sentences.mean(0)), atol=1e-6)
    np.testing.assert_allclose(more[1], unit(Words().texts(["cat", "one cat"]).numpy().mean(0)), atol=1e-6)


@pytest.mark.parametrize(("n", "k"), [(1000, 20), (500, 16), (2390, 47)])
def test_so_many_of_the_surest_are_kept(n, k):
    """Card, fact 2."""
    p = np.random.default_rng(0).dirichlet(np.ones(10) / 2, n)
    rows, said = surest(p)
    assert len(set(rows)) == len(rows)
    np.testing.assert_array_equal(said, p[rows].argmax(1))
    for c in range(10):
        own = np.flatnonzero(p.argmax(1) == c)
        assert sorted(rows[said == c]) == sorted(own[np.argsort(-p[own, c])][:k])
        assert (said == c).sum() == min(k, len(own))


def test_the_network_has_the_cards_size_and_is_that_of_torch():
    """Card, fact 6."""
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(40, 768)), np.repeat(np.arange(5), 8)
    head = NoLA(epochs=1).fit(z, y)
    assert sum(w.size for w in head.weights_) == 768 * 256 + 256 + 256 * 5 + 5
    network = torch.nn.Sequential(torch.nn.Linear(768, 256), torch.nn.ReLU(), torch.nn.Linear(256, 5)).double()
    with torch.no_grad():
        for own, learned in zip(network.parameters(), head.weights_, strict=True):
            own.copy_(torch.from_numpy(learned))
        expected = network(torch.from_numpy(unit(z) * 768**0.5)).numpy()
    np.testing.assert_allclose(head.logits(z), expected, atol=1e-9)


def test_a_step_is_adams_on_the_cross_entropy():
    """One batch, one epoch: every weight moves by lr against the sign of its gradient (first step of Adam)."""
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(10, 4)), np.arange(10) % 2
    start, moved = (NoLA(hidden=6, epochs=1, batch_size=10, lr=lr).fit(z, y).weights_ for lr in (0.0, 1e-3))
    rows = unit(z) * 2

    def loss(weights):
        inside = np.maximum(rows @ weights[0].T + weights[1], 0)
        return nll(inside @ weights[2].T + weights[3], y)

    for index, at in ((0, (2, 1)), (1, (3,)), (2, (1, 4)), (3, (0,))):
        shifted = [w.copy() for w in start]
        shifted[index][at] += 1e-5
        slope = (loss(shifted) - loss(start)) / 1e-5
        if abs(slope) > 1e-3:
            assert moved[index][at] - start[index][at] == pytest.approx(-1e-3 * np.sign(slope), rel=1e-3)


def test_the_head_is_better_than_the_words_that_taught_it():
    """Card, fact 7: 70 to 80 % right by the words, clusters well apart to the second encoder."""
    clip, y, words = shots(classes=3, per_class=150, noise=2.6, word_noise=1.5, dim=24)
    z = shots(classes=3, per_class=150, noise=0.5, dim=32, seed=5)
    z = z[0][np.argsort(z[1], kind="stable")][np.argsort(np.argsort(y, kind="stable"))]
    assert 0.6 < np.mean((clip @ words.T).argmax(1) == y) < 0.8
    head = NoLA(text=words).fit(z, clip=clip)
    assert head.score(z, y) > 0.97
    assert head.counts_.tolist() == [30, 30, 30]


def test_labels_are_not_read_where_there_are_words():
    x, y, words = shots(per_class=20)
    plain = NoLA(text=words, epochs=3).fit(x).logits(x)
    for given in ((x, y[::-1]), (Features(x, labels=y),)):
        np.testing.assert_array_equal(NoLA(text=words, epochs=3).fit(*given).logits(x), plain)


def test_seeds_are_arguments_and_no_generator_is_moved():
    x, _, words = shots(per_class=20)
    torch.manual_seed(0), np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, two = (NoLA(text=words, epochs=2, seed=s).fit(x).logits(x) for s in (0, 1))
    assert torch.equal(before[0], torch.get_rng_state())
    np.testing.assert_array_equal(before[1], np.random.get_state()[1])
    assert not np.allclose(one, two)


def test_classes_have_their_names_and_one_that_is_never_seen_is_reported():
    x, y, words = shots(classes=4, per_class=30, noise=0.4, word_noise=0.3)
    names = np.array(["wren", "ant", "cat", "bee"])
    text = Features(words, labels=names)
    head = NoLA(text=text).fit(x)
    assert head.classes_.tolist() == sorted(names)
    assert head.score(x, names[y]) > 0.95
    with pytest.warns(UserWarning, match="looks most like 'bee'"):
        head = NoLA(text=text).fit(x[y != 3])
    assert head.counts_[head.classes_.tolist().index("bee")] == 0


def test_the_temperature_is_fitted_on_validation_images_only():
    x, _, words = shots(per_class=20)
    held, own, _ = shots(noise=2.0, draw=1)
    assert NoLA(text=words).fit(x).temperature_ == 1
    head = NoLA(text=words).fit(x, validation=(held, own))
    logits = head.logits(held)
    np.testing.assert_allclose(head.predict_proba(held), softmax(logits / head.temperature_))
    least = min(nll(logits / t, own) for t in np.geomspace(0.01, 100, 400))
    assert nll(logits / head.temperature_, own) <= least + 1e-6
    np.testing.assert_array_equal(logits, NoLA(text=words).fit(x).logits(held))


def test_what_cannot_be_used_is_named():
    x, _, words = shots()
    for call, message in (
        (lambda: NoLA().fit(x), "without text it requires y"),
        (lambda: NoLA(text=words[:1]).fit(x), "at least 2 classes"),
        (lambda: NoLA(text=words).fit(x, clip=x[:-1]), "one finite row per row of x"),
        (lambda: NoLA(text=words).fit(x[:, :-1]), "columns of x"),
        (lambda: NoLA(text=words, epochs=0).fit(x), "epochs must lie in"),
        (lambda: NoLA(text=words, keep=-1).fit(x), "keep must lie in"),
    ):
        with pytest.raises(ClipworksError, match=message):
            call()


def test_scikit_learn_accepts_it():
    assert_sklearn_accepts(NoLA(hidden=16, lr=3e-2, epochs=8))
