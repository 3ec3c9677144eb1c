"""Explanations of files, deletion and insertion, and the command."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from seen import Spot, pair, toy

from clipworks.analysis import explain as module
from clipworks.analysis.explain import blur, explain, faithfulness, trust_of
from clipworks.analysis.relevance import Relevance
from clipworks.cli.main import main
from clipworks.errors import ClipworksError


class Words:
    """A toy whose texts are vectors of their length."""

    def __init__(self):
        self.own = toy().float()

    def __getattr__(self, name):
        return getattr(self.own, name)

    def texts(self, sentences):
        return torch.nn.functional.normalize(torch.cos(torch.arange(8.0) * len(sentences[0]))[None], dim=1)


@pytest.fixture
def photo(tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize("method", module.METHODS)
def test_a_map_in_the_images_own_pixels(photo, method, tmp_path):
    found = explain(photo, "a dog", encoder=Words(), method=method, out=tmp_path / "heat.png")
    assert found.heat.shape == (20, 30)
    assert Image.open(tmp_path / "heat.png").size == (30, 20)
    assert np.abs(found.heat).max() > 0
    assert -1 <= found.similarity <= 1
    trust = trust_of(found, Words(), steps=4)
    assert len(trust.deleted) == 5


def test_colours_say_for_and_against(tmp_path):
    heat = np.zeros((4, 6), np.float32)
    heat[0, 0], heat[3, 5] = 2, -2
    found = Relevance("a", "t", heat, 0.2, "occlusion", Image.new("RGB", (6, 4), "#808080"))
    drawn = np.asarray(found.draw(), int)
    assert drawn[0, 0, 0] > drawn[0, 0, 2] + 50
    assert drawn[3, 5, 2] > drawn[3, 5, 0] + 50
    assert (drawn[1, 1] == 128).all()
    with np.load(found.save(tmp_path / "a.npz")) as kept:
        np.testing.assert_array_equal(kept["heat"], heat)
    with pytest.raises(ClipworksError, match="ending of a relevance map"):
        found.save("a.bmp")


def test_deletion_and_insertion_by_hand():
    encoder, (pixels, words) = toy(), pair(1)
    heat = torch.rand(4, 4, generator=torch.Generator().manual_seed(3))
    found = faithfulness(encoder, pixels[0], words[0], heat, steps=4)
    word, soft = torch.nn.functional.normalize(words[0], dim=0).double(), blur(pixels)[0]
    order = heat.flatten().argsort(descending=True).tolist()
    deleted, inserted = [], []
    with torch.no_grad():
        for k in (0, 4, 8, 12, 16):
            minus, plus = pixels[0].clone(), soft.clone()
            for cell in order[:k]:
                y, x = divmod(cell, 4)
                place = (slice(None), slice(4 * y, 4 * y + 4), slice(4 * x, 4 * x + 4))
                minus[place], plus[place] = soft[place], pixels[0][place]
            deleted.append(float(encoder.encode_image(minus[None])[0] @ word))
            inserted.append(float(encoder.encode_image(plus[None])[0] @ word))
    low, span = inserted[0], deleted[0] - inserted[0]
    span = span if span > 1e-6 else 1.0
    np.testing.assert_allclose(found.deleted, (np.array(deleted) - low) / span, atol=1e-4)
    np.testing.assert_allclose(found.inserted, (np.array(inserted) - low) / span, atol=1e-4)
    assert found.deletion == pytest.approx(np.trapezoid(found.deleted, dx=0.25))
    assert found.insertion == pytest.approx(np.trapezoid(found.inserted, dx=0.25))


def test_the_right_map_beats_its_opposite():
    pixels = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) - 2.5
    pixels[0, 8:16, 16:24] = 1
    heat = torch.zeros(4, 4)
    heat[1, 2] = 1
    right, wrong = (faithfulness(Spot(8, 16), pixels, torch.tensor([1.0, 0]), h, steps=16) for h in (heat, -heat))
    assert right.deletion < 0.1 < 0.9 < wrong.deletion
    assert wrong.insertion < 0.1 < 0.9 < right.insertion
    assert right.deleted[0] == pytest.approx(1)
    assert right.deleted[-1] == pytest.approx(0, abs=1e-6)


def test_the_command(photo, tmp_path, capsys, monkeypatch):
    from clipworks.encoders import loading

    monkeypatch.setattr(loading, "load", lambda *_: Words())
    out = str(tmp_path / "b.png")
    assert main(["explain", str(photo), "a dog", "--out", out, "--trust", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert set(values) == {"image", "text", "similarity", "method", "peak", "deletion", "insertion", "picture"}
    assert Image.open(out).size == (30, 20)
    assert main(["explain", str(photo), "a dog", "--method", "oclusion"]) == 2
    assert "Did you mean 'occlusion'" in capsys.readouterr().err


def test_mistakes_are_named():
    with pytest.raises(ClipworksError, match="steps must lie in"):
        faithfulness(toy(), pair()[0][0], pair()[1][0], torch.zeros(2, 2), steps=5)
    with pytest.raises(ClipworksError, match="pixels must be one image"):
        faithfulness(toy(), *pair(), torch.zeros(4, 4))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"text": " "}, r"text must be words. Got ' '"),
        ({"image_size": 0}, r"image_size must lie in \[1, inf\]. Got 0"),
        ({"out": "a.txt"}, r"the ending of out must be one of '.png', .*'.npz'. Got '.txt'"),
        ({"out": "nowhere/a.png"}, r"the folder of out must exist. Got 'nowhere/a.png'"),
    ],
)
def test_mistakes_of_a_user_are_named(photo, asked, message):
    with pytest.raises(ClipworksError, match=message):
        explain(photo, **{"text": "a dog", "encoder": Words(), **asked})


def test_a_folder_of_several_is_no_image(photo):
    Image.open(photo).save(photo.with_name("b.png"))
    with pytest.raises(ClipworksError, match=r"image must be one image. Got .*, which holds several"):
        explain(str(photo.parent), "a dog", encoder=Words())
