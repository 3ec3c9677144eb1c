"""CLIP-rocket's loss: numpy, its weights, equal views as CLIP, all pairs of views, two scales that do not mix."""

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.losses.improved_baselines import improved_baselines
from clipworks.losses.infonce import infonce

from .oracle import assert_gradient, assert_safe, clip, cross, pair, total, unit

IMAGE, TEXT = pair(6, 5)
STRONG_IMAGE, STRONG_TEXT = unit(6, 2, 7, seed=4), unit(6, 2, 7, seed=5)


def _local(images, texts, scale, smoothing):
    n, views = images.shape[:2]
    target = (1 - smoothing) * np.eye(n) + smoothing / n
    found = []
    for a in range(views):
        for b in range(views):
            logits = scale * np.asarray(images[:, a] @ texts[:, b].T)
            found.append((cross(logits, target) + cross(logits.T, target)) / 2)
    return np.mean(found)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_against_numpy(views):
    images, texts = unit(6, views, 7, seed=4), unit(6, views, 7, seed=5)
    found = improved_baselines(IMAGE, TEXT, 9.0, images, texts, 4.0, smoothing=0.2)
    assert found["global"].item() == pytest.approx(clip(IMAGE, TEXT, 9.0) / (1 + views), abs=1e-12)
    expected = views / (1 + views) * _local(images, texts, 4.0, 0.2)
    assert found["local"].item() == pytest.approx(expected, abs=1e-12)


def test_a_global_loss_of_1_and_a_local_one_of_4_are_3_with_two_views():
    """Weights are linear, so unit pieces suffice: (1 + 2 * 4) / 3."""
    found = improved_baselines(IMAGE, TEXT, 9.0, STRONG_IMAGE, STRONG_TEXT, 4.0)
    one = found["global"].item() / clip(IMAGE, TEXT, 9.0)
    other = found["local"].item() / _local(STRONG_IMAGE, STRONG_TEXT, 4.0, 0.1)
    assert 1 * one + 4 * other == pytest.approx(3.0, abs=1e-12)


def test_without_strong_views_it_is_clip():
    found = improved_baselines(IMAGE, TEXT, 9.0)
    assert set(found) == {"global"}
    assert found["global"].item() == pytest.approx(infonce(IMAGE, TEXT, 9.0).item(), abs=1e-15)


def test_equal_views_without_smoothing_are_clip():
    images, texts = (x[:, None].expand(6, 2, 5) for x in (IMAGE, TEXT))
    found = total(improved_baselines(IMAGE, TEXT, 9.0, images, texts, 9.0, smoothing=0.0))
    assert found.item() == pytest.approx(infonce(IMAGE, TEXT, 9.0).item(), abs=1e-13)


def test_all_pairs_of_views_count_but_not_their_order():
    value = improved_baselines(IMAGE, TEXT, 9.0, STRONG_IMAGE, STRONG_TEXT)["local"].item()
    swapped = improved_baselines(IMAGE, TEXT, 9.0, STRONG_IMAGE.flip(1), STRONG_TEXT)["local"].item()
    assert swapped == pytest.approx(value, abs=1e-14)
    mixed = STRONG_IMAGE.clone()
    mixed[0] = mixed[0].flip(0)  # one sample alone
    assert abs(improved_baselines(IMAGE, TEXT, 9.0, mixed, STRONG_TEXT)["local"].item() - value) > 1e-6


def test_each_part_moves_its_own_scale():
    scales = [torch.tensor(s, requires_grad=True) for s in (9.0, 4.0)]
    found = improved_baselines(IMAGE, TEXT, scales[0], STRONG_IMAGE, STRONG_TEXT, scales[1])
    for number, name in enumerate(("global", "local")):
        slopes = torch.autograd.grad(found[name], scales, retain_graph=True, allow_unused=True)
        assert slopes[number] is not None
        assert slopes[1 - number] is None


def test_gradient_against_differences():
    assert_gradient(lambda i, t, a, b, s: improved_baselines(i, t, 2.0, a, b, s),
                    IMAGE, TEXT, STRONG_IMAGE, STRONG_TEXT, torch.tensor(3.0))  # fmt: skip


def test_mean_over_local_rows_is_the_whole():
    whole = improved_baselines(IMAGE, TEXT, 9.0, STRONG_IMAGE, STRONG_TEXT)
    rows = {"all_image": IMAGE, "all_text": TEXT, "all_local_image": STRONG_IMAGE, "all_local_text": STRONG_TEXT}
    parts = [improved_baselines(IMAGE[k : k + 3], TEXT[k : k + 3], 9.0, STRONG_IMAGE[k : k + 3], STRONG_TEXT[k : k + 3],
                                **rows, offset=k) for k in (0, 3)]  # fmt: skip
    for name, value in whole.items():
        assert (parts[0][name] + parts[1][name]).item() / 2 == pytest.approx(value.item(), abs=1e-13)


def test_safe_numbers():
    assert_safe(lambda scale, i, t, a, b: improved_baselines(i, t, scale, a, b, scale), IMAGE, TEXT, STRONG_IMAGE,
               STRONG_TEXT)  # fmt: skip


def test_mistakes_are_named():
    with pytest.raises(ClipworksError, match="smoothing must lie in"):
        improved_baselines(IMAGE, TEXT, 9.0, smoothing=2.0)
    with pytest.raises(ClipworksError, match="local_image and local_text must be given together"):
        improved_baselines(IMAGE, TEXT, 9.0, STRONG_IMAGE)
    with pytest.raises(ClipworksError, match="local_text must have the shape of local_image"):
        improved_baselines(IMAGE, TEXT, 9.0, STRONG_IMAGE, STRONG_TEXT[:, :1])
