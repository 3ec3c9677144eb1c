"""The base of the trained dense methods, on a linear map of patches: fit, segment, predict, save, load, messages."""

import numpy as np
import plain_dense as plain
import pytest
import torch
from PIL import Image
from torch import nn

from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.toy import toy_encoder
from clipworks.errors import BadWeights, ClipworksError
from clipworks.segment.common import enter
from clipworks.segment.mask_decoder import tower_maps
from clipworks.segment.segmenter import Segmenter, dense_method, segment
from clipworks.segment.trained import CropRecipe, TrainedDense

NAMES = ["red", "green"]


class Probe(TrainedDense):
    """A linear map of the tower's last tokens."""

    def __init__(self, encoder=None, tower=False, steps=30, batch_size=4, lr=0.03, side=None, seed=0):
        self.encoder, self.tower, self.steps, self.batch_size = encoder, tower, steps, batch_size
        self.lr, self.side, self.seed = lr, side, seed

    def _build(self, encoder, names):
        return nn.Conv2d(encoder.config.vision.width, len(names), 1)

    def _learns(self, encoder):
        return ("!visual.stem.*",) if self.tower else ()

    def _losses(self, parts, encoder, images, labels):
        scores = parts(tower_maps(enter(encoder, images))[0])
        scores = nn.functional.interpolate(scores, labels.shape[-2:], mode="bilinear")
        return {"pixels": nn.functional.cross_entropy(scores, labels, ignore_index=255)}

    def local(self, hidden, words):
        return self.parts_(tower_maps(hidden)[0])

    def features(self, hidden):
        return tower_maps(hidden)[0].movedim(1, -1)

    def probabilities(self, scores, scale):
        return scores.softmax(0)


def photos(count=6, seed=0):
    """Two colours with an edge somewhere, and their label maps; the first row of a map has no label."""
    images, maps = plain.photos(count, seed=seed)
    for labels in maps:
        labels[0] = 255
    return images, maps


@pytest.fixture(scope="module")
def encoder():
    return toy_encoder(tokenizer=CLIPTokenizer())


@pytest.fixture(scope="module")
def fitted(encoder):
    return Probe(encoder).fit(*photos(), NAMES, progress=False)


def accuracy(method):
    images, maps = photos(seed=1)
    found = method.predict(images)
    return np.mean([(a == b)[b != 255].mean() for a, b in zip(found, maps, strict=True)])


def test_it_learns_and_the_encoder_stays(encoder, fitted):
    assert fitted.encoder_ is encoder
    assert accuracy(fitted) > 0.9
    assert accuracy(Probe(encoder, steps=1).fit(*photos(), NAMES)) < accuracy(fitted)
    assert not any(p.requires_grad for p in fitted.parts_.parameters())


def test_it_is_a_method_of_segment_with_its_own_encoder(fitted):
    image = photos(1, seed=2)[0][0]
    mask = segment(image, NAMES, method=fitted)
    assert mask.labels.shape == image.shape[:2]
    assert np.array_equal(mask.labels, fitted.predict([image])[0])
    assert Segmenter(NAMES, method=fitted, encoder=fitted.encoder_).encoder is fitted.encoder_
    with pytest.raises(ClipworksError, match="encoder must be the one that the method was trained on"):
        segment(image, NAMES, method=fitted, encoder=toy_encoder(1, tokenizer=CLIPTokenizer()))


@pytest.mark.parametrize("tower", [False, True])
def test_there_and_back(encoder, fitted, tower, tmp_path):
    method = Probe(encoder, tower=True, steps=3).fit(*photos(), NAMES) if tower else fitted
    path = method.save(tmp_path / "probe.safetensors")
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        kept = set(file.keys())
    learned = {"encoder.visual.stem.projection.weight"} if tower else set()
    assert kept == {"parts.weight", "parts.bias"} | learned
    again = Probe.load(path, encoder=encoder)
    images = photos(3, seed=3)[0]
    scores = [segment(images[0], NAMES, method=m).scores for m in (method, again)]
    assert np.array_equal(*scores)
    assert again.names_ == NAMES
    with pytest.raises(ClipworksError, match="encoder must be the one"):
        Probe.load(path, encoder=toy_encoder(1, tokenizer=CLIPTokenizer()))


