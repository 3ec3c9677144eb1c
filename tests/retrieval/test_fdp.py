"""FDP: the pool with a mask, positions, kinds of words, look-alikes, the balanced loss, what is frozen, drawn words."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from clipworks.encoders.toy import toy_encoder
from clipworks.errors import ClipworksError
from clipworks.retrieval.confusable import dqa_loss, dqa_target, look_alikes
from clipworks.retrieval.fdp import SceneText, balanced_bce, function_words, resize_nearest
from clipworks.retrieval.word_images import draw_word, toy_reader


@pytest.fixture(scope="module")
def reader():
    return toy_reader()


def pixels(n=2, size=64, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_a_constant_mask_and_no_probe_is_clip_s_own_pool(reader):
    model = SceneText(reader, image_size=64, probe=False)
    cells = model.cells(pixels())
    plain = reader.visual(pixels())
    np.testing.assert_allclose(model.pooled(cells, torch.ones(2, 4)).detach(), plain.detach(), atol=1e-5)


def test_the_mask_is_added_to_the_logits_of_its_own_image(reader):
    model = SceneText(reader, image_size=64, probe=False)
    cells, masks = model.cells(pixels()), torch.rand(2, 4, generator=torch.Generator().manual_seed(1))
    together = model.pooled(cells, masks).detach()
    alone = torch.cat([model.pooled(cells[i : i + 1], masks[i : i + 1]) for i in range(2)]).detach()
    np.testing.assert_allclose(together, alone, atol=1e-6)
    pool = reader.visual.pool
    x = (torch.cat([cells.mean(1, keepdim=True), cells], 1) + pool.positions).detach()
    for i in range(2):
        heads = []
        for q, k, v in zip(*(f(x[i]).split(pool.q.out_features // pool.heads, -1) for f in (pool.q, pool.k, pool.v)),
                           strict=True):  # fmt: skip
            logits = q[0] @ k.T / q.shape[1] ** 0.5
            weights = (logits + torch.cat([torch.ones(1), masks[i]])).softmax(0)
            ratio = weights / logits.softmax(0)
            assert ratio.max() / ratio.min() <= np.e + 1e-4
            heads.append(weights @ v)
        np.testing.assert_allclose(together[i], pool.out(torch.cat(heads)).detach(), atol=1e-5)


def test_positions_on_their_own_grid_stay_and_grow_by_the_nearest(reader):
    table = torch.arange(10.0)[:, None].repeat(1, 3)
    assert torch.equal(resize_nearest(table, (3, 3), (3, 3)), table)
    found = resize_nearest(table[:5], (2, 2), (4, 4))[:, 0].tolist()
    assert found == [0, 1, 1, 2, 2, 1, 1, 2, 2, 3, 3, 4, 4, 3, 3, 4, 4]
    assert SceneText(reader, image_size=96).positions.shape[0] == 10
    assert torch.equal(SceneText(reader, image_size=64).positions, reader.visual.pool.positions)


def test_kinds_of_words():
    rng = np.random.default_rng(0)
    small, large = ["and", "of", "the"], ["bank", "hotel", "office", "street"]
    vectors = {w: np.r_[3, 0, 0, 0] + 0.3 * rng.normal(size=4) for w in small}
    vectors |= {w: np.r_[0, 3, 0, 0] + 0.3 * rng.normal(size=4) for w in large}
    words = [*small, *large]
    found = function_words(words, vectors)
    assert found.tolist() == [True] * 3 + [False] * 4
    assert np.array_equal(found, function_words(words, vectors))
    with pytest.raises(ClipworksError, match="'the' and 'and' are in one"):
        function_words(words, vectors, anchors=("the", "and"))


def test_words_that_look_alike():
    assert look_alikes("cat", ["cat", "bat", "cats", "at", "cut", "cot", "car", "dog"]) == dict.fromkeys(
        ["bat", "cats", "at", "cut", "cot"], 1
    )
    assert look_alikes("station", ["stations", "stating", "nation", "ration"]) == {
        "stations": 1, "stating": 2, "nation": 2, "ration": 2}  # fmt: skip
    target = dqa_target(["cat"], ["cat", "bat", "cats", "at", "cut", "dog"])
    e = np.exp
    assert target[0, 0].item() == pytest.approx(e(10) / (e(10) + 4 * e(1 / 1.1)), abs=1e-6)
    assert target[0, 0].item() == pytest.approx(0.99955, abs=1e-5)
    assert target[0, 5] == 0
    assert target.sum().item() == pytest.approx(1)
    warm = dqa_target(["cat"], ["cat", "bat"], temperature=10)[0]
    assert warm[0].item() == pytest.approx(e(1) / (e(1) + e(1 / 11)), abs=1e-6)
    assert dqa_target(["cat"], ["cat", "cat"]).tolist() == [[0.5, 0.5]]
    with pytest.raises(ClipworksError, match="'dog' is not"):
        dqa_target(["dog"], ["cat"])


def test_the_loss_of_look_alikes_is_the_divergence():
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(3, 5)), rng.random((3, 5))
    target /= target.sum(1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = (target * (np.log(target) - log_p)).sum() / 3
    assert dqa_loss(torch.tensor(logits), torch.tensor(target)).item() == pytest.approx(expected)


def test_the_balanced_loss_takes_the_worst_negatives():
    p = torch.tensor([[0.9, 0.6, 0.2, 0.7, 0.1, 0.3]])
    mask = torch.tensor([[1, 0, 0, 0, 0, 0]])
    expected = (-np.log(0.9) - np.log(0.4) - np.log(0.3) - np.log(0.7)) / 4  # one with, the worst three without
    assert balanced_bce(p, mask).item() == pytest.approx(expected, abs=1e-6)
    all_of_them = -np.log([0.9, 0.4, 0.8, 0.3, 0.9, 0.7]).mean()
    assert balanced_bce(p, mask, ratio=9).item() == pytest.approx(all_of_them, abs=1e-6)
    assert balanced_bce(p, torch.zeros_like(mask)).item() == 0
    assert balanced_bce(p, torch.ones_like(mask)).item() == pytest.approx(-np.log(p.numpy()).mean(), abs=1e-6)


def test_what_learns_and_what_is_frozen(reader):
    model = SceneText(reader, image_size=64)
    words, masks = ["the", "bank", "bark"], torch.zeros(3, 2, 2)
    masks[:, 0, 0] = 1
    losses = model.losses(pixels(3), words, [True, False, False], masks)
    assert set(losses) == {"infonce", "dqa", "binarise"}
    sum(losses.values()).backward()
    assert all(q.grad is None for q in reader.parameters())
    moved = {name for name, q in model.named_parameters() if q.grad is not None and q.grad.abs().sum() > 0}
    assert {"positions", "value.weight", "out.weight", "binarise.weight", "function", "content"} <= moved
    assert not any(name.startswith("encoder") for name in model.state_dict())
    new, old = model.groups()
    assert (new["lr"], old["lr"]) == (2e-3, 1e-4)
    assert len(new["params"]) + len(old["params"]) == len(list(model.parameters()))


def test_a_few_steps_learn_where_text_is_and_which_word(reader):
    words = ["bank", "hotel", "the", "exit"]
    drawn = [draw_word(word, 64, seed) for word in words for seed in range(2)]
    x = torch.stack([torch.from_numpy(np.array(d.image)).permute(2, 0, 1) / 127.5 - 1 for d in drawn])
    masks = torch.stack([torch.from_numpy(d.mask(2, 2)).float() for d in drawn])
    model = SceneText(reader, image_size=64)
    optimizer = torch.optim.Adam(model.groups(lr=3e-3, slow=3e-4))
    kinds, seen = [word == "the" for word in words], []
    for _ in range(25):
        losses = model.losses(x[::2], words, kinds, masks[::2])
        seen.append({name: value.item() for name, value in losses.items()})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert all(seen[-1][name] < 0.8 * seen[0][name] for name in ("infonce", "dqa", "binarise"))
    vectors, text_map = model.images(x[:2])
    assert text_map.shape == (2, 2, 2)
    np.testing.assert_allclose(vectors.norm(dim=1).detach(), 1, atol=1e-5)


def test_an_image_s_vector_does_not_depend_on_the_batch(reader):
    model = SceneText(reader, image_size=96).eval()
    together = model.images(pixels(3, 96))[0]
    alone = torch.cat([model.images(pixels(3, 96)[i : i + 1])[0] for i in range(3)])
    np.testing.assert_allclose(together.detach(), alone.detach(), atol=1e-5)
    again = SceneText(reader, image_size=96).images(pixels(3, 96))[0]
    assert torch.equal(together, again)


def test_drawn_words_are_where_their_mask_says():
    for seed in range(6):
        drawn = draw_word("hotel", 200, seed)
        mask = drawn.mask(200, 200, shrink=1.0)
        outline = drawn.image.convert("L").copy()
        ImageDraw.Draw(outline).polygon([tuple(p) for p in drawn.polygon], fill=0)
        assert mask.sum() == pytest.approx((np.asarray(outline) == 0).sum(), rel=0.15)
        inner = drawn.mask(200, 200)
        assert 0 < inner.sum() < mask.sum()
        assert not (inner & ~mask).any()
        pixels_ = np.asarray(drawn.image, float)
        edges = np.abs(np.diff(pixels_.sum(2), axis=1))
        assert edges[mask[:, 1:]].mean() > 5 * edges[~mask[:, 1:]].mean()
    assert np.array_equal(np.asarray(draw_word("a", 64, 1).image), np.asarray(draw_word("a", 64, 1).image))
    assert draw_word("a", 64, 1).mask(2, 2).any()


def test_words_are_drawn_on_photos_in_a_font_and_size(tmp_path):
    photo = Image.fromarray(np.random.default_rng(0).integers(90, 110, (60, 200, 3), np.uint8))
    before = photo.tobytes()
    drawn = [draw_word("hotel", 120, 3, ground=photo, height=height) for height in ((0.1, 0.1), (0.2, 0.2))]
    assert photo.tobytes() == before
    heights = []
    for one in drawn:
        assert one.image.size == (120, 120)
        mask, pixels_ = one.mask(120, 120, shrink=1.0), np.asarray(one.image, int)
        written = (np.abs(pixels_ - 100) > 40).all(2)  # the ground is within 10 of 100
        assert written.sum() > 20
        assert (written & ~mask).sum() < 0.1 * written.sum()
        heights.append(np.linalg.norm(one.polygon[0] - one.polygon[3]))
    assert heights[1] == pytest.approx(2 * heights[0], rel=0.15)
    (tmp_path / "own.ttf").write_bytes(ImageFont.load_default(20).path.getvalue())  # Pillow's own, as a file
    given, own = draw_word("hotel", 120, 3, font=tmp_path / "own.ttf"), draw_word("hotel", 120, 3)
    np.testing.assert_allclose(given.polygon, own.polygon, atol=2)  # letters may stand a little closer
    assert np.abs(np.asarray(given.image, int) - np.asarray(own.image, int)).mean() < 2
    with pytest.raises(OSError, match="resource"):
        draw_word("hotel", 120, 3, font=tmp_path / "none.ttf")


def test_mistakes_are_named(reader):
    with pytest.raises(ClipworksError, match="must have a ResNet and a tokenizer"):
        SceneText(toy_encoder())
    with pytest.raises(ClipworksError, match="multiple of 32"):
        SceneText(reader, image_size=100)
    model = SceneText(reader, image_size=64)
    with pytest.raises(ClipworksError, match="pixels must be of 64 x 64"):
        model.images(pixels(1, 96))
    with pytest.raises(ClipworksError, match="of each of 2 words"):
        model.words(["a", "b"], [True])
    with pytest.raises(ClipworksError, match="masks must have the shape"):
        balanced_bce(torch.rand(2, 2), torch.zeros(2, 3))
