"""Unknown images of a folder, and the command."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from clipworks.cli.main import main
from clipworks.errors import BadImage, ClipworksError
from clipworks.ood.unknown import find_unknown


class Colours:
    """An encoder whose images are their mean colour and whose texts are colours by name."""

    dim, logit_scale, fingerprint = 3, 10.0, "colours"
    WORDS = {"red": 0, "green": 1, "blue": 2}  # noqa: RUF012

    def preprocess(self, image, key=None):
        from clipworks.data.decode import decode

        return torch.from_numpy(np.asarray(decode(image, key=key), np.float32)).permute(2, 0, 1) / 255

    def images(self, pixels):
        return torch.nn.functional.normalize(pixels.mean((2, 3)) + 1e-3, dim=1)

    def texts(self, sentences):
        return torch.stack([torch.eye(3)[next(i for w, i in self.WORDS.items() if w in s)] for s in sentences])


@pytest.fixture
def place(tmp_path):
    rng = np.random.default_rng(0)
    lots = {"known": [(230, 20, 20)] * 20 + [(20, 230, 20)] * 20, "new": [(230, 20, 20), (20, 20, 230), (20, 230, 20)]}
    for name, colours in lots.items():
        (tmp_path / name).mkdir()
        for i, colour in enumerate(colours):
            noisy = tuple(int(np.clip(c + rng.integers(-15, 15), 0, 255)) for c in colour)
            Image.new("RGB", (8, 8), noisy).save(tmp_path / name / f"{i:02}.png")
    return tmp_path


def test_unknown_images_are_set_aside(place):
    (place / "new/broken.png").write_bytes(b"no")
    found = find_unknown(place / "new", ["red", "green"], place / "known", encoder=Colours(), rate=0.05)
    assert found.unknown == ["01.png"]
    assert found.labels == ["red", "none of these", "green"]
    assert [e.key for e in found.errors] == ["broken.png"]
    assert found.as_rows()[0]["key"] == "00.png"


def test_a_mixed_lot(place):
    for i, c in enumerate([(15, 25, 220), (25, 15, 235)] * 6):
        Image.new("RGB", (8, 8), c).save(place / "known" / f"blue{i}.png")
    found = find_unknown(place / "known", ["red", "green"], encoder=Colours(), score="max_logit")
    assert sorted(found.unknown) == sorted(f"blue{i}.png" for i in range(12))


def test_the_command(place, capsys, monkeypatch):
    from clipworks.encoders import loading

    monkeypatch.setattr(loading, "load", lambda *_: Colours())
    run = ["ood", str(place / "new"), "--names", "red,green", "--known", str(place / "known")]
    assert main([*run, "--unknown-only", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [row["key"] for row in json.loads(out)] == ["01.png"]
    assert "1 of 3 images score" in err
    assert main([*run, "--score", "mcn"]) == 2
    assert "Did you mean 'mcm'" in capsys.readouterr().err
    assert main(["ood", str(place / "known"), "--names", "red,green", "--json"]) == 0
    assert "without --known the scores are cut in two" in capsys.readouterr().err


def test_the_nearest_known_image_needs_no_word_that_fits(place):
    """The only name is that of no image here, so words tell nothing; known images do."""
    found = find_unknown(place / "new", ["blue"], place / "known", encoder=Colours())
    assert found.labels == ["blue", "none of these", "blue"]
    files = [file for lot in ("known", "new") for file in sorted((place / lot).glob("*"))]
    rows = np.array([np.asarray(Image.open(file), np.float64).mean((0, 1)) / 255 + 1e-3 for file in files])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    known, new = rows[:40], rows[40:]
    others = sorted(max(known[i] @ known[j] for j in range(40) if j != i) for i in range(40))
    np.testing.assert_allclose(found.scores, [max(x @ k for k in known) for x in new], atol=1e-6)
    assert found.threshold == pytest.approx(others[1], abs=1e-6)  # the second lowest: 0.05 of 41 is 2.05


@pytest.mark.parametrize("score", ["mcm", "msp", "max_logit", "energy"])
def test_scores_of_words_are_those_of_open_set(place, score):
    from clipworks.zeroshot.open_set import OpenSet

    encoder, names = Colours(), ["red", "green"]
    found = find_unknown(place / "new", names, place / "known", encoder=encoder, score=score, rate=0.1)
    known, new = (
        encoder.images(torch.stack([encoder.preprocess(file) for file in sorted((place / lot).glob("*"))]))
        for lot in ("known", "new")
    )
    judge = OpenSet(encoder.texts(names), score=score, rate=0.1, scale=10.0, names=names).fit(known)
    np.testing.assert_allclose(found.scores, judge.score_samples(new), atol=1e-6)
    assert found.threshold == pytest.approx(judge.threshold_, abs=1e-6)
    assert found.labels == judge.predict(new).tolist()


def test_bad_images_of_both_sources_are_told(place):
    (place / "new/broken.png").write_bytes(b"no")
    (place / "known/torn.png").write_bytes(b"no")
    found = find_unknown(place / "new", ["red", "green"], place / "known", encoder=Colours())
    assert [e.key for e in found.errors] == ["broken.png", "torn.png"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"score": "nearest"}, r"known must be images of the classes where score is 'nearest'. Got None"),
        ({"score": "mcn"}, r"score must be one of .*'nearest'. Got 'mcn'. Did you mean 'mcm'"),
        ({"names": ["red", "none of these"]}, r"names must not hold 'none of these'"),
        ({"known": "known", "rate": 0.01}, r"known must hold at least 99 images for a rate of 0.01. Got 40"),
        ({"known": "known", "rate": 7}, r"rate must lie between 0 and 1, .* Got 7"),
        ({"known": "nowhere"}, r"known: source not found: "),
        ({}, r"source must hold at least 4 images where there are no known. Got 3"),
    ],
)
def test_mistakes_are_named_before_they_cost(place, asked, message):
    asked = {"names": ["red", "green"], **asked}
    if "known" in asked:
        asked["known"] = place / asked["known"]
    with pytest.raises(ClipworksError, match=message):
        find_unknown(place / "new", encoder=Colours(), **asked)


def test_mistakes_are_named(place):
    (place / "empty").mkdir()
    with pytest.raises(ClipworksError):
        find_unknown(place / "empty", ["red"], encoder=Colours(), score="max_logit")
    (place / "bad").mkdir()
    (place / "bad/a.png").write_bytes(b"no")
    with pytest.raises(BadImage, match=r"a\.png"):
        find_unknown(place / "bad", ["red", "green"], encoder=Colours())
