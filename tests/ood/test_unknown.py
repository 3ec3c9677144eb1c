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


def test_mistakes_are_named(place):
    (place / "empty").mkdir()
    with pytest.raises(ClipworksError):
        find_unknown(place / "empty", ["red"], encoder=Colours(), score="max_logit")
    (place / "bad").mkdir()
    (place / "bad/a.png").write_bytes(b"no")
    with pytest.raises(BadImage, match=r"a\.png"):
        find_unknown(place / "bad", ["red", "green"], encoder=Colours())
