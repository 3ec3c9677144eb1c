"""Features and the result classes: what they refuse, and their rows."""

import json

import numpy as np
import pytest

from clipworks.errors import ClipworksError
from clipworks.types import Classification, Features, Ranking


def test_features():
    made = Features(np.ones((3, 2), np.float32))
    assert (len(made), made.keys) == (3, ["0", "1", "2"])
    with pytest.raises(ClipworksError, match=r"shape \(n, dim\)\. Got shape \(3,\)"):
        Features(np.ones(3))
    for name, value in (("keys", ["a"]), ("labels", np.arange(4)), ("texts", ["x", "y"])):
        with pytest.raises(ClipworksError, match=rf"{name} must have one entry per vector \(3\)"):
            Features(np.ones((3, 2)), **{name: value})


def test_ranking():
    ranking = Ranking(["b", "a"], np.array([0.75, 0.25], np.float32), "words", [{"label": "x"}, {"label": None}])
    assert list(ranking) == [("b", 0.75), ("a", 0.25)]
    rows = json.loads(json.dumps(ranking.as_rows()))
    assert rows == [
        {"rank": 1, "key": "b", "score": 0.75, "label": "x"},
        {"rank": 2, "key": "a", "score": 0.25, "label": None},
    ]
    assert Ranking(["b"], np.array([1.0])).as_rows() == [{"rank": 1, "key": "b", "score": 1.0}]


def test_classification():
    made = Classification(["i", "j"], ["cat", "dog", "bird"], np.array([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]]))
    assert made.labels == ["dog", "cat"]  # equal ones: the first name
    assert made.as_rows() == [
        {"key": "i", "label": "dog", "probability": 0.5},
        {"key": "j", "label": "cat", "probability": 0.4},
    ]
    assert made.as_rows(2)[0]["top"] == {"dog": 0.5, "bird": 0.3}
    assert list(made.as_rows(2)[1]["top"]) == ["cat", "dog"]
    assert len(made.as_rows(9)[0]["top"]) == 3
