"""max_logit by loops, its limits and its relations to the other scores."""

import numpy as np
import pytest

from clipworks.errors import ClipworksError
from clipworks.ood.max_logit import max_logit

LOGITS = np.random.default_rng(0).normal(size=(20, 6)) * 3


def test_formula():
    assert max_logit(LOGITS).tolist() == [max(row) for row in LOGITS.tolist()]
    np.testing.assert_allclose(max_logit(LOGITS + 7), max_logit(LOGITS) + 7)
    assert max_logit(LOGITS.reshape(4, 5, 6)).shape == (4, 5)


@pytest.mark.parametrize(
    ("given", "message"),
    [(np.array([np.nan, 1]), "finite"), (3.0, r"shape \(\.\.\., C\)"), ([["a"]], "an array of numbers")],
)
def test_mistakes_are_named(given, message):
    with pytest.raises(ClipworksError, match="logits must .*" + message):
        max_logit(given)
