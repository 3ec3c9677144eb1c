"""Class-word vectors against a plain numpy re-computation, and the facts of the card."""

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.zeroshot.classifier import class_vectors
from clipworks.zeroshot.templates import resolve_templates, template_sets


class Words:
    """Encodes a sentence as a unit vector from a generator seeded by it; remembers what it was asked."""

    def __init__(self, dim=16):
        self.dim, self.asked = dim, []

    def texts(self, sentences):
        self.asked.append(list(sentences))
        return torch.from_numpy(np.stack([self.vector(s) for s in sentences]))

    def vector(self, sentence):
        v = np.random.default_rng(list(sentence.encode())).normal(size=self.dim)
        return v / np.linalg.norm(v)


NAMES = ["cat", "golden retriever", "car", "aardvark"]


def oracle(names, templates, encoder):
    rows = []
    for name in names:
        mean = np.mean([encoder.vector(t.replace("{}", name)) for t in templates], axis=0)
        rows.append(mean / np.linalg.norm(mean))
    return np.stack(rows)


@pytest.mark.parametrize("templates", ["default", "simple", "imagenet", ["a {}", "the {} there"], "my {}"])
def test_equals_the_formula(templates):
    encoder = Words()
    found = class_vectors(NAMES, encoder, templates=templates)
    np.testing.assert_allclose(found, oracle(NAMES, resolve_templates(templates), encoder), atol=1e-6)
    np.testing.assert_allclose(found.norm(dim=1), 1, atol=1e-6)


def test_one_template_is_plain_zero_shot():
    encoder = Words()
    plain = encoder.texts([f"a photo of a {n}." for n in NAMES]).float()
    torch.testing.assert_close(class_vectors(NAMES, encoder, templates="simple"), plain)


def test_repeated_templates_change_nothing():
    once = class_vectors(NAMES, Words(), templates=["a {}", "the {}"])
    thrice = class_vectors(NAMES, Words(), templates=["a {}", "the {}"] * 3)
    torch.testing.assert_close(once, thrice)


@pytest.mark.parametrize("chunk", [1, 3, 5, 100])
def test_chunks_change_nothing_and_bound_what_is_encoded_at_a_time(chunk):
    encoder = Words()
    found = class_vectors(NAMES, encoder, chunk=chunk)
    torch.testing.assert_close(found, class_vectors(NAMES, Words()))
    assert max(map(len, encoder.asked)) <= chunk


def test_every_distinct_sentence_is_encoded_once():
    encoder = Words()
    # "a toy dog" comes from both names
    class_vectors(["dog", "toy dog"], encoder, templates=["a {}", "a toy {}", "a {}"])
    asked = [s for batch in encoder.asked for s in batch]
    assert sorted(asked) == ["a dog", "a toy dog", "a toy toy dog"]


def test_order_of_names_and_templates_does_not_matter():
    forward = class_vectors(NAMES, Words(), templates=["a {}", "the {}"])
    backward = class_vectors(NAMES[::-1], Words(), templates=["the {}", "a {}"])
    torch.testing.assert_close(forward, backward.flip(0))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "at least one"),
        (["cat", " "], "must be words"),
        (["cat", "dog", "cat"], "distinct.*'cat'"),
        ("cat", "list of class names"),
    ],
)
def test_names_that_cannot_be_told_apart_are_refused(names, message):
    with pytest.raises(ClipworksError, match=message):
        class_vectors(names, Words())


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ("defualt", "Did you mean 'default'"),
        ("a photo", "templates must be one of"),
        (["a photo"], "exactly once"),
        (["{} and {}"], "exactly once"),
        ("{name}", "exactly once"),
        ([], "at least one"),
    ],
)
def test_templates_without_a_place_for_the_name_are_refused(templates, message):
    with pytest.raises(ClipworksError, match=message):
        class_vectors(NAMES, Words(), templates=templates)


def test_braces_in_names_are_words():
    found = class_vectors(["{} {0.__class__}", "b"], Words(), templates=["a {}"])
    np.testing.assert_allclose(found[0], Words().vector("a {} {0.__class__}"), atol=1e-6)


def test_the_published_template_sets():
    sets = template_sets()
    assert len(sets["default"]) == 7
    assert len(set(sets["imagenet"])) == 80
    assert set(sets["default"]) < set(sets["imagenet"])
    assert set(sets["simple"]) < set(sets["imagenet"])
    assert all(t.count("{}") == 1 for templates in sets.values() for t in templates)