def test_the_encoder_learns_where_it_is_told_to_and_the_given_one_stays(encoder):
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    method = Probe(encoder, tower=True, steps=3).fit(*photos(), NAMES)
    now = method.encoder_.state_dict()
    assert {name for name in now if not torch.equal(now[name], before[name])} == {"visual.stem.projection.weight"}
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert method.encoder_.fingerprint != encoder.fingerprint


def test_a_file_of_another_method_is_refused(tmp_path, encoder):
    from clipworks.tuning.files import write_change

    path = write_change(tmp_path / "x.safetensors", {"method": "maskclip"}, {"a": torch.zeros(1)})
    with pytest.raises(ClipworksError, match="a file of a trained dense method"):
        dense_method(path)
    with pytest.raises(ClipworksError, match="path must be a file of test_trained"):
        Probe.load(path)
    with pytest.raises(ClipworksError, match=r"method must be a name or a \.safetensors file\. Nothing is at"):
        dense_method(str(tmp_path / "none.safetensors"))
    record = {"method": "test_trained", "settings": {}, "names": NAMES, "fingerprint": encoder.fingerprint,
              "encoder": None}  # fmt: skip
    path = write_change(tmp_path / "y.safetensors", record, {"parts.weight": torch.zeros(1)})
    with pytest.raises(BadWeights, match="do not fit"):
        Probe.load(path, encoder=encoder)


def test_masks_may_be_files_and_images_preprocessed_pixels(tmp_path, encoder):
    images, maps = photos(2)
    for i, labels in enumerate(maps):
        Image.fromarray(labels).save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    a, b = (Probe(encoder, steps=2).fit(images, given, NAMES) for given in (maps, paths))
    assert torch.equal(a.parts_.weight, b.parts_.weight)
    config = encoder.config.preprocess
    pixels = (torch.tensor(np.stack(images)) / 255 - torch.tensor(config.mean)) / torch.tensor(config.std)
    pixels = pixels.permute(0, 3, 1, 2)
    c = Probe(encoder, steps=2).fit(pixels, maps, NAMES)
    assert torch.equal(a.parts_.weight, c.parts_.weight)
    assert np.array_equal(c.predict(pixels), np.stack(a.predict(images)))


def test_a_crop_and_its_labels_stay_together(encoder):
    """The label of a pixel is in its colour."""
    from clipworks.data.item import Item

    labels = np.arange(48, dtype=np.uint8).reshape(6, 8)
    image = np.repeat(np.repeat(labels, 8, 0), 8, 1)
    item = Item("a", np.stack([image] * 3, -1), columns={"labels": image})
    recipe = CropRecipe(nn.Linear(1, 1), lambda *_: {}, 32, 48)
    flips = set()
    for step in range(6):
        batch = recipe.batch([item], step, np.random.default_rng(step))
        grey, truth = 255 * batch["images"][0, 0], batch["labels"][0]
        assert truth.shape == (32, 32)
        assert ((grey - truth).abs() <= 9).all()  # a bicubic edge between rows differs by 8
        assert ((grey - truth).abs() < 0.5).float().mean() > 0.3
        flips.add(bool(truth[0, 0] > truth[0, -1]))
    assert flips == {True, False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": []}, "masks must be as many as images"),
        ({"masks": None}, "masks must be as many as images"),
        ({"masks": [np.zeros((24, 36, 3), int)]}, "must be label maps"),
        ({"masks": [np.full((24, 36), 2)]}, "labels from 0 to 1, or 255"),
        ({"masks": [np.zeros((2, 2), int)]}, "its mask has"),
        ({"names": ["a", "a"]}, "names must be distinct"),
        ({"images": []}, "at least one image"),
    ],
)
def test_messages(encoder, change, message):
    images, maps = photos(1)
    given = {"images": images, "masks": maps, "names": NAMES} | change
    with pytest.raises(ClipworksError, match=message):
        Probe(encoder, steps=1).fit(**given)


def test_a_name_alone_says_that_it_has_to_be_trained(encoder):
    for name in ("denseclip", "maft-plus"):
        with pytest.raises(ClipworksError, match=f"method '{name}' has to be trained"):
            segment(photos(1)[0][0], NAMES, method=name, encoder=encoder)


def test_unfitted_says_so(encoder):
    with pytest.raises(ValueError, match="not fitted"):
        Probe(encoder).predict(photos(1)[0])
    with pytest.raises(ValueError, match="not fitted"):
        segment(photos(1)[0][0], NAMES, method=Probe(encoder))
