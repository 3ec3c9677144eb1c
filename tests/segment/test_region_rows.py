"""RoIAlign against a plain one in numpy, and the ways to read a box."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.toy import toy_encoder
from clipworks.errors import ClipworksError
from clipworks.segment.clearclip import ClearCLIP
from clipworks.segment.regions import classify_regions, region_rows, roi_align

TOY = toy_encoder()
RNG = np.random.default_rng(0)


def bilinear(plane, y, x):
    """One channel at a point, cells having their values at whole numbers; clamped at the border."""
    h, w = plane.shape
    y, x = min(max(y, 0.0), h - 1), min(max(x, 0.0), w - 1)
    top, left = int(y), int(x)
    low, right = min(top + 1, h - 1), min(left + 1, w - 1)
    a, b = y - top, x - left
    return ((1 - a) * (1 - b) * plane[top, left] + (1 - a) * b * plane[top, right]
            + a * (1 - b) * plane[low, left] + a * b * plane[low, right])  # fmt: skip


def plain_roi_align(plane, box, size):
    """As Mask R-CNN's code has it with aligned=True and as many samples as a part has cells."""
    h, w = plane.shape
    x0, y0, x1, y1 = box[0] * w - 0.5, box[1] * h - 0.5, box[2] * w - 0.5, box[3] * h - 0.5
    tall, wide = (y1 - y0) / size, (x1 - x0) / size
    rows, columns = max(1, int(np.ceil(tall - 1e-4))), max(1, int(np.ceil(wide - 1e-4)))
    out = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            values = [bilinear(plane, y0 + tall * (i + (a + 0.5) / rows), x0 + wide * (j + (b + 0.5) / columns))
                      for a in range(rows) for b in range(columns)]  # fmt: skip
            out[i, j] = np.mean(values)
    return out


def drawn(*shape):
    low = RNG.uniform(0, 0.7, (*shape, 2))
    return torch.tensor(np.concatenate([low, low + RNG.uniform(0.02, 0.3, (*shape, 2))], -1))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_against_a_plain_one(size):
    maps, boxes = torch.tensor(RNG.normal(size=(2, 7, 9, 3))), drawn(2, 5)
    found = roi_align(maps, boxes, size)
    assert found.shape == (2, 5, size, size, 3)
    for b in range(2):
        for m in range(5):
            for c in range(3):
                expected = plain_roi_align(maps[b, :, :, c].numpy(), boxes[b, m].tolist(), size)
                assert np.allclose(found[b, m, :, :, c], expected, atol=1e-12)


def test_a_ramp_gives_the_value_at_the_centre():
    y, x = torch.meshgrid(torch.arange(10.0), torch.arange(12.0), indexing="ij")
    maps = (2 * x - 3 * y + 1)[None, ..., None].double()
    boxes = torch.tensor([[[0.21, 0.3, 0.63, 0.71], [0.4, 0.2, 0.55, 0.9]]], dtype=torch.float64)
    cx, cy = (boxes[0, :, 0] + boxes[0, :, 2]) / 2 * 12 - 0.5, (boxes[0, :, 1] + boxes[0, :, 3]) / 2 * 10 - 0.5
    assert torch.allclose(roi_align(maps, boxes)[0, :, 0, 0, 0], 2 * cx - 3 * cy + 1, atol=1e-9)


