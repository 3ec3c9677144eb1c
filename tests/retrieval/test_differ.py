"""`differ`: from features and folders, what is held out, and the vocabulary."""

import numpy as np
import pytest
from PIL import Image

from clipworks.errors import ClipworksError
from clipworks.retrieval.differ import _split, differ
from clipworks.retrieval.visdiff import propose, visdiff
from clipworks.retrieval.vocabulary import visual_vocabulary
from clipworks.types import Features


class Words:
    """An encoder of words alone: phrase number i is axis i."""

    dim, fingerprint = 300, ""

    def texts(self, phrases):
        import torch

        return torch.eye(self.dim)[: len(phrases)]


def features(axis, n=80, seed=0, strength=3):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 300)).astype(np.float32)
    x[:, axis] += strength
    return Features(x)


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr("clipworks.store.identity.obtain", lambda *a, **k: (Words(), None))


def test_a_planted_difference_out_of_the_vocabulary(plain):
    names = visual_vocabulary()
    found = differ(features(17), features(40, seed=1))
    assert found.phrases[0] == names[17]
    assert found.phrases[-1] != names[17]
    assert len(found) == 100
    assert [row["phrase"] for row in found.as_rows()] == [names[17]]


def test_phrases_are_chosen_by_some_images_and_ranked_on_the_rest(plain):
    a, b, names = features(17), features(40, seed=1), visual_vocabulary()
    (seen_a, rest_a), (seen_b, rest_b) = (_split(x.vectors, 0.5, 3) for x in (a, b))
    text = np.eye(300)[: len(names)]
    text = text - text.mean(0)
    kept = propose(seen_a, seen_b, text, 20)
    expected = visdiff(rest_a, rest_b, [names[i] for i in kept], text[kept])
    found = differ(a, b, count=20, seed=3)
    assert found.phrases == expected.phrases
    np.testing.assert_allclose(found.auroc, expected.auroc)


def test_what_is_near_to_all_words_is_not_near_to_each(plain):
    """The first set is nearer to every word; only word 17 is more than that."""
    a, b, names = features(17), features(40, seed=1, strength=0), visual_vocabulary()
    a.vectors[:, : len(names)] += 1
    found = differ(a, b, centre=False, count=len(names))
    assert (found.auroc > 0.6).mean() > 0.9
    centred = differ(a, b, count=len(names))
    assert centred.phrases[0] == names[17]
    assert (centred.auroc > 0.6).mean() < 0.3


def test_the_parts_do_not_overlap():
    x = np.arange(11)[:, None]
    for share in (0.05, 0.5, 0.9):
        one, other = _split(x, share, 0)
        assert sorted([*one[:, 0], *other[:, 0]]) == list(range(11))
        assert len(one)
        assert len(other)


def test_phrases_of_a_file_and_of_a_proposer(plain, tmp_path):
    (tmp_path / "p.txt").write_text("first thing\n\nsecond thing\n")
    found = differ(features(0), features(1, seed=1), phrases=str(tmp_path / "p.txt"))
    assert found.phrases == ["first thing", "second thing"]
    again = differ(features(0), features(1, seed=1), proposer=lambda: ["first thing", "second thing"])
    assert np.array_equal(found.auroc, again.auroc)


def test_the_vocabulary():
    names = visual_vocabulary()
    assert 200 < len(names) < 260
    assert len(set(names)) == len(names)
    assert all(name.strip() and "\n" not in name for name in names)


def test_from_folders(tmp_path):
    from inversion_checks import encoder

    for name, colour in (("dark", 10), ("light", 240)):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.new("RGB", (16, 16), (colour + i,) * 3).save(tmp_path / name / f"{i}.png")
    found = differ(tmp_path / "dark", tmp_path / "light", encoder=encoder(), phrases=["night", "day"])
    assert sorted(found.phrases) == ["day", "night"]
    assert set(found.auroc.tolist()) <= {0.0, 1.0}


def test_mistakes_are_named(plain):
    with pytest.raises(ClipworksError, match="phrases must be a text file"):
        differ(features(0), features(1), phrases="no.txt")
    with pytest.raises(ClipworksError, match="hold 2 images each"):
        differ(features(0, n=1), features(1))
    with pytest.raises(ClipworksError, match="first must hold images"):
        differ(features(0, n=0), features(1))
