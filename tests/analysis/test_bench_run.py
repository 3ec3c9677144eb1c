"""The benchmark from folders to files: what is written, what is not done twice, and who sees what."""

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from clipworks.analysis.bench import run as bench_run
from clipworks.analysis.bench.contestants import (
    Contestant,
    Material,
    Question,
    all_methods,
    contestants,
    split_specs,
)
from clipworks.analysis.bench.features import FeatureCache
from clipworks.analysis.bench.run import bench
from clipworks.analysis.bench.summary import failures, read_runs
from clipworks.cli.main import main
from clipworks.data.labelled import read_labelled
from clipworks.data.shots import Split
from clipworks.encoders.loading import save
from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.toy import toy_encoder
from clipworks.errors import ClipworksError, UnknownName
from clipworks.registry import get_method, methods, read_call

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "grey": (128, 128, 128)}
EACH = 12


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A weights file and a set of coloured pictures in folders per class."""
    place = tmp_path_factory.mktemp("bench")
    save(toy_encoder(tokenizer=CLIPTokenizer()), place / "toy.safetensors")
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (place / "colours" / name).mkdir(parents=True)
        for i in range(EACH):
            pixels = np.clip(np.array(colour) + rng.normal(0, 25, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(place / "colours" / name / f"{i:02d}.png")
    return place


@pytest.fixture
def options(room, tmp_path):
    return {"data": {"colours": room / "colours"}, "out": tmp_path / "out", "model": [str(room / "toy.safetensors")],
            "methods": ["classifier", "nearest_mean", "ridge"], "shots": [1, 2], "seeds": [1, 2]}  # fmt: skip


def files(out):
    return sorted((out / "runs").rglob("*.json"))


def record(out, name):
    return json.loads(next(path for path in files(out) if path.name.startswith(name)).read_text())


def test_one_file_per_run_says_all(options):
    done = bench(**options)
    assert (done.ran, done.skipped, done.failed) == (1 + 2 * 2 * 2, 0, 0)
    found = record(options["out"], "ridge--shots-2--seed1")
    assert found["config"]["setting"] == {"shots": 2}
    assert set(found) >= {"key", "config", "versions", "git", "encoder", "split", "data", "results", "summary", "cost"}
    assert found["versions"]["numpy"] == np.__version__
    assert found["results"]["test"]["images"] == len(COLOURS) * round(0.3 * EACH)
    assert found["summary"] == found["results"]["test"]["accuracy"]
    assert set(found["cost"]) == {"fit_seconds", "microseconds_per_image", "peak_mb", "threads"}
    split = Split.from_json((options["out"] / "splits" / f"{found['split'][:16]}.json").read_text())
    assert split.digest == found["split"]
    assert len(split.train) == 2 * len(COLOURS)


def test_the_numbers_are_those_of_the_method_itself(options, room):
    """Recomputed apart: read, embed, draw, fit, score."""
    bench(**options)
    for path in (options["out"] / "splits").iterdir():
        split = Split.from_json(path.read_text())
        if split.setting == {"shots": 2} and split.seed == 2:
            break
    from clipworks.encoders.loading import load

    encoder = load(room / "toy.safetensors")
    classes = sorted(COLOURS)
    x, z = (encoder.images([room / "colours" / key for key, _ in pairs]).numpy().astype(float)
            for pairs in (split.train, split.tests["test"]))  # fmt: skip
    y, t = ([classes.index(name) for _, name in pairs] for pairs in (split.train, split.tests["test"]))
    from clipworks.zeroshot.classifier import class_vectors

    head = get_method("heads/ridge")(text=class_vectors(classes, encoder).numpy()).fit(x, np.array(y))
    assert 100 * np.mean(head.predict(z) == t) == record(options["out"], "ridge--shots-2--seed2")["summary"]


def test_the_same_command_does_nothing_twice_and_adds_what_is_new(options):
    bench(**options)
    before = {path: path.stat().st_mtime_ns for path in files(options["out"])}
    again = bench(**options)
    assert (again.ran, again.skipped) == (0, 9)
    more = bench(**{**options, "methods": [*options["methods"], "knn(k=1)"]})
    assert (more.ran, more.skipped) == (4, 9)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_image_is_another_run(options, tmp_path, room):
    """Same names, other pixels: vectors and results are made anew."""
    shutil.copytree(room / "colours", tmp_path / "colours")
    options |= {"data": {"colours": tmp_path / "colours"}, "shots": [1], "seeds": [1]}
    bench(**options)
    assert bench(**options).skipped == 3
    for path in (tmp_path / "colours" / "red").iterdir():
        Image.new("RGB", (16, 16), (1, 2, 3)).save(path)
    assert bench(**options).skipped == 0


def test_a_changed_method_is_run_again(options, monkeypatch):
    bench(**options)
    monkeypatch.setattr(bench_run, "_source", lambda contestant: "changed" * (contestant.info.name == "ridge"))
    done = bench(**options)
    assert done.ran == 9  # the source is part of every key
    monkeypatch.setattr(bench_run, "_source", lambda contestant: "again" * (contestant.info.name == "ridge"))
    done = bench(**options)
    assert (done.ran, done.skipped) == (4, 5)


def test_a_half_written_file_is_not_a_finished_run(options):
    bench(**options)
    victim = files(options["out"])[0]
    victim.write_text(victim.read_text()[:100])
    assert bench(**options).ran == 1
    json.loads(victim.read_text())


def test_several_processes_find_the_same(options, tmp_path):
    bench(**options)
    bench(**{**options, "out": tmp_path / "other", "jobs": 2})
    one, two = ({p.name: json.loads(p.read_text()) for p in files(out)} for out in (options["out"], tmp_path / "other"))
    assert one.keys() == two.keys()
    for name, found in one.items():
        assert (found["key"], found["results"]) == (two[name]["key"], two[name]["results"])


@pytest.mark.slow
def test_killed_it_leaves_nothing_half_and_goes_on(options, room):
    words = ["bench", "--data", f"colours={room / 'colours'}", "--out", str(options["out"]), "--model",
             options["model"][0], "--methods", "ridge,nearest_mean", "--seeds", ",".join(map(str, range(40))),
             "--shots", "1,2"]  # fmt: skip
    running = subprocess.Popen([sys.executable, "-m", "clipworks", *words], stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    end = time.time() + 600
    while time.time() < end and len(files(options["out"])) < 5 and running.poll() is None:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    left = files(options["out"])
    assert len(left) >= 5
    assert all("key" in json.loads(path.read_text()) for path in left)
    done = bench(**{**options, "methods": ["ridge", "nearest_mean"], "seeds": range(40)})
    assert (done.ran, done.skipped) == (160 - len(left), len(left))
    leftovers = [p for p in options["out"].rglob(".*.json.*") if p.is_file()]
    assert len(leftovers) <= 1, "at most the temporary file of the run that was killed"


class Spy:
    """A contestant that remembers what it was given."""

    spec, info, learns, draws, describes = "spy", methods("heads")[0], True, False, False

    def __init__(self):
        self.seen, self.asked = [], []
        self.target = get_method("heads/nearest_mean")

    def fit(self, material):
        self.seen.append(material)
        real = Contestant("nearest_mean", next(m for m in methods("heads") if m.name == "nearest_mean"))
        fitted, asked = real.fit(material), self.asked
        answer = fitted.answer

        def remember(question):
            asked.append(question.x)
            return answer(question)

        fitted.answer = remember
        return fitted


@pytest.mark.parametrize("validation", ["shots", "extra"])
@pytest.mark.parametrize("protocol", ["few-shot", "imbalanced", "noisy"])
def test_no_vector_of_a_test_reaches_fit(options, monkeypatch, protocol, validation):
    spy = Spy()
    monkeypatch.setattr(bench_run, "contestants", lambda *_: ([spy], {}))
    bench(**{**options, "protocol": [protocol], "validation": validation})
    seen = {row.tobytes() for m in spy.seen for x in (m.x, *([m.validation[0]] if m.validation else [])) for row in x}
    asked = {row.tobytes() for x in spy.asked for row in x}
    assert seen
    assert asked
    assert not seen & asked
    assert any(m.validation for m in spy.seen) == (validation == "extra" and protocol != "noisy")
    assert not any(hasattr(m, "test") for m in spy.seen)


def test_a_method_that_fails_says_why_and_the_others_go_on(options, capsys):
    methods_ = ["nearest_mean", "knn(k=7)"]  # seven neighbours of four shots are refused
    done = bench(**{**options, "methods": methods_, "shots": [1, 2]})
    assert (done.ran, done.failed) == (8, 2)
    assert "k must lie in" in record(options["out"], "knn-k-7")["error"]
    count, reason = failures(options["out"] / "runs")["knn(k=7)"]
    assert count == 2
    assert "k must lie in" in reason
    assert {run.method for run in read_runs(options["out"] / "runs")} == {"nearest_mean", "knn(k=7)"}


@pytest.mark.parametrize("known", [{"red": ["a warm colour", "like blood"], "blue": ["like the sky"]}, {"ox": ["big"]}])
def test_descriptions_reach_the_methods_that_take_them(options, tmp_path, known):
    (tmp_path / "told.json").write_text(json.dumps(known))
    methods_ = ["classify_by_description", "fudd", "description_selection"]
    options |= {"methods": methods_, "shots": [2], "seeds": [1], "descriptions": str(tmp_path / "told.json")}
    done = bench(**options)
    assert (done.ran, done.failed) == ((3, 0) if "red" in known else (3, 3))
    for name in methods_ if "ox" in known else ():
        assert "describe at least one of the classes. Got none of 'blue'" in record(options["out"], name)["error"]
    (tmp_path / "told.json").write_text(json.dumps({**known, "green": ["like grass"]}))
    assert bench(**options).ran == 3, "other descriptions are other runs"


@pytest.fixture
def damaged(options, tmp_path, room):
    """A copy of the set, in which one image to learn from and one to test on are no pictures; which these are."""
    bench(**{**options, "shots": [2], "out": tmp_path / "before"})
    splits = [Split.from_json(path.read_text()) for path in sorted((tmp_path / "before" / "splits").iterdir())]
    split = next(split for split in splits if split.train)
    shutil.copytree(room / "colours", tmp_path / "colours")
    victims = [split.train[0][0], split.tests["test"][0][0]]
    for key in victims:
        (tmp_path / "colours" / key).write_bytes(b"not a picture")
    options["data"] = {"colours": tmp_path / "colours"}
    return victims


def test_an_image_that_cannot_be_read_is_left_out_by_name_and_another_drawn(options, damaged):
    done = bench(**options)
    assert sorted(error.key for error in done.unreadable) == sorted(damaged)
    assert (done.ran, done.failed) == (9, 0)
    for path in (options["out"] / "splits").iterdir():
        split = Split.from_json(path.read_text())
        assert len(split.train) == split.setting["shots"] * len(COLOURS)
        keys = [key for key, _ in [*split.train, *split.validation, *split.tests["test"]]]
        assert not set(damaged) & set(keys)
    again = bench(**options)
    assert (again.ran, again.skipped, len(again.unreadable)) == (0, 9, 2)


def test_an_image_that_cannot_be_read_is_told_on_the_command_line(options, damaged, tmp_path, capsys):
    words = ["bench", "--data", f"colours={tmp_path / 'colours'}", "--out", str(tmp_path / "shell"), "--shots", "2",
             "--model", options["model"][0], "--methods", "nearest_mean"]  # fmt: skip
    assert main(words) == 0
    err = capsys.readouterr().err
    assert all(f"clipworks: left out: image '{key}': is not a known image format" in err for key in damaged)


def test_a_class_of_which_no_image_can_be_read_stops_it_by_name(options, tmp_path, room):
    shutil.copytree(room / "colours", tmp_path / "colours")
    for path in (tmp_path / "colours" / "blue").iterdir():
        path.write_bytes(b"not a picture")
    with pytest.raises(ClipworksError, match=r"Got none of 'blue': image 'blue/"):
        bench(**{**options, "data": {"colours": tmp_path / "colours"}})


def test_damaged_files_of_the_work_folder_are_made_again(options, capsys):
    bench(**options)
    for path in [*(options["out"] / "features").rglob("*.np?"), *(options["out"] / "splits").iterdir()]:
        path.write_bytes(path.read_bytes()[:200])
    victim, *others = files(options["out"])
    bench(**{**options, "methods": ["knn(k=1)"]})
    victim.write_text("{broken")
    with pytest.warns(UserWarning, match=f"{victim.name} is left out, as it is not JSON"):
        assert len(read_runs(options["out"] / "runs")) == len(others) + 4
    assert all(Split.from_json(path.read_text()) for path in (options["out"] / "splits").iterdir())
    assert bench(**options).ran == 1


def test_a_set_that_cannot_be_learned_or_tested_is_refused(options, tmp_path, room):
    shutil.copytree(room / "colours" / "red", tmp_path / "one" / "red")
    with pytest.raises(ClipworksError, match=r"must have at least 2 classes\. Got 'red' alone"):
        bench(**{**options, "data": {"one": tmp_path / "one"}})
    for name in COLOURS:
        (tmp_path / "single" / name).mkdir(parents=True)
        shutil.copy(room / "colours" / name / "00.png", tmp_path / "single" / name)
    with pytest.raises(ClipworksError, match="no class has more than 1: nothing is left to test on"):
        bench(**{**options, "data": {"single": tmp_path / "single"}})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"methods": ["gdaa"]}, "Did you mean 'gda'"),
        ({"methods": ["gda(alhpa=1)"]}, "gda has no argument 'alhpa'.*Did you mean 'alpha'"),
        ({"methods": ["gda(alpha=x)"]}, "methods must look like"),
        ({"methods": ["gda", "-gda"]}, "methods must name at least one"),
        ({"methods": ["open_set"]}, "must classify features"),
        ({"protocol": ["fewshot"]}, "Did you mean 'few-shot'"),
        ({"protocol": ["cross"]}, "others to test on"),
        ({"protocol": ["domains"]}, "needs a set with domains"),
        ({"shots": []}, "shots must be distinct numbers"),
        ({"shots": [0, 1]}, r"shots must lie in \[1, inf\]. Got 0"),
        ({"seeds": [1, 1]}, "seeds must be distinct"),
        ({"validation": "test"}, "validation must be one of"),
        ({"data": []}, "data must name at least one set"),
        ({"noisy_labels": ["x=y.npz"]}, "noisy_labels must be one of 'colours'"),
    ],
)
def test_mistakes_are_named(options, change, says):
    with pytest.raises(ClipworksError, match=says):
        bench(**{**options, **change})


def test_every_method_on_features_takes_part_or_says_what_it_needs():
    found, left_out = contestants(["all"], descriptions=True)
    names = {c.spec for c in found} | set(left_out)
    assert names == {info.name for info in all_methods()}
    assert {"classifier", "waffleclip", "gda", "ridge", "linear_probe", "classify_by_description"} <= names
    assert all(reason.startswith("needs ") for reason in left_out.values())
    without, more = contestants(["all"])
    assert "classify_by_description" in more
    assert len(without) < len(found)
    fewer, _ = contestants(["all,-gda"])
    assert {c.spec for c in without} - {c.spec for c in fewer} == {"gda"}


def test_words_of_the_command_line():
    assert split_specs("a(b=[1,2], c='x,y'),d") == ["a(b=[1,2], c='x,y')", "d"]
    assert read_call("methods", "linear_probe(text=None)", "gda(alpha=1.0)") == ("linear_probe", {"text": None})
    for bad in ("a b", "a(1)", "a(b=open('x'))", "a.b()"):
        with pytest.raises(ClipworksError, match="methods must"):
            contestants([bad])


@pytest.mark.parametrize("spec", ["gda", "cross_modal", "ridge", "ridge(text=None)", "classifier"])
def test_other_classes_are_answered_by_the_method_or_by_words(spec):
    rng = np.random.default_rng(0)
    words = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    x = np.repeat(words[:3], 6, axis=0) + 0.1 * rng.normal(size=(18, 12))
    z = np.repeat(words[3:6], 10, axis=0) + 0.1 * rng.normal(size=(30, 12))
    (one,), _ = contestants([spec])
    material = Material(x, np.repeat(np.arange(3), 6), words[:3], ["a", "b", "c"])
    given = one.fit(material).answer(Question(z, np.repeat(np.arange(3), 10), words[3:6], ["d", "e", "f"], own=False))
    assert given.by == ("words" if spec.startswith("ridge") else "method")
    assert np.mean(given.found == np.repeat(np.arange(3), 10)) > 0.9
    np.testing.assert_allclose(given.probabilities.sum(1), 1)


def test_the_cache_knows_encoder_and_image(room, tmp_path):
    data = read_labelled("colours", room / "colours")
    encoder = toy_encoder(tokenizer=CLIPTokenizer())
    calls = []
    images = encoder.images
    encoder.images = lambda x, **k: calls.append(len(x)) or images(x, **k)
    cache = FeatureCache(tmp_path, encoder)
    rows = np.array([3, 1, 20])
    first = cache.vectors(data, rows)
    np.testing.assert_allclose(first, images([data.items[r].source() for r in rows]).numpy(), atol=1e-6)
    again = FeatureCache(tmp_path, encoder).vectors(data, np.array([1, 20, 5, 3]))
    np.testing.assert_array_equal(again[[3, 0, 1]], first)
    assert calls == [3, 1]
    other = FeatureCache(tmp_path, toy_encoder(1, tokenizer=CLIPTokenizer()))
    assert not np.allclose(other.vectors(data, rows), first)
    assert len(list(tmp_path.iterdir())) == 2


def test_from_a_shell(room, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["bench", "--data", f"colours={room / 'colours'}", "--model", str(room / "toy.safetensors"), "--shots", "1",
             "--seeds", "1,2", "--methods", "ridge(strength=1.0),classifier", "--report", "found"]  # fmt: skip
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert "3 runs done, 0 had been done before" in err
    assert out.splitlines()[0].split()[:5] == ["model", "protocol", "data", "method", "words"]
    page = (tmp_path / "found.html").read_text()
    assert page.count("<svg") == 1
    assert not [word for word in ("<script", "<link", "src=", "@import") if word in page], "no outside assets"
    assert "| ridge(strength=1.0) |" in (tmp_path / "found.md").read_text()
    assert main(["bench", "--report", "again.md", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    assert (tmp_path / "again.md").exists()
    assert main(["bench"]) == 2
    assert "--data NAME=FOLDER" in capsys.readouterr().err
    assert main(["bench", "--sets"]) == 0
    assert "Oxford-IIIT Pet" in capsys.readouterr().out
    assert main(["bench", "--data", "dtd=nowhere", "--methods", "ridge"]) == 2
    error = capsys.readouterr().err
    assert "Layout: images/banded/" in error
    assert error.count("\n") == 1


def test_unknown_protocols_are_not_silent(room):
    with pytest.raises(UnknownName):
        bench({"colours": room / "colours"}, out=room / "o", protocol=["domain"])


def test_what_a_contestant_takes_is_never_called_test():
    for info in all_methods():
        target = get_method(f"{info.area}/{info.name}")
        if inspect.isclass(target):
            assert not [name for name in inspect.signature(target.fit).parameters if "test" in name]