def test_on_cell_borders_it_is_the_mean_of_the_cells():
    maps = torch.randn(1, 6, 8, 4, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[[2 / 8, 1 / 6, 7 / 8, 4 / 6]]])
    assert torch.allclose(roi_align(maps, box)[0, 0, 0, 0], maps[0, 1:4, 2:7].mean((0, 1)), atol=1e-6)
    whole = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])
    assert torch.allclose(roi_align(maps, whole)[0, 0, 0, 0], maps[0].mean((0, 1)), atol=1e-6)
    square = torch.randn(1, 5, 5, 2, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(roi_align(square, whole, 5)[0, 0], square[0], atol=1e-6)


def test_gradients_of_map_and_box():
    maps = torch.tensor(RNG.normal(size=(1, 5, 5, 2)), requires_grad=True)
    boxes = torch.tensor([[[0.13, 0.22, 0.58, 0.91]]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, b: roi_align(m, b, 2), (maps, boxes), eps=1e-7, atol=1e-5)


def test_shapes_must_agree():
    with pytest.raises(ClipworksError, match="must agree"):
        roi_align(torch.zeros(2, 4, 4, 3), torch.zeros(1, 2, 4))
    assert roi_align(torch.zeros(1, 4, 4, 3), torch.zeros(1, 0, 4)).shape == (1, 0, 1, 1, 3)


def picture():
    return RNG.integers(0, 255, (40, 60, 3)).astype(np.uint8)


def test_a_crop_is_the_box_cut_out():
    pixels = picture()
    pixels[:, 30:] = 200  # Pillow's filter reaches two pixels over a box's edge, where there are any
    pixels[10:30, 40:60] = np.linspace(0, 255, 20, dtype=np.uint8)[None, :, None]
    boxes = [[0.0, 0.0, 1.0, 1.0], [2 / 3, 0.25, 1.0, 0.75]]
    for row, part in zip(region_rows(pixels, boxes, TOY), (pixels, pixels[10:30, 40:60]), strict=True):
        view = Image.fromarray(part).resize((16, 16), Image.Resampling.BICUBIC)
        (expected,) = TOY.images(TOY.preprocess.normalize(np.asarray(view))[None])
        assert row @ expected > (0.99999 if part is pixels else 0.99)


def test_a_dense_map_is_pooled_over_the_box():
    from clipworks.segment.common import enter

    pixels = picture()[:, :40]
    boxes = [[0.0, 0.0, 0.5, 0.5], [0.25, 0.25, 1.0, 1.0]]
    rows = region_rows(pixels, boxes, TOY, reader=ClearCLIP("qq+kk+vv"), side=16)
    image = Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC)
    with torch.no_grad():
        hidden = enter(TOY, torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255)
        maps = ClearCLIP("qq+kk+vv").features(hidden)[0]
    for row, cells in zip(rows, (maps[:2, :2], maps[1:, 1:]), strict=True):
        assert F.cosine_similarity(row, cells.mean((0, 1)), dim=0) > 0.9999
    by_name = region_rows(pixels, boxes, TOY, reader="clearclip", side=16)
    assert not torch.allclose(rows, by_name)


def test_a_reader_of_ones_own_is_asked():
    class Corner:
        def regions(self, encoder, pixels, boxes):
            assert pixels.shape == (1, 3, 16, 16)
            return torch.cat([boxes, torch.zeros(1, boxes.shape[1], 4)], -1)

    rows = region_rows(picture(), [[0.0, 0.0, 0.6, 0.8]], TOY, reader=Corner())
    assert torch.allclose(rows, torch.tensor([[0, 0, 0.6, 0.8, 0, 0, 0, 0]]))


def test_names_of_boxes_and_mistakes():
    toy = toy_encoder(tokenizer=CLIPTokenizer())
    found = classify_regions(picture(), [[0, 0, 0.5, 0.5], [0.2, 0, 1, 1]], ["cat", "dog", "car"], toy)
    assert torch.allclose(found.sum(1), torch.ones(2))
    assert region_rows(picture(), [], TOY).shape == (0, 8)
    for wrong in ([[10, 10, 50, 60]], [[0.5, 0, 0.5, 1]], [[0, 0, 1, float("nan")]]):
        with pytest.raises(ClipworksError, match="shares of width and height"):
            region_rows(picture(), wrong, TOY)
    with pytest.raises(ClipworksError, match="method must be one of"):
        region_rows(picture(), [[0, 0, 1, 1]], TOY, reader="croop")
