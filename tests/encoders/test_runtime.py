"""Exported encoders: the same vectors, the gate, fingerprints, and the command."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_towers import BERT_TEXT, SIGLIP_TEXT, SIGLIP_VISION, encoder, pixels, tokens

import clipworks
from clipworks.cli.main import main
from clipworks.encoders.loading import load, save
from clipworks.encoders.runtime import Refused, export, fit, gate, load_export
from clipworks.encoders.runtime.folder import backend
from clipworks.encoders.runtime.graphs import TOWERS, program
from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.toy import toy_encoder
from clipworks.errors import ClipworksError, CollectionError, MissingExtra, UnknownName
from clipworks.store.collection import Collection
from clipworks.store.search import search

SAYINGS = ["a cat", "a dog that sleeps on a red sofa", "rain"]


def _has(*names):
    from importlib.util import find_spec

    return all(find_spec(name) for name in names)


def runtimes(*needs):
    """A parameter per runtime, skipped where its libraries are missing."""
    wanted = {"openvino": ("openvino",), "onnxruntime": ("onnx", "onnxruntime", "onnxscript")}
    return [
        pytest.param(name, marks=pytest.mark.skipif(not _has(*libraries, *needs), reason=f"{name} is not installed"))
        for name, libraries in wanted.items()
    ]


needs_openvino = pytest.mark.skipif(not _has("openvino"), reason="openvino is not installed")
needs_nncf = pytest.mark.skipif(not _has("openvino", "nncf"), reason="openvino or nncf is not installed")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Forty small images, and one that is damaged."""
    folder, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(draw.integers(0, 255, (5, 6, 3), np.uint8)).resize((30, 24)).save(folder / f"{i:02}.png")
    (folder / "damaged.jpg").write_bytes(b"not a picture")
    return folder


@pytest.fixture(scope="module")
def exact():
    return toy_encoder(tokenizer=CLIPTokenizer())


@pytest.fixture(scope="module")
def made(tmp_path_factory, exact, photos):
    """Exports by runtime, made once each."""
    done = {}

    def make(runtime, precision="fp32"):
        if (runtime, precision) not in done:
            out = tmp_path_factory.mktemp("exports") / f"{runtime}-{precision}"
            report = export(exact, out, images=photos, texts=SAYINGS, runtime=runtime, precision=precision, bound=0.5)
            done[runtime, precision] = out, report
        return done[runtime, precision]

    return make


@pytest.mark.parametrize("runtime", runtimes())
def test_the_same_vectors_at_any_number_of_rows(made, exact, runtime):
    back = load(made(runtime)[0])
    for rows in (1, 2, 5):
        given = torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(rows))
        torch.testing.assert_close(back.images(given), exact.images(given), atol=2e-6, rtol=0)
        unnormalised = back.images(given, normalize=False)
        torch.testing.assert_close(unnormalised, exact.images(given, normalize=False), atol=1e-5, rtol=1e-5)
    for texts in (SAYINGS[:1], SAYINGS, [" ".join(["word"] * 200)]):
        torch.testing.assert_close(back.texts(texts), exact.texts(texts), atol=2e-6, rtol=0)
    assert (back.dim, back.image_size, back.context_length) == (exact.dim, exact.image_size, exact.context_length)
    assert back.logit_scale == pytest.approx(exact.logit_scale)
    assert back.precision == "fp32"
    assert back.runtime == runtime


