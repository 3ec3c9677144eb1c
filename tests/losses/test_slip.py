"""SLIP: the two terms and their weight, against numpy; local rows."""

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.losses.slip import slip

from .oracle import assert_gradient, assert_safe, clip, log_softmax, pair

IMAGE, TEXT = pair(6, 5)
FIRST, SECOND = pair(6, 7, seed=5)


def _views(a, b, tau):
    """All 2n views in one matrix, as SimCLR states it: the mean over all of them."""
    z = np.concatenate([np.asarray(a), np.asarray(b)])
    logits = z @ z.T / tau
    np.fill_diagonal(logits, -np.inf)
    n = len(a)
    return -np.mean([log_softmax(logits[i])[(i + n) % (2 * n)] for i in range(2 * n)])


def test_against_numpy():
    found = slip(IMAGE, TEXT, 9.0, FIRST, SECOND, weight=0.7)
    assert found["infonce"].item() == pytest.approx(clip(IMAGE, TEXT, 9.0), abs=1e-12)
    assert found["simclr"].item() == pytest.approx(0.7 * _views(FIRST, SECOND, 0.1), abs=1e-12)


def test_without_weight_it_is_clip():
    found = slip(IMAGE, TEXT, 9.0, FIRST, SECOND, weight=0.0)
    assert found["simclr"].item() == 0.0


def test_gradient_against_differences():
    assert_gradient(lambda *x: slip(*x, temperature=0.5), IMAGE, TEXT, torch.tensor(3.0), FIRST, SECOND)


def test_mean_over_local_rows_is_the_whole():
    whole = slip(IMAGE, TEXT, 9.0, FIRST, SECOND)
    rows = {"all_image": IMAGE, "all_text": TEXT, "all_first": FIRST, "all_second": SECOND}
    parts = [slip(*(x[k : k + 3] for x in (IMAGE, TEXT)), 9.0, FIRST[k : k + 3], SECOND[k : k + 3], **rows, offset=k)
             for k in (0, 3)]  # fmt: skip
    for name, value in whole.items():
        assert (parts[0][name] + parts[1][name]).item() / 2 == pytest.approx(value.item(), abs=1e-13)


def test_safe_numbers():
    assert_safe(lambda scale, i, t, a, b: slip(i, t, scale, a, b), IMAGE, TEXT, FIRST, SECOND)


def test_mistakes_are_named():
    with pytest.raises(ClipworksError, match="weight must lie in"):
        slip(IMAGE, TEXT, 9.0, FIRST, SECOND, weight=-1.0)
