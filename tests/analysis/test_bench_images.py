"""Methods that learn from images take part in the benchmark beside those that learn from features."""

import json

import numpy as np
import pytest
from PIL import Image

from clipworks.analysis.bench.contestants import AREAS, TOWERS, contestants
from clipworks.analysis.bench.run import bench
from clipworks.data.labelled import read_labelled
from clipworks.data.shots import Split
from clipworks.encoders.loading import load, save
from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.toy import toy_encoder
from clipworks.registry import get_method, methods

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "grey": (128, 128, 128)}
# few steps of each, by the settings it has
QUICK = {"coop": "coop(epochs=2,lr=0.1)", "lora": "lora(steps_per_shot=2,augment='none')"}


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    place = tmp_path_factory.mktemp("bench_images")
    save(toy_encoder(tokenizer=CLIPTokenizer()), place / "toy.safetensors")
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (place / "colours" / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.clip(np.array(colour) + rng.normal(0, 25, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / "colours" / name / f"{i:02d}.png")
    return place


def test_all_are_those_of_features_and_images_are_the_others():
    features, _ = contestants(["all"])
    images, left_out = contestants(["images"])
    assert {c.info.area for c in features} == set(AREAS)
    assert {c.info.area for c in images} == set(TOWERS)
    assert all(c.looks and c.learns for c in images)
    assert {"coop", "vpt", "maple", "clip_svd", "lora", "flyp"} <= {c.spec for c in images}
    fitted = {m.name for area in TOWERS for m in methods(area) if hasattr(get_method(f"{area}/{m.name}"), "fit")}
    assert {c.spec for c in images} | set(left_out) <= fitted


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("protocol", ["few-shot", "base-to-new"])
def test_a_run_is_the_method_itself_on_the_images_of_the_split(room, tmp_path, name, protocol):
    done = bench({"colours": room / "colours"}, out=tmp_path, model=[str(room / "toy.safetensors")],
                 methods=[QUICK[name], "ridge"], shots=[2], seeds=[1], protocol=[protocol])  # fmt: skip
    assert (done.ran, done.failed) == (2, 0), [p.read_text() for p in (tmp_path / "runs").rglob(f"{name}*.json")]
    told = json.loads(next((tmp_path / "runs").rglob(f"{name}*.json")).read_text())
    splits = [Split.from_json(path.read_text()) for path in (tmp_path / "splits").glob("*.json")]
    split = next(split for split in splits if split.train)  # the other one is for methods that need words alone
    data = read_labelled("colours", room / "colours")
    by_key = {item.key: item for item in data.items}
    (one,), _ = contestants([QUICK[name]])
    model = one.target(names=split.classes, encoder=load(str(room / "toy.safetensors")), seed=1, **one.options)
    model.fit([by_key[key] for key, _ in split.train], [split.classes.index(label) for _, label in split.train])
    for test, pairs in split.tests.items():
        names = sorted({label for _, label in pairs}) if test == "new" else split.classes
        asked = model.to_new(names) if test == "new" else model
        right = np.mean(asked.predict([by_key[k] for k, _ in pairs]) == [names.index(label) for _, label in pairs])
        assert told["results"][test]["accuracy"] == pytest.approx(100 * right)
        assert told["results"][test]["by"] == "method"
