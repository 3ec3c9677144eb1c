"""Geodesic mixup: the great circle against scipy, the loss against numpy, its limits, two cones that come closer."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial import geometric_slerp

from clipworks.errors import ClipworksError
from clipworks.losses.infonce import infonce
from clipworks.losses.m2_mix import geodesic, m2_mix, partner_targets

from .oracle import assert_gradient, assert_safe, clip, cross, pair, total, unit

IMAGE, TEXT = pair(6, 5)
ALL = {"images": 0.05, "texts": 0.04, "both": 0.1}


def _mix(a, b, share):
    """Row by row, in plane trigonometry: turn b towards a by share * angle."""
    rows = []
    for x, y in zip(np.asarray(a), np.asarray(b), strict=True):
        across = x - (x @ y) * y
        angle = math.atan2(np.linalg.norm(across), x @ y)
        way = across / np.linalg.norm(across) if angle > 1e-9 else 0 * x
        rows.append(math.cos(share * angle) * y + math.sin(share * angle) * way)
    return np.array(rows)


def _oracle(image, text, scale, share, tau=0.07, partner=None):
    image, text = np.asarray(image), np.asarray(text)
    n, partner = len(image), share if partner is None else partner
    mixed, found = _mix(image, text, share), {"infonce": clip(image, text, scale), "m2": 0.0}
    for rows in (image, text):
        z = rows @ mixed.T
        for i in range(n):
            z[i, i] = image[i] @ text[i]
        found["m2"] += cross(z / tau)
    target = np.zeros((n, n))
    for i in range(n):
        target[i, i] += partner
        target[i, n - 1 - i] += 1 - partner
    v, w = _mix(image, image[::-1], partner), _mix(text, text[::-1], partner)
    for name, x, y, t in (("images", v, text, target), ("texts", image, w, target), ("both", v, w, target @ target)):
        found[name] = (cross(scale * x @ y.T, t) + cross(scale * y @ x.T, t)) / 2
    return found


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.83, 1.0])
def test_the_great_circle_against_scipy(share):
    found = geodesic(IMAGE, TEXT, share).numpy()
    for row, a, b in zip(found, IMAGE.numpy(), TEXT.numpy(), strict=True):
        assert np.allclose(row, geometric_slerp(b, a, share), atol=1e-12)
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-12)
    angle = torch.arccos((IMAGE * TEXT).sum(1))
    assert torch.allclose(torch.arccos((torch.tensor(found) * TEXT).sum(1).clamp(-1, 1)), share * angle, atol=1e-7)
    assert torch.allclose(geodesic(TEXT, IMAGE, 1 - share), torch.tensor(found), atol=1e-14)


def test_its_ends_are_the_rows():
    assert torch.allclose(geodesic(IMAGE, TEXT, 1.0), IMAGE, atol=1e-14)
    assert torch.allclose(geodesic(IMAGE, TEXT, 0.0), TEXT, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_without_an_angle(dtype):
    rows = IMAGE.to(dtype, copy=True).requires_grad_()
    for other in (rows.detach(), -rows.detach(), rows.detach() + 1e-5):
        for share in (0.0, 0.3, 0.5, 1.0):
            found = geodesic(rows, other, share)
            assert torch.isfinite(found).all()
            assert torch.isfinite(torch.autograd.grad(found.sum(), rows)[0]).all()
    assert torch.allclose(geodesic(rows, rows, 0.3), rows, atol=1e-6)


@pytest.mark.parametrize(("n", "share"), [(2, 0.3), (6, 0.5), (7, 0.9), (6, 0.0), (6, 1.0)])
def test_against_numpy(n, share):
    image, text = pair(n)
    found = m2_mix(image, text, 9.0, share, weight=0.05, partner_share=0.7, **ALL)
    expected = _oracle(image, text, 9.0, share, partner=0.7)
    for name, factor in {"infonce": 1.0, "m2": 0.05, **ALL}.items():
        assert found[name].item() == pytest.approx(factor * expected[name], abs=1e-12), name


def test_gradient_reaches_both_sides_through_the_mixes():
    assert_gradient(lambda i, t, s: m2_mix(i, t, s, 0.4, weight=1.0, **ALL), IMAGE, TEXT, torch.tensor(3.0))


def test_without_weights_it_is_clip():
    found = m2_mix(IMAGE, TEXT, 9.0, 0.4, weight=0.0)
    assert found["m2"].item() == 0.0
    assert set(found) == {"infonce", "m2"}
    assert total(found).item() == pytest.approx(infonce(IMAGE, TEXT, 9.0).item(), abs=1e-15)


def test_unmixed_negatives_are_the_ordinary_ones():
    """Z of the images at share 0 and of the texts at share 1 are the similarities at the second temperature."""
    logits = (IMAGE @ TEXT.T / 0.07).numpy()
    within = {"text": (TEXT @ TEXT.T).numpy(), "image": (IMAGE @ IMAGE.T).numpy()}
    own = np.diag((IMAGE @ TEXT.T).numpy())
    for share, ordinary, side in ((0.0, logits, "text"), (1.0, logits.T, "image")):
        other = within[side].copy()
        np.fill_diagonal(other, own)
        expected = cross(ordinary) + cross(other / 0.07)
        assert m2_mix(IMAGE, TEXT, 9.0, share, weight=1.0)["m2"].item() == pytest.approx(expected, abs=1e-10)


def test_true_pairs_are_never_mixed():
    """A batch of one has no negatives: whatever the share, nothing is left but the diagonal."""
    image, text = pair(1)
    for share in (0.0, 0.5, 1.0):
        assert m2_mix(image, text, 9.0, share, weight=1.0)["m2"].item() == pytest.approx(0.0, abs=1e-12)


def test_a_partner_share_of_one_is_clip():
    found = m2_mix(IMAGE, TEXT, 9.0, 0.3, partner_share=1.0, images=1.0, texts=1.0, both=1.0)
    for name in ("images", "texts", "both"):
        assert found[name].item() == pytest.approx(infonce(IMAGE, TEXT, 9.0).item(), abs=1e-12)


def test_alike_images_give_the_mean_of_both_targets():
    same = IMAGE[:1].expand(6, 5)
    found = m2_mix(same, TEXT, 9.0, 0.3, images=1.0)["images"].item()
    one = infonce(same, TEXT, 9.0, targets=torch.eye(6, dtype=torch.float64)).item()
    other = infonce(same, TEXT, 9.0, targets=torch.eye(6, dtype=torch.float64).flip(1)).item()
    assert found == pytest.approx(0.3 * one + 0.7 * other, abs=1e-7)


def test_targets_of_partners():
    for n in (4, 5):
        targets = partner_targets(n, 0.3, IMAGE)
        assert torch.allclose(targets.sum(1), torch.ones(n, dtype=torch.float64))
        assert torch.equal(targets, targets.T)
    assert targets[2].tolist() == [0, 0, 1, 0, 0]  # the middle of an odd batch is its own partner
    assert targets[0].tolist() == pytest.approx([0.3, 0, 0, 0, 0.7])


def test_mean_over_local_rows_is_the_whole():
    image, text = (x.requires_grad_() for x in pair(8))
    whole = m2_mix(image, text, 9.0, 0.4, **ALL)
    rows = {"all_image": image, "all_text": text}
    parts = [m2_mix(image[k : k + 2], text[k : k + 2], 9.0, 0.4, **ALL, **rows, offset=k) for k in (0, 2, 4, 6)]
    for name, value in whole.items():
        assert np.mean([part[name].item() for part in parts]) == pytest.approx(value.item(), abs=1e-13)
    mean = torch.stack([total(part) for part in parts]).mean()
    for got, wanted in zip(torch.autograd.grad(mean, (image, text)), torch.autograd.grad(total(whole), (image, text)),
                           strict=True):  # fmt: skip
        assert torch.allclose(got, wanted, atol=1e-13, rtol=0)


def test_two_cones_come_closer():
    """Free vectors of two cones under gradient descent: the gap shrinks more than by the contrastive loss alone."""
    gap = {}
    for weight in (0.0, 0.5):
        shift = torch.tensor([3.0, *[0.0] * 7], dtype=torch.float64)
        image, text = (unit(24, 8, seed=s) for s in (0, 1))
        free = [(image + shift).requires_grad_(), (text - shift).requires_grad_()]
        optimizer = torch.optim.Adam(free, lr=0.02)
        shares = np.random.default_rng(0).beta(0.5, 0.5, 150)
        for share in shares:
            rows = [x / x.norm(dim=1, keepdim=True) for x in free]
            optimizer.zero_grad()
            total(m2_mix(*rows, 20.0, float(share), weight=weight)).backward()
            optimizer.step()
        rows = [(x / x.norm(dim=1, keepdim=True)).detach() for x in free]
        gap[weight] = (rows[0].mean(0) - rows[1].mean(0)).norm().item()
    assert gap[0.5] < 0.9 * gap[0.0]


def test_safe_numbers():
    assert_safe(lambda scale, i, t: m2_mix(i, t, scale, 0.4, **ALL), IMAGE, TEXT)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"share": 1.5}, "share must lie in"),
        ({"partner_share": -0.1}, "partner_share must lie in"),
        ({"weight": -1.0}, "weight must lie in"),
        ({"both": -1.0}, "both must lie in"),
        ({"temperature": 0.0}, "temperature must be above 0. Got 0"),
        ({"all_image": IMAGE}, "given together"),
    ],
)
def test_mistakes_are_named(change, says):
    with pytest.raises(ClipworksError, match=says):
        m2_mix(**{"image": IMAGE, "text": TEXT, "scale": 9.0, "share": 0.5, **change})
