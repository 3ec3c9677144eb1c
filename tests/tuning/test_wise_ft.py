"""WiSE-FT as an estimator: the line from the start, its ends, a soup of several runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.tuning.lp_ft import LPFT
from clipworks.tuning.wise_ft import WiseFT
from clipworks.zeroshot.classifier import class_vectors

from .toys import NAMES, TEMPLATE, clip_shaped, coloured, quick, zero_shot


def weights(method):
    return {**method.encoder_.state_dict(), "head": method.classifier_}


def fitted(**settings):
    return quick(WiseFT, **{"encoder": clip_shaped(), "lr": 1e-2, **settings}).fit(*coloured())


def test_the_ends_are_full_fine_tuning_and_zero_shot_clip():
    x, y = coloured()
    np.testing.assert_allclose(fitted(alpha=0.0).logits(x), zero_shot(clip_shaped(), x), atol=1e-5)
    full = quick(LPFT, encoder=clip_shaped(), lr=1e-2, head_epochs=0).fit(x, y)
    for name, value in weights(fitted(alpha=1.0)).items():
        assert torch.equal(value, weights(full)[name]), name


def test_half_is_the_mean_of_towers_and_head():
    start, full, half = clip_shaped(), weights(fitted(alpha=1.0)), weights(fitted())
    words = class_vectors(NAMES, start, templates=TEMPLATE)
    for name, value in {**start.state_dict(), "head": words}.items():
        torch.testing.assert_close(half[name], (value + full[name]) / 2)


def test_several_runs_are_averaged_with_seeds_of_their_own():
    one, two = (weights(fitted(alpha=1.0, seed=s, batch_size=4, augment="none")) for s in (3, 4))
    soup = weights(fitted(alpha=1.0, seed=3, runs=2, batch_size=4, augment="none"))
    assert not torch.equal(one["head"], two["head"])
    for name, value in soup.items():
        torch.testing.assert_close(value, (one[name] + two[name]) / 2, atol=1e-6, rtol=1e-5)
    with pytest.raises(ClipworksError, match="runs must lie"):
        fitted(runs=0)


def test_validation_images_choose_alpha():
    held = coloured(9, seed=5)
    method = quick(WiseFT, encoder=clip_shaped(), lr=1e-2, alpha=None).fit(*coloured(), validation=held)
    scores = {a / 10: fitted(alpha=a / 10).score(*held) for a in range(11)}
    assert method.score(*held) == max(scores.values())
    assert method.alpha_ == next(a for a, v in scores.items() if v == max(scores.values()))
