"""Positional tables of other grids and lengths."""

import numpy as np
import pytest
import tiny_towers as tiny
import torch

from clipworks.encoders.layers import resize_positions, rotary, stretch_positions
from clipworks.errors import ClipworksError


def table(rows, width=6):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def cubic(distance, a):
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def test_resizing_equals_bicubic_interpolation_by_hand():
    old, new, t = (3, 5), (6, 4), table(1 + 15)

    def matrix(inner, outer):  # kernel a = -0.75, edges repeated, pixel centres aligned
        m = np.zeros((outer, inner))
        for i in range(outer):
            at = (i + 0.5) * inner / outer - 0.5
            for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
                m[i, min(max(j, 0), inner - 1)] += cubic(at - j, -0.75)
        return m

    grid = t[1:].numpy().reshape(3, 5, 6)
    want = np.einsum("ia,jb,abc->ijc", matrix(3, 6), matrix(5, 4), grid).reshape(24, 6)
    got = resize_positions(t, old, new)
    np.testing.assert_allclose(got[1:], want, atol=1e-12)
    assert torch.equal(got[0], t[0])


def test_resizing_to_the_same_grid_is_exact_and_a_prefix_stays():
    assert torch.equal(resize_positions(table(17), (4, 4), (4, 4)), table(17))
    none = resize_positions(table(16), (4, 4), (2, 8))
    assert none.shape == (16, 6)
    assert torch.equal(resize_positions(table(19), (4, 4), (5, 5))[:3], table(19)[:3])
    with pytest.raises(ClipworksError, match="more cells"):
        resize_positions(table(10), (4, 4), (5, 5))


def test_a_ramp_tells_which_kernel_is_in_use():
    """The antialiased kernel (a = -0.5) reproduces a line in the interior, the plain one (a = -0.75) does not."""
    ramp = torch.arange(8, dtype=torch.float64)[:, None].expand(8, 8).reshape(64, 1)
    want = ((torch.arange(16, dtype=torch.float64) + 0.5) / 2 - 0.5)[5:-5]
    smooth, usual = (
        resize_positions(ramp, (8, 8), (16, 16), antialias=a).reshape(16, 16)[5:-5, 8] for a in (True, False)
    )
    torch.testing.assert_close(smooth, want, atol=1e-6, rtol=0)
    assert 0.02 < float((usual - want).abs().max()) < 0.05


def test_stretching_follows_long_clip():
    """77 to 248: the first 20 rows stay, the others are interpolated fourfold, the last continued linearly."""
    t = table(77)
    want = torch.zeros(248, 6, dtype=torch.float64)
    want[:20] = t[:20]
    for i in range(57):
        a, b = t[20 + i], t[21 + i] if i < 56 else 2 * t[20 + i] - t[19 + i]
        for j in range(4):
            want[20 + 4 * i + j] = (4 - j) / 4 * a + j / 4 * b
    torch.testing.assert_close(stretch_positions(t, 248), want, atol=1e-12, rtol=0)


def test_stretching_a_line_and_limits():
    line = torch.arange(30, dtype=torch.float64)[:, None]
    stretched = stretch_positions(line, 50, keep=10)
    assert torch.equal(stretched[:10], line[:10])
    torch.testing.assert_close(stretched[10:, 0], 10 + torch.arange(40, dtype=torch.float64) / 2)
    assert torch.equal(stretch_positions(line, 30), line)
    with pytest.raises(ClipworksError, match="new_length must lie in"):
        stretch_positions(line, 20)
    with pytest.raises(ClipworksError, match="keep must lie in"):
        stretch_positions(line, 40, keep=30)


def test_rotary_depends_on_offsets_only():
    rule = rotary(9, theta=50.0)
    vector = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    same = vector.expand(1, 1, 9, 8)
    logits = rule(same, same, same, None).log()[0, 0]
    logits = logits - logits.diagonal()[:, None]  # the diagonal has offset 0 in every row
    for offset in range(1, 8):
        diagonal = logits.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-6, rtol=0)
    hidden = torch.ones(9, 9, dtype=torch.bool).tril()
    assert (rule(same, same, same, hidden)[0, 0].triu(1) == 0).all()


def test_resizing_an_encoder_changes_tables_and_configuration_together():
    encoder = tiny.encoder()
    vision, text = encoder.visual.positions.clone(), encoder.text.positions.clone()
    large = tiny.pixels(2, 48)
    interpolated = encoder.images(large)
    before = encoder.fingerprint
    encoder.resize(image_size=48, context_length=20, keep=4)
    assert (encoder.image_size, encoder.context_length) == (48, 20)
    assert encoder.preprocess.config.size == 48
    assert encoder.config.vision.grid == (6, 6)
    assert torch.equal(encoder.visual.positions, resize_positions(vision, (4, 4), (6, 6)))
    assert torch.equal(encoder.text.positions, stretch_positions(text, 20, 4))
    torch.testing.assert_close(encoder.images(large), interpolated)
    assert encoder.encode_text(tiny.tokens((18,), total=20)).shape == (1, 16)
    assert encoder.fingerprint != before
    assert encoder.visual.positions.requires_grad


def test_stretched_fourfold_every_fourth_row_is_an_old_one_to_the_last_bit():
    table = torch.randn(77, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(stretch_positions(table, 248)[20::4], table[20:])
