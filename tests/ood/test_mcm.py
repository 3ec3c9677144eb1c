"""mcm by loops, its limits and its relations to the other scores."""

import numpy as np
import pytest

from clipworks.errors import ClipworksError
from clipworks.ood.mcm import mcm
from clipworks.ood.msp import msp

LOGITS = np.random.default_rng(0).normal(size=(20, 6)) * 3


def test_formula_and_relation_to_msp():
    c = np.tanh(LOGITS)
    expected = [max(np.exp(v) for v in row) / sum(np.exp(v) for v in row) for row in c]
    np.testing.assert_allclose(mcm(c), expected, rtol=1e-12)
    np.testing.assert_allclose(mcm(c, temperature=1 / 50), msp(50 * c))
    assert (mcm(c[:, :1]) == 1).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [(np.array([np.nan, 1]), "finite"), (3.0, r"shape \(\.\.\., C\)"), ([["a"]], "an array of numbers")],
)
def test_mistakes_are_named(given, message):
    with pytest.raises(ClipworksError, match="cosines must .*" + message):
        mcm(given)


def test_temperature_is_positive():
    with pytest.raises(ClipworksError, match=r"temperature must be above 0\. Got 0"):
        mcm(LOGITS, temperature=0)