@pytest.mark.slow
@pytest.mark.parametrize("runtime", runtimes())
@pytest.mark.parametrize(
    ("vision", "text"),
    [
        ({}, {}),
        (SIGLIP_VISION | {"width": 16, "heads": 2}, SIGLIP_TEXT),
        ({"kind": "resnet", "image_size": 64, "width": 8, "layers": (1, 1, 1, 1), "heads": 8, "activation": "relu",
          "pool": "attention", "class_token": False}, BERT_TEXT | {"width": 16, "heads": 2}),
        ({"stem": "efficientnet-lite0", "image_size": 64, "patch_size": 32, "memory": 5}, {"pool": "eot"}),
    ],
    ids=["clip", "siglip", "resnet and bert", "hybrid with memory"],
)  # fmt: skip
def test_every_kind_of_tower(tmp_path, runtime, vision, text):
    # fifty shaken convolutions amplify rounding: in float32 torch itself is then 0.6 from float64
    whole = encoder(vision, text, shaken="stem" not in vision).float()
    side, pad = whole.image_size, whole.config.text.pad_id
    given = {"image": pixels(3, side).float(), "text": tokens(pad=pad)}
    for tower, name in TOWERS.items():
        backend(runtime).write(program(whole, tower), name, tmp_path / tower)
        with torch.inference_mode():
            wanted = whole.visual(given[tower]) if tower == "image" else whole.text(given[tower])
        found = backend(runtime).Session(tmp_path / tower, "fp32")(given[tower])
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("runtime", runtimes())
def test_fp32_fits_a_collection_of_torch_and_the_other_way_round(made, exact, photos, tmp_path, runtime):
    folder, report = made(runtime)
    back = load(folder)
    assert report.same
    assert back.fingerprint == exact.fingerprint
    clipworks.embed(photos, tmp_path / "a", encoder=exact, progress=False)
    clipworks.embed(photos, tmp_path / "b", encoder=str(folder), progress=False)
    one, two = (Collection.open(tmp_path / name) for name in "ab")
    np.testing.assert_allclose(one.vectors, two.vectors, atol=1e-3)
    assert search(one, "a cat", encoder=back, k=3).keys == search(two, "a cat", encoder=exact, k=3).keys


@needs_nncf
def test_int8_has_a_fingerprint_of_its_own_and_its_collections_are_kept_apart(made, exact, photos, tmp_path):
    folder, report = made("openvino", "int8")
    back = load(folder)
    assert not report.same
    assert back.precision == "int8"
    assert back.fingerprint not in (exact.fingerprint, load(made("openvino")[0]).fingerprint)
    assert load(folder).fingerprint == back.fingerprint
    assert load(folder, precision="int8").precision == "int8"
    clipworks.embed(photos, tmp_path / "c", encoder=exact, progress=False)
    with pytest.raises(CollectionError, match=r"'int8'"):
        search(tmp_path / "c", "a cat", encoder=str(folder))
    with pytest.raises(CollectionError, match="fingerprint"):
        clipworks.embed(photos, tmp_path / "c", encoder=str(folder), progress=False)
    clipworks.embed(photos, tmp_path / "d", encoder=str(folder), progress=False)
    assert len(search(tmp_path / "d", "a cat", k=3)) == 3  # finds its encoder by itself
    with pytest.raises(CollectionError):
        search(tmp_path / "d", "a cat", encoder=exact)


@needs_nncf
def test_images_that_calibrate_do_not_judge(exact, photos, tmp_path, monkeypatch):
    seen = []
    real = backend("openvino").quantise
    monkeypatch.setattr(
        backend("openvino"), "quantise",
        lambda path, recipe, batches, out: (seen.extend(batches), real(path, recipe, batches, out)),
    )  # fmt: skip
    judges = []
    start = gate.Gate.__init__
    monkeypatch.setattr(gate.Gate, "__init__", lambda self, e, p, *o: (judges.append(p), start(self, e, p, *o))[1])
    report = export(exact, tmp_path / "x", images=photos, bound=0.5)
    assert (report.images, report.calibrated) == (20, 20) == (len(judges[0]), len(seen))
    both = torch.cat([judges[0], torch.cat(seen)]).flatten(1)
    assert len(both.unique(dim=0)) == 40


