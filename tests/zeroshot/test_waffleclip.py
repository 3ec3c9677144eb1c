"""The random-word control against a plain numpy computation, and the facts of its card."""

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.zeroshot.classifier import class_vectors
from clipworks.zeroshot.classify_by_description import classify_by_description
from clipworks.zeroshot.waffleclip import WORDS, random_descriptors, waffleclip

NAMES = ["red hen", "grey cat", "tiger shark"]


class Words:
    """Encodes a sentence as a unit vector from a generator seeded by it."""

    def texts(self, sentences):
        return torch.from_numpy(np.stack([self.vector(s) for s in sentences]))

    @staticmethod
    def vector(sentence):
        v = np.random.default_rng(list(sentence.encode())).normal(size=16)
        return v / np.linalg.norm(v)


def images(n=25):
    rows = np.random.default_rng(0).normal(size=(n, 16))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("count", [1, 4, 15])
def test_equals_the_formula_with_the_same_noise_for_all_classes(count):
    found = waffleclip(images(), NAMES, Words(), count=count)
    assert len(found.noise) == 2 * count
    for c, name in enumerate(NAMES):
        similarities = [images() @ Words.vector(f"a photo of a {name}, which has {n}.") for n in found.noise]
        np.testing.assert_allclose(found.scores[:, c], np.mean(similarities, axis=0), atol=1e-6)


def test_without_noise_it_is_plain_zero_shot():
    plain = class_vectors(NAMES, Words(), templates="simple").numpy()
    found = waffleclip(images(), NAMES, Words(), count=0)
    np.testing.assert_allclose(found.scores, images() @ plain.T, atol=1e-6)
    assert found.noise == []


def test_it_is_description_with_the_noise_as_descriptions():
    found = waffleclip(images(), NAMES, Words(), count=15)
    noise = list(dict.fromkeys(found.noise))
    assert not [n for n in noise if n.split()[0] in ("a", "an", "used", "has", "often", "typically", "may", "can")]
    told = classify_by_description(images(), NAMES, Words(), dict.fromkeys(NAMES, noise), template="a photo of a {}.")
    weights = np.array([found.noise.count(n) for n in noise])
    assert weights.max() == 1
    np.testing.assert_allclose(found.scores, told.scores, atol=1e-6)


def test_a_seed_is_a_draw():
    first, again, other = (waffleclip(images(), NAMES, Words(), seed=s) for s in (3, 3, 4))
    assert first.noise == again.noise
    assert np.array_equal(first.scores, again.scores)
    assert first.noise != other.noise


@pytest.mark.parametrize(
    ("names", "number", "length"),
    [(["ox", "ant"], 1, 2), (["cat", "dog"], 1, 3), (NAMES, 2, 4), (["a b c", "d e f g"], 4, 1), (["x" * 40], 1, 40)],
)
def test_noise_is_as_long_as_the_names(names, number, length):
    noise = random_descriptors(names, 10, alphabet="xyz")
    assert len(noise) == 20
    nearest = min(abs(len(w) - length) for w in WORDS)
    for descriptor in noise[:10]:
        assert len(descriptor.split()) == number
        assert all(w in WORDS and abs(len(w) - length) == nearest for w in descriptor.split())
    for descriptor in noise[10:]:
        assert [len(w) for w in descriptor.split()] == [length] * number
        assert set(descriptor) <= set("xyz ")


def test_every_word_and_character_can_be_drawn():
    noise = random_descriptors(["abcd"], 200, words=["four", "five", "nine", "eleven"], alphabet="pq")
    assert set(noise[:200]) == {"four", "five", "nine"}
    assert {c for n in noise[200:] for c in n} == {"p", "q"}


def test_the_words_are_words():
    assert len(WORDS) == len(set(WORDS)) > 150
    assert all(w.isalpha() and w.islower() for w in WORDS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": -1}, "count must lie in"),
        ({"words": []}, "words must be a list"),
        ({"words": "abc"}, "words must be a list"),
        ({"alphabet": ""}, "alphabet must hold"),
        ({"names": ["hen", "hen"]}, "distinct"),
        ({"features": images()[:, :2]}, r"shape \(n, 16\)"),
        ({"template": "a photo"}, "exactly once"),
    ],
)
def test_mistakes_are_named(change, message):
    given = {"features": images(), "names": NAMES, "encoder": Words(), **change}
    with pytest.raises(ClipworksError, match=message):
        waffleclip(**given)
