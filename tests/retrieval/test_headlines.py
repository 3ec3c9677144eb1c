"""Near-duplicate groups and the pairs of headlines that they give: graphs of networkx, closures, a toy corpus."""

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import adjusted_rand_score
from sklearn.metrics.cluster import pair_confusion_matrix

from clipworks.errors import ClipworksError
from clipworks.retrieval.common import components, edit_distance, group_scores, ngram_jaccard
from clipworks.retrieval.headlines import Reprints, _louvain, reprints

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_a_group_of_n_has_all_its_pairs_once():
    x = unit(np.eye(3)[[0] * 5 + [1] * 3 + [2]] + 0.001)
    found = reprints(x)
    pairs = list(found.pairs())
    assert len(pairs) == 5 * 4 / 2 + 3
    assert len({tuple(sorted(p)) for p in pairs}) == len(pairs)
    assert [len(m) for m in found.members()] == [5, 3]
    first, second = np.array(pairs).T
    assert np.array_equal(components(9, first, second), found.groups)  # the pairs are closed


def test_louvain_cuts_two_cliques_that_one_link_joins():
    edges = [(i, j) for half in (range(10), range(10, 20)) for i in half for j in half if i < j] + [(9, 10)]
    first, second = np.array(edges).T
    assert components(20, first, second).max() == 0
    found = _louvain(np.zeros(20, int), np.array(edges), 1.0, 0)
    assert found.tolist() == [0] * 10 + [1] * 10


def test_a_chain_is_cut_or_kept():
    angle = np.deg2rad(np.r_[0, 1, 2, 3, 4, 5, 21, 22, 23, 24, 25, 26.0])  # 16 degrees between: cosine 0.961
    x = np.stack([np.cos(angle), np.sin(angle)], 1)
    assert reprints(x, threshold=0.96, communities="components").groups.max() == 0
    assert reprints(x, threshold=0.96).groups.tolist() == [0] * 6 + [1] * 6


def test_scores_of_pairs_are_the_confusion_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 6, 40), rng.integers(0, 8, 40)
    pairs = [(truth[i] == truth[j], found[i] == found[j]) for i in range(40) for j in range(i)]
    right = sum(a and b for a, b in pairs)
    scores = group_scores(truth, found)
    assert scores["precision"] == pytest.approx(right / sum(b for _, b in pairs))
    assert scores["recall"] == pytest.approx(right / sum(a for a, _ in pairs))
    assert scores["f1"] == pytest.approx(2 * right / sum(int(a) + int(b) for a, b in pairs))
    assert scores["rand"] == pytest.approx(np.mean([a == b for a, b in pairs]))
    assert right == pair_confusion_matrix(truth, found)[1, 1] / 2


def test_documents_without_a_copy_count():
    truth, found = np.array([0, 0, 1, 1, 2]), np.array([0, 0, 1, 2, 3])
    assert group_scores(truth, found)["ari"] != group_scores(truth[:4], found[:4])["ari"]


def test_ngram_jaccard():
    texts = ["the mayor speaks", "the mayor spoke", "rain", "ab", "the mayor speaks"]
    found = ngram_jaccard(texts, 4)
    grams = [{t[i : i + 4] for i in range(len(t) - 3)} for t in texts]
    for i, a in enumerate(grams):
        for j, b in enumerate(grams):
            assert found[i, j] == pytest.approx(len(a & b) / len(a | b) if a | b else 0)
    assert found[0, 0] == found[0, 4] == 1
    assert (found[3] == 0).all()
    assert np.array_equal(found, found.T)


def test_edit_distance():
    assert edit_distance("", "abc") == 3
    assert edit_distance("office", "offices") == 1
    assert edit_distance("flaw", "lawn") == 2
    assert edit_distance("abcdef", "uvwxyz", 2) == 3
    assert edit_distance("same", "same", 0) == 0


def test_a_higher_threshold_removes_links_only_and_enough_neighbours_are_all():
    x = unit(np.random.default_rng(0).normal(size=(80, 3)))
    links = [{tuple(e) for e in reprints(x, threshold=t).edges} for t in (0.8, 0.9, 0.95)]
    assert links[0] > links[1] > links[2]
    brute = {(i, j) for i in range(80) for j in range(i + 1, 80) if x[i] @ x[j] >= 0.9}
    assert links[1] == brute
    few = {tuple(e) for e in reprints(x, threshold=0.9, neighbours=2).edges}
    assert few < brute


def test_dates_and_a_second_look():
    x = np.ones((4, 2))
    days = ["1935-03-01", "1935-03-20", "1935-06-01", "1935-06-02"]
    assert reprints(x, days).groups.tolist() == [0, 0, 1, 1]
    assert reprints(x, np.array([0, 30, 61, 200])).groups.tolist() == [0, 0, 1, 2]
    angle = np.deg2rad([0, 21.5, 90, 111.5])  # cosine 0.930
    y = np.stack([np.cos(angle), np.sin(angle)], 1)
    asked = []
    found = reprints(y, agree=lambda i, j: bool(asked.append((i, j))) or i == 0)
    assert found.groups.tolist() == [0, 0, 1, 2]
    assert sorted(asked) == [(0, 1), (2, 3)]


def test_headlines_are_cleaned():
    titles = ["Mayor Speaks on Water", "Mayor  speaks on water", "Mayor speaks on watcr", "Council Hears the Mayor"]
    titles += ["Fire", "The Weather To Day", "The Weather To Day", "Bank Is Robbed at Noon", "The weather to day"]
    found = Reprints(np.array([0, 0, 0, 0, 0, 0, 1, 1, 2]), np.empty((0, 2), int))
    kept = list(found.pairs(titles))
    assert kept == [(0, 3), (1, 3), (2, 3)]
    assert len(list(found.pairs())) == 15 + 1


def test_a_toy_corpus_of_noisy_and_cut_copies():
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list(LETTERS), rng.integers(3, 9))) for _ in range(400)]
    articles = [" ".join(rng.choice(words, 60)) for _ in range(50)]
    bodies, titles, truth = [], [], []
    for number, article in enumerate(articles):
        for _ in range(5):
            letters = np.array(list(article))
            wrong = rng.random(len(letters)) < 0.1
            letters[wrong] = rng.choice(list(LETTERS), wrong.sum())
            bodies.append("".join(letters)[rng.integers(0, 30) : len(letters) - rng.integers(1, 30)])
            titles.append(" ".join(rng.choice(article.split(), 5)))
            truth.append(number)
    table = TfidfVectorizer(analyzer="char", ngram_range=(2, 3), max_features=3000).fit_transform(bodies).toarray()
    found = reprints(table, threshold=0.3)
    assert adjusted_rand_score(truth, found.groups) > 0.9
    pairs = list(found.pairs(titles))
    assert pairs
    assert all(titles[i] != titles[j] for i, j in pairs)


def test_mistakes_are_named():
    x = np.eye(3)
    with pytest.raises(ClipworksError, match="communities must be one of"):
        reprints(x, communities="louvian")
    with pytest.raises(ClipworksError, match=r"one day per vector \(3\)"):
        reprints(x, [1, 2])
    with pytest.raises(ClipworksError, match="dates must be days"):
        reprints(x, ["a", "b", "c"])
    with pytest.raises(ClipworksError, match=r"one text per document \(3\)\. Got 1"):
        list(reprints(x).pairs(["a"]))