@pytest.mark.parametrize("runtime", runtimes())
def test_what_is_below_the_bound_is_refused_and_nothing_is_written(exact, photos, tmp_path, monkeypatch, runtime):
    # an export that is wrong: its images are those of another network
    other = toy_encoder(seed=5, tokenizer=CLIPTokenizer())
    module = sys.modules["clipworks.encoders.runtime.export"]
    real = module.program
    monkeypatch.setattr(module, "program", lambda e, tower: real(other if tower == "image" else e, tower))
    with pytest.raises(Refused, match=r"95 in 100 images reach .* the bound is 0\.98") as why:
        export(exact, tmp_path / "x", images=photos, runtime=runtime, precision="fp32")
    assert list(tmp_path.iterdir()) == []
    reference, refused = why.value.rows
    assert reference.accepted
    assert not refused.accepted
    assert refused.low < 0.98
    assert refused.text_low > 0.999


def test_the_gates_figures_are_those_of_numpy(exact, photos):
    texts = [f"text {i}" for i in range(30)]
    check = gate.Gate(exact, gate.read_images(photos, exact), texts, 0.9)
    assert len(check.pixels) == 40
    other = copy.deepcopy(exact)
    with torch.no_grad():
        other.visual.projection.weight += 0.2 * torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    found = check.measure(other, "by hand")
    a, b = (e.images(check.pixels).double().numpy() for e in (other, exact))
    cosine = np.sort((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))
    assert found.cosine == pytest.approx(cosine.mean())
    assert found.low == pytest.approx(cosine[1])
    assert found.worst == pytest.approx(cosine[0])
    near = [np.argsort(-(x @ x.T) + 9 * np.eye(40), axis=1)[:, :10] for x in (a, b)]
    kept = np.mean([len(np.intersect1d(x, y)) / 10 for x, y in zip(*near, strict=True)])
    assert found.neighbours == pytest.approx(kept)
    assert found.text_low == pytest.approx(1)
    assert found.accepted == (cosine[1] >= 0.9)
    assert not check.same(other)
    assert check.same(exact)


def test_same_is_finer_than_half_precision(exact, photos):
    check = gate.Gate(exact, gate.read_images(photos, exact), SAYINGS, 0.9)
    assert not check.same(copy.deepcopy(exact).to_precision("bf16"))


@needs_openvino
def test_an_exported_encoder_has_no_inside(made, photos):
    back = load(made("openvino")[0])
    for call in (lambda: back.visual.run(torch.zeros(1, 3, 16, 16)), lambda: back.text.project(torch.zeros(1, 16)),
                 lambda: back.encode_image(torch.zeros(1, 3, 16, 16), prompts={0: torch.zeros(1, 16)})):  # fmt: skip
        with pytest.raises(ClipworksError, match="was exported"):
            call()
    with pytest.raises(ClipworksError, match="cannot be resized"):
        back.resize(image_size=32)
    with pytest.raises(ClipworksError, match=r"'fp32' and cannot be changed\. Got 'bf16'"):
        back.to_precision("bf16")
    with pytest.raises(ClipworksError, match="one size"):
        load(made("openvino")[0], image_size=32)
    with pytest.raises(ClipworksError, match=r"is 'openvino'\. Got 'onnxruntime'"):
        load(made("openvino")[0], runtime="onnxruntime")
    with pytest.raises(ClipworksError, match="not an exported one"):
        export(back, made("openvino")[0].parent / "again", images=photos)
    assert copy.deepcopy(back).texts(SAYINGS).equal(back.texts(SAYINGS))


@needs_openvino
def test_other_preprocessing_is_another_fingerprint(made, exact):
    import dataclasses

    back = load(made("openvino")[0])
    before = back.fingerprint
    back.preprocess = dataclasses.replace(back.preprocess, fast=True)
    assert back.fingerprint not in (before, exact.fingerprint)
    assert back.refresh() == back.fingerprint


@needs_openvino
def test_nothing_is_sent_to_the_makers_of_openvino():
    backend("openvino").library()
    assert sys.modules["openvino_telemetry"] is None


