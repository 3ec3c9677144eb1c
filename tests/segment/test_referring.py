"""Regions from files and from a model, and the command."""

import json

import numpy as np
import pytest
from PIL import Image

from clipworks.cli.main import main
from clipworks.encoders.toy import toy_encoder
from clipworks.errors import ClipworksError
from clipworks.segment import prompts
from clipworks.segment.fgvp import fgvp
from clipworks.segment.referring import read_boxes, refer

BOXES = [[0.0, 0, 12, 20], [10, 2, 30, 18], [3, 3, 9, 9]]
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


def test_files_of_boxes(tmp_path):
    coco = [{"bbox": [a, b, c - a, d - b], "category": "dog"} for a, b, c, d in BOXES]
    files = {"lists.json": json.dumps(BOXES), "coco.json": json.dumps(coco),
             "box.json": json.dumps([{"box": b, "score": 0.5} for b in BOXES]),
             "rows.csv": "\ufeff" + "\n".join(",".join(map(str, b)) for b in BOXES) + "\n\n"}  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        np.testing.assert_array_equal(read_boxes(tmp_path / name), BOXES)
    bad = {"empty.json": "[]", "three.csv": "1,2,3", "words.csv": "left,top,right,bottom\n1,2,3,4", "torn.json": "[[1,",
           "none.json": '[{"points": 3}]', "number.json": "7", "letters.json": '["abcd"]'}  # fmt: skip
    for name, text in bad.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(ClipworksError, match="boxes must"):
            read_boxes(tmp_path / name)
    with pytest.raises(ClipworksError, match="There is none at"):
        read_boxes(tmp_path / "missing.json")


def test_it_is_fgvp(tmp_path):
    encoder, out = toy_encoder(), tmp_path / "found.png"
    found = refer(PICTURE, "a dog", boxes=BOXES, encoder=encoder, out=out)
    plain = fgvp(PICTURE, "a dog", encoder, boxes=BOXES)
    np.testing.assert_array_equal(found.scores, plain.scores)
    drawn = np.asarray(Image.open(out))
    changed = (drawn != PICTURE).any(-1)
    left, top, right, bottom = (int(v) for v in BOXES[found.best])
    assert changed.any()
    changed[top:bottom, left:right] = False
    assert not changed.any()  # the line lies inside its box
    with pytest.raises(ClipworksError, match="Got neither"):
        refer(PICTURE, "a dog", encoder=encoder)


@pytest.mark.parametrize("own", [True, False])
def test_masks_of_a_model(monkeypatch, own):
    """A stand-in that answers a box with its left half and any point with the upper half of the picture."""

    def model(name):
        assert name == "some/sam"

        def look(image):
            import torch

            assert image.shape == (3, 40, 60)
            assert 200 < float(image.max()) <= 255

            def predict(box, point, scores):
                logits = torch.full((40, 60), -9.0)
                if box is None:
                    logits[:20] = 9.0
                else:
                    logits[box[1] : box[3] + 1, box[0] : (box[0] + box[2] + 1) // 2] = 9.0
                return logits, 0.95

            return predict

        return look

    monkeypatch.setattr(prompts, "Sam", model)
    encoder = toy_encoder()
    found = refer(PICTURE, "a dog", boxes=BOXES if own else None, sam="some/sam", encoder=encoder)
    masks = np.zeros((3 if own else 1, 40, 60), bool)
    if own:
        for mask, (left, top, right, bottom) in zip(masks, np.array(BOXES, int), strict=True):
            mask[top:bottom, left : (left + right) // 2] = True
    else:
        masks[0, :20] = True
    expected = fgvp(PICTURE, "a dog", encoder, boxes=BOXES if own else None, masks=masks)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    np.testing.assert_array_equal(found.boxes, expected.boxes)


def test_the_command(tmp_path, capsys):
    photo, boxes, out = tmp_path / "a.png", tmp_path / "boxes.json", tmp_path / "found.png"
    Image.fromarray(PICTURE).save(photo)
    boxes.write_text(json.dumps(BOXES))
    asked = ["refer", str(photo), "a dog", "--boxes", str(boxes)]
    assert main([*asked, "--out", str(out), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert sorted(row["region"] for row in rows) == [0, 1, 2]
    assert sum(row["probability"] for row in rows) == pytest.approx(1, abs=1e-5)
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    assert Image.open(out).size == (60, 40)
    assert main([*asked, "--prompts", "circle-lime"]) == 2
    assert "circle-line" in capsys.readouterr().err
    for place, message in (("a.xyz", "the ending of out must be one of"), ("no/a.png", "the folder of out must exist")):
        assert main([*asked, "--out", place]) == 2
        assert message in capsys.readouterr().err
    assert main(asked[:3]) == 2
    assert "boxes or sam must be given" in capsys.readouterr().err
