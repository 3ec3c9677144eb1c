"""The shared parts: encoding once, checking vectors, means of groups, scores."""

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.types import Features
from clipworks.zeroshot.sentences import Scores, as_text, as_vectors, best, encode, grouped, means, softmax


class Counting:
    def __init__(self):
        self.asked = []

    def texts(self, sentences):
        self.asked.append(list(sentences))
        return torch.tensor([[float(len(s)), 1.0] for s in sentences])


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_sentences_are_encoded_once_in_chunks_and_come_back_in_order(chunk):
    encoder, sentences = Counting(), ["aa", "b", "aa", "cccc", "b"]
    found = encode(sentences, encoder, chunk)
    expected = np.array([[len(s), 1] / np.hypot(len(s), 1) for s in sentences])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert [s for part in encoder.asked for s in part] == ["aa", "b", "cccc"]
    assert max(map(len, encoder.asked)) <= chunk


def test_a_mapping_is_an_encoder():
    table = {"a": torch.tensor([3.0, 4.0]), "b": [0, 1]}
    np.testing.assert_allclose(encode(["b", "a"], table), [[0, 1], [0.6, 0.8]], atol=1e-6)
    with pytest.raises(ClipworksError, match=r"none for 'aa'"):
        encode(["aa"], table)
    with pytest.raises(ClipworksError, match="one length"):
        encode(["a", "b"], {"a": [1.0], "b": [1.0, 2.0]})
    with pytest.raises(ClipworksError, match=r"must have texts.*Got int"):
        encode(["a"], 3)


def test_vectors_are_copied_to_length_1_and_checked():
    given = np.array([[3.0, 4.0], [0.0, 0.0]])
    for form in (given, torch.tensor(given), given.tolist(), Features(given.astype(np.float16))):
        np.testing.assert_allclose(as_vectors("x", form), [[0.6, 0.8], [0, 0]], atol=1e-6)
    np.testing.assert_array_equal(given, [[3, 4], [0, 0]])
    for bad, message in [
        (given[0], r"x must be a matrix of shape \(n, dim\). Got shape \(2,\)"),
        (np.array([[1.0, np.nan]]), "x must be finite. Got NaN or infinity in 1 of 1"),
        ([["a"]], "x must be a matrix of numbers. Got list"),
    ]:
        with pytest.raises(ClipworksError, match=message):
            as_vectors("x", bad)
    with pytest.raises(ClipworksError, match=r"shape \(n, 3\)"):
        as_vectors("x", given, 3)
    with pytest.raises(ClipworksError, match=r"at least 3 vectors\. Got 2"):
        as_vectors("x", given, least=3)
    with pytest.raises(ClipworksError, match=r"one entry per row of text \(2\). Got 1"):
        as_text(given, ["a"])


def test_means_of_runs():
    rows = np.arange(12, dtype=np.float32).reshape(6, 2)
    np.testing.assert_allclose(means(rows, [1, 3, 2]), [rows[0], rows[1:4].mean(0), rows[4:].mean(0)])


def test_best_takes_the_first_of_equals():
    assert best(np.array([[1.0, 3.0, 3.0, 2.0]]), 3).tolist() == [[1, 2, 3]]
    assert best(np.zeros((2, 3)), 9).tolist() == [[0, 1, 2]] * 2


def test_images_are_grouped_by_their_candidates():
    candidates = np.array([[3, 1], [0, 2], [1, 3], [1, 2]])
    assert [(g, rows.tolist()) for g, rows in grouped(candidates)] == [([0, 2], [1]), ([1, 2], [3]), ([1, 3], [0, 2])]
    assert grouped(np.empty((0, 2), int)) == []


def test_scores():
    scores = Scores(["a", "b", "c"], np.array([[0.1, 0.3, -np.inf], [0.2, 0.1, 0.2]]))
    assert scores.labels == ["b", "a"]
    e = np.exp(50 * scores.scores)
    np.testing.assert_allclose(scores.probabilities(50), e / e.sum(1, keepdims=True))
    assert softmax(np.array([[1e6, 0.0]])).tolist() == [[1.0, 0.0]]
    assert Scores(["a"], np.empty((0, 1))).probabilities().shape == (0, 1)