@needs_nncf
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_signal_finds_its_stack_after_encoders_are_dropped(exact, photos, tmp_path):
    """OpenVINO left the main thread a freed one, and Ctrl-C ended the process by SIGSEGV."""
    path = save(exact, tmp_path / "toy.safetensors")
    script = """if True:
        import gc, signal, sys
        from clipworks import load
        kept = [load(sys.argv[1], runtime="openvino", precision=p, images=sys.argv[2]) for p in ("int8", "fp32")]
        while kept:
            kept.pop(0)
            gc.collect()
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            print("stopped")"""
    done = subprocess.run([sys.executable, "-c", script, path, photos], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["stopped"]), done.stderr


@needs_openvino
def test_load_with_a_runtime_measures_it_first(exact, photos, tmp_path):
    path = save(exact, tmp_path / "toy.safetensors")
    found = load(path, runtime="openvino", precision="fp32", images=photos)
    assert found.runtime == "openvino"
    assert found.fingerprint == exact.fingerprint
    with pytest.raises(ClipworksError, match="give images="):
        load(path, runtime="openvino")
    assert load(path, device="auto").precision in ("fp32", "bf16")
    with pytest.raises(UnknownName, match="runtime"):
        load(path, runtime="openvin", images=photos)


def test_torch_takes_part(exact, photos, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)  # nothing else is installed
    found = fit(exact, images=photos, bound=0.5)
    assert found.precision in ("fp32", "bf16")
    assert isinstance(found, type(exact))
    assert fit(exact, "torch", "bf16", images=photos, bound=0.5).precision == "bf16"
    with pytest.raises(MissingExtra, match=r"clipworks\[export\]"):
        export(exact, "nowhere", images=photos, runtime="auto")


def test_what_is_missing_is_named(monkeypatch):
    for runtime, library in (("openvino", "openvino"), ("onnxruntime", "onnxruntime")):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(MissingExtra, match=r"clipworks\[export\]"):
            backend(runtime).Session(Path(__file__), "fp32")


def test_wrong_arguments(exact, photos, tmp_path):
    with pytest.raises(ClipworksError, match=r"'bf16' is not offered .* onnxruntime: fp32, int8"):
        export(exact, tmp_path / "x", images=photos, runtime="onnxruntime", precision="bf16")
    with pytest.raises(UnknownName, match="Did you mean 'int8'"):
        export(exact, tmp_path / "x", images=photos, precision="int9")
    with pytest.raises(ClipworksError, match="choose another place"):
        export(exact, tmp_path, images=photos)
    with pytest.raises(ClipworksError, match="text file"):
        gate.read_texts("no such file")
    alone = tmp_path / "alone"
    alone.mkdir()
    Image.new("RGB", (9, 9)).save(alone / "one.png")
    with pytest.raises(ClipworksError, match=r"at least 2 images that can be used\. 1 of 1 can"):
        gate.read_images(alone, exact)


@needs_nncf
def test_the_command(exact, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = str(save(exact, tmp_path / "toy.safetensors"))
    (tmp_path / "said.txt").write_text("\n".join(SAYINGS))
    basic = ["export", path, "--images", str(photos), "--texts", "said.txt", "--out", "fast"]
    assert main([*basic, "--precision", "fp32", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["same"]
    assert told["chosen"]["runtime"] == "openvino"
    assert told["images"] == 40
    assert main(basic) == 2
    assert "overwrite" in capsys.readouterr().err
    assert main([*basic, "--overwrite", "--bound", "1"]) == 1  # eight bits never are equal
    printed = capsys.readouterr()
    assert "smooth" in printed.out
    assert "plain" in printed.out
    assert "refused, and nothing was written" in printed.err
    assert load_export(tmp_path / "fast").precision == "fp32"  # what was there still is
    assert main([*basic, "--overwrite", "--bound", "0.5"]) == 0
    assert "needs collections of its own" in capsys.readouterr().out
    assert main([*basic, "--overwrite", "--bound", "0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chosen"]["precision"] == "int8"  # and nothing of NNCF's beside it
    assert main(["embed", str(photos), "--out", "c", "--encoder", "fast"]) == 0
    assert main(["search", "c", "a cat", "--k", "2"]) == 0
    assert main(["classify", str(photos), "--names", "cat,dog", "--encoder", "fast", "--counts"]) == 0
