"""`segment` from end to end on toy weights: sizes, words, background, refinement, messages."""

import numpy as np
import plain_dense as plain
import pytest
import torch

import clipworks
from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.toy import toy_encoder
from clipworks.errors import ClipworksError
from clipworks.segment import segmenter
from clipworks.segment.background import WORDS, background_threshold, background_words, found_background
from clipworks.segment.common import Dense, enter
from clipworks.segment.maskclip import MaskCLIP
from clipworks.segment.segmenter import Segmenter, segment


class Colors(Dense):
    """Cosines that are known: the mean colour of every patch; words are red, green, blue."""

    def words(self, words):
        return torch.eye(len(words), 3)

    def features(self, hidden):
        return torch.nn.functional.avg_pool2d(hidden.images, 4).permute(0, 2, 3, 1)

    def local(self, hidden, words):
        return torch.einsum("bhwc,kc->bkhw", self.features(hidden).float(), words)

    def objects(self, hidden):
        """The lower half."""
        made = torch.zeros(len(hidden.images), 1, *hidden.grid)
        made[:, :, hidden.grid[0] // 2 :] = 1
        return made


@pytest.fixture(scope="module")
def encoder():
    return plain.toy().float()


def picture(height=40, width=64):
    """Red at the left, green at the right."""
    made = np.zeros((height, width, 3), np.uint8)
    made[:, : width // 2, 0], made[:, width // 2 :, 1] = 255, 255
    return made


def run(encoder, image=None, names=("red", "green", "blue"), method=None, **options):
    image = picture() if image is None else image
    return segment(image, list(names), method=method or Colors(), encoder=encoder, **options)


@pytest.mark.parametrize("size", [(40, 64), (64, 40), (33, 35), (7, 90), (200, 31)])
def test_any_size_comes_back_at_its_own_size(encoder, size):
    image = picture(*size)
    mask = run(encoder, image)
    assert mask.labels.shape == size
    near = size[1] // 2  # a patch at the edge mixes both colours
    patch = max(1, round(2.5 * 4 * min(size) / 32))
    assert (mask.labels[:, : near - patch] == 0).all()
    assert (mask.labels[:, near + patch :] == 1).all()
    np.testing.assert_allclose(mask.scores.sum(0), 1, atol=1e-5)


def test_a_line_of_pixels_is_not_enlarged_without_bound(encoder, monkeypatch):
    seen = []

    class Watched(Colors):
        def whole(self, average, image, encoder, words):
            seen.append(tuple(image.shape[1:]))
            return average

    monkeypatch.setattr(segmenter, "LONGEST", 400)
    for size in ((2, 200), (2, 600), (20, 200)):  # enlarged up to the bound; already beyond it; as ever
        assert run(encoder, picture(*size), method=Watched()).labels.shape == size
    assert seen == [(4, 400), (4, 600), (32, 320)]


def test_it_is_public_whichever_way_it_is_imported(encoder):
    for call in (clipworks.segment, clipworks.segment.segmenter.segment):
        assert call(picture(), ["red", "green"], method=Colors(), encoder=encoder).shares.keys() == {"red", "green"}


def test_bands_do_not_change_the_labels(encoder, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (50, 70, 3)).astype(np.uint8)
    whole = run(encoder, noise)
    monkeypatch.setattr("clipworks.segment.segmenter.BAND", 1)
    assert np.array_equal(run(encoder, noise).labels, whole.labels)


def test_batches_of_windows_do_not_change_the_scores(encoder):
    noise = np.random.default_rng(0).integers(0, 255, (50, 70, 3)).astype(np.uint8)
    one, many = (run(encoder, noise, method="naclip", side=48, window=16, batch_size=b) for b in (1, 7))
    np.testing.assert_allclose(one.scores, many.scores, atol=1e-5)


def test_several_words_for_a_name_take_the_best(encoder):
    names = {"warm": ["red", "green"], "blue": ["blue"]}
    mask = segment(picture(), names, method=Colors(), encoder=encoder)
    assert mask.names == ["warm", "blue"]
    assert mask.shares == {"warm": 1.0}


def test_words_are_encoded_once_for_many_images(encoder):
    calls, texts = [], encoder.texts
    encoder.texts = lambda sentences, **k: calls.append(len(sentences)) or texts(sentences, **k)
    try:
        work = Segmenter(["red", "green"], method="maskclip", encoder=encoder, templates="{}")
        for _ in range(3):
            work(picture())
    finally:
        del encoder.texts
    assert calls == [2]


def test_a_threshold_is_a_probability_to_reach(encoder):
    plainly = run(encoder, scale=1.0)
    best = plainly.scores.max(0)
    for number in (0.0, float(best.min()) + 0.01, 1.0):
        mask = run(encoder, scale=1.0, background=number)
        assert mask.names[0] == "background"
        coarse = np.vstack([np.full_like(best, number)[None], plainly.scores])
        np.testing.assert_allclose(mask.scores, coarse, atol=1e-6)
    assert run(encoder, background=0.0).shares.keys() == {"red", "green"}
    assert run(encoder, scale=1.0, background=1.0).shares == {"background": 1.0}


def test_words_for_the_background(encoder):
    mask = segment(picture(), ["red"], method=Colors(), encoder=encoder, background=["green", "blue"])
    assert mask.names == ["background", "red"]
    assert mask.shares["background"] == pytest.approx(0.5, abs=0.1)
    assert background_words("words", ["sky"]) == [w for w in WORDS if w != "sky"]
    assert background_words(0.3, ["sky"]) == background_words("objects", ["sky"]) == []


def test_objects_only_ever_take_pixels_away(encoder):
    plainly, mask = run(encoder, scale=1.0), run(encoder, scale=1.0, background="objects")
    kept = mask.labels > 0
    assert np.array_equal(mask.labels[kept] - 1, plainly.labels[kept])
    assert not kept[:15].any()
    assert kept[25:].all()


@pytest.mark.parametrize(
    ("given", "meant"), [("0.3", 0.3), ("sky, wall", ["sky", "wall"]), ("words", "words"), (None, None)]
)
def test_a_background_as_a_shell_writes_it(given, meant):
    assert background_threshold(given) == meant


def test_found_seeds_where_the_class_token_looks_least():
    draw = np.random.default_rng(0)
    attention, keys = draw.random((3, 6)), draw.normal(size=(3, 6, 4))
    share = (attention > attention.mean(1, keepdims=True)).mean(1)
    weight = np.log(share.sum() / share)
    seed = (weight[:, None] * attention).sum(0).argmin()
    features = np.concatenate([w * k for w, k in zip(weight, keys, strict=True)], axis=1)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    for threshold in (0.0, 0.3):
        got = found_background(torch.tensor(attention), torch.tensor(keys), threshold)
        assert np.array_equal(got, features @ features[seed] > threshold)
        assert got[seed]


def test_found_with_one_head():
    attention, keys = torch.rand(1, 5, generator=torch.Generator().manual_seed(0)), torch.eye(5)[None]
    got = found_background(attention, keys)
    assert got.tolist() == [i == int(attention.argmin()) for i in range(5)]
    assert torch.equal(got, found_background(attention + 3, keys))
    with pytest.raises(ClipworksError, match="must agree"):
        found_background(attention, keys[:, :4])


@torch.no_grad()
def test_own_objects_of_the_tower(encoder):
    """A pixel is background where FOUND's rule on the tower sees no object; at this scale no name is sure."""
    image = np.random.default_rng(0).integers(0, 255, (32, 48, 3)).astype(np.uint8)
    mask = run(encoder, image, method="maskclip", background="objects", scale=1.0, window=48)
    assert mask.names == ["background", "red", "green", "blue"]
    hidden = enter(encoder, torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
    objects = torch.nn.functional.interpolate(MaskCLIP().objects(hidden), (32, 48), mode="bilinear")[0, 0]
    assert 0.1 < (mask.labels == 0).mean() < 0.9
    assert np.array_equal(mask.labels == 0, objects <= 0.5)


@pytest.mark.parametrize("refine", ["pamr", "crf", lambda image, scores: scores])
def test_refinement_keeps_two_colours_apart(encoder, refine):
    mask = run(encoder, refine=refine)
    assert (mask.labels[:, :24] == 0).all()
    assert (mask.labels[:, 40:] == 1).all()
    assert mask.scores.shape[1:] == (40, 64)


def test_pamr_follows_an_edge_inside_a_patch(encoder):
    """The edge is at a third of a patch; on the patches' grid alone it would be blurred."""
    image = picture(64, 64)
    image[:, :, :] = 0
    image[:, :27, 0], image[:, 27:, 1] = 255, 255
    truth = np.where(np.arange(64) < 27, 0, 1)[None].repeat(64, 0)
    off, on = (float((run(encoder, image, side=16, refine=r).labels != truth).mean()) for r in (None, "pamr"))
    assert on < off


def test_small_names_are_left_out(encoder):
    image = picture()
    image[:, -10:] = (0, 0, 255)
    assert run(encoder, image).shares["blue"] > 0.05
    assert "blue" not in run(encoder, image, smallest=0.4).shares
    only = run(encoder, image, smallest=1.0)
    assert only.shares == {"red": 1.0}
    assert np.array_equal(only.scores, run(encoder, image).scores)


def test_the_memory_can_be_left_out():
    knowing = toy_encoder(tokenizer=CLIPTokenizer(), memory=5)
    on, off = (run(knowing, method="maskclip", memory=m).scores for m in (True, False))
    assert np.abs(on - off).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "nacl"}, "Did you mean 'naclip'"),
        ({"refine": "pam"}, "Did you mean 'pamr'"),
        ({"background": "word"}, r"background must be a number .* Got 'word'. Did you mean 'words'"),
        ({"background": 1.5}, "background must lie in"),
        ({"stride": 64}, "stride must be at most the window"),
        ({"side": 1}, "side must lie in"),
        ({"smallest": 2}, "smallest must lie in"),
        ({"names": ()}, "at least one"),
        ({"names": ("background",), "background": 0.5}, "names must not hold"),
    ],
)
def test_messages(encoder, options, message):
    with pytest.raises(ClipworksError, match=message):
        run(encoder, **options)
