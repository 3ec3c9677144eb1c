"""`load` and `models`: names, paths, the local cache, the one download, digests, devices, messages."""

import copy
import doctest
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_formats_native import encoder
from test_formats_open_clip import clip_config, clip_model, folder
from test_formats_openai import archive, vit

import clipworks
from clipworks.encoders import loading
from clipworks.encoders.config import CLIP_MEAN, CLIP_STD
from clipworks.encoders.formats import hub, huggingface, keymap, openai
from clipworks.encoders.loading import load, models, resolve, save
from clipworks.encoders.published import ARCHITECTURES, HUB
from clipworks.errors import BadWeights, ClipworksError, UnknownName

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    """A package folder with two encoders of our own."""
    box = tmp_path / "weights"
    monkeypatch.setattr(loading, "BUNDLED", box)
    save(encoder(), box / "clipworks-small.safetensors")
    save(encoder("siglip"), box / "other.safetensors")
    return box


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Hugging Face cache, and a network that counts (and refuses) what is asked of it."""
    import huggingface_hub
    from huggingface_hub import constants

    asked = []

    def refuse(self, name, **options):
        asked.append(name)
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
    return tmp_path / "hub", asked


def put(box, repo, source, revision="main"):
    """Place files as the hub's client does: a reference to a commit, and a snapshot."""
    base = box / f"models--{repo.replace('/', '--')}"
    (base / "refs").mkdir(parents=True, exist_ok=True)
    (base / "refs" / revision).write_text("c" * 40)
    shutil.copytree(source, base / "snapshots" / ("c" * 40), dirs_exist_ok=True)


def open_clip_folder(tmp_path):
    return folder(tmp_path / "made", clip_model(), clip_config())


def test_bundled_names_and_the_default(bundled):
    assert load().fingerprint == load("clipworks-small").fingerprint == encoder().fingerprint
    assert load("other").config.logit_bias == -10.0
    assert clipworks.load is load
    assert clipworks.models is models


def test_models_lists_the_folder_and_what_was_published(bundled):
    listed = models()
    assert [set(m) for m in listed] == [{"name", "source", "dim", "image_size", "description"}] * len(listed)
    assert listed[0] == {"name": "clipworks-small", "source": "bundled", "dim": 16, "image_size": 32,
                         "description": "comes with the package"}  # fmt: skip
    names = [m["name"] for m in listed]
    assert names == ["clipworks-small", "other", *HUB]
    assert {m["source"] for m in listed if m["name"] == "ViT-B-32/openai"} == {"hf:openai/clip-vit-base-patch32"}


def test_published_rows_agree_with_the_architectures():
    compared = 0
    for name, (repo, dim, size, _) in HUB.items():
        assert hub.REPOSITORY.fullmatch(repo)
        model = ARCHITECTURES.get(name.split("/")[0])
        if model is not None:
            compared += 1
            assert (model["embed_dim"], model["vision_cfg"]["image_size"]) == (dim, size), name
    assert compared > 20


def test_unknown_names_offer_the_closest(bundled):
    for given, meant in (("clipworks-smal", "clipworks-small"), ("ViT-B-32/openia", "ViT-B-32/openai"),
                         ("vit-l-14/laion2b", "ViT-L-14/laion2b")):  # fmt: skip
        with pytest.raises(UnknownName, match=rf"Got '{given}'. Did you mean '{meant}'"):
            load(given)
    with pytest.raises(UnknownName, match=r"'ViT-B-32-quickgelu' is an architecture, .* ViT-B-32/openai, ViT-B-32/l"):
        load("ViT-B-32-quickgelu")
    with pytest.raises(UnknownName, match=r"an architecture, not trained weights. A state dictionary"):
        load("RN50")
    for wrong in ("", "a\0b", b"bytes"):
        with pytest.raises(ClipworksError, match=r"name_or_path must be a name or a path"):
            load(wrong)
    with pytest.raises(UnknownName):
        load("../weights/other")


def test_paths(tmp_path, monkeypatch):
    path = save(encoder(), tmp_path / "box" / "any.pt")  # the name says nothing of the kind
    want = encoder().fingerprint
    assert load(path).fingerprint == load(str(path)).fingerprint == load(path.parent).fingerprint == want
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/box/any.pt").fingerprint == want


def test_a_renamed_file_is_the_same_encoder(tmp_path):
    made = open_clip_folder(tmp_path)
    want = load(made)
    moved = shutil.move(made, tmp_path / "elsewhere")
    (moved / "open_clip_model.safetensors").rename(moved / "best.safetensors")
    renamed = load(moved)
    assert renamed.config.name != want.config.name
    assert renamed.fingerprint == want.fingerprint


def test_one_model_in_four_layouts_has_one_fingerprint(tmp_path):
    """An archive, a state dictionary, a Hugging Face folder and our own file, written through the key maps."""
    model = vit()
    made = load(archive(model, tmp_path / "a.pt"))
    want = made.fingerprint
    ours = {n: t.detach() for n, t in made.state_dict().items()}
    assert load(save(made, tmp_path / "own.safetensors")).fingerprint == want

    state = keymap.give(openai.pairs(made.config), ours, "open_clip")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    box = tmp_path / "open_clip"
    box.mkdir()
    save_file(state, box / "open_clip_model.safetensors")
    vision = {"image_size": 32, "layers": 3, "width": 128, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    config = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    (box / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    assert load(box).fingerprint == want

    box = tmp_path / "hf"
    box.mkdir()
    save_file(keymap.give(huggingface.pairs(made.config), ours, "Hugging Face"), box / "model.safetensors")
    heads = {"num_attention_heads": 2, "num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 512}
    words = {"num_attention_heads": 1, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 256}
    record = {"model_type": "clip", "projection_dim": 24, "vision_config": {**heads, "image_size": 32, "patch_size": 8},
              "text_config": {**words, "max_position_embeddings": 16}}  # fmt: skip
    (box / "config.json").write_text(json.dumps(record))
    images = {"size": {"shortest_edge": 32}, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    (box / "preprocessor_config.json").write_text(json.dumps(images))
    assert load(box).fingerprint == want
    assert load(save(load(box), tmp_path / "again.safetensors")).fingerprint == want


def test_folders_without_a_clear_choice(tmp_path):
    box = tmp_path / "box"
    box.mkdir()
    with pytest.raises(BadWeights, match=r"holds no weights .* It holds nothing"):
        load(box)
    for name in ("a.safetensors", "b.safetensors"):
        save(encoder(), box / name)
    with pytest.raises(BadWeights, match=r"several weights files; name one of them. It holds a.safetensors, b.safet"):
        load(box)
    save(encoder(), box / "model.safetensors")
    assert load(box).dim == 16


def test_sha256(tmp_path):
    path = save(encoder(), tmp_path / "x.safetensors")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert load(path, sha256=digest).dim == load(path, sha256=digest.upper()).dim == 16
    with pytest.raises(BadWeights, match=rf"its sha256 is {digest}, expected {'0' * 64}"):
        load(path, sha256="0" * 64)
    with pytest.raises(BadWeights, match=r"64 hexadecimal digits. Got 'abc'"):
        load(path, sha256="abc")


def test_device_and_precision(tmp_path, monkeypatch):
    path = save(encoder(), tmp_path / "x.safetensors")
    assert load(path, device=torch.device("cpu"), precision="bf16").precision == "bf16"
    for wrong in ("gpu", "cuda:99", 3.5):
        with pytest.raises(ClipworksError, match=r"device must name a device of this machine, or be 'auto'. Got"):
            load(path, device=wrong)
    monkeypatch.setenv("CLIPWORKS_DEVICE", "gpu")
    with pytest.raises(ClipworksError, match=r"CLIPWORKS_DEVICE must name a device of this machine, .* Got 'gpu'"):
        load(path)
    assert load(path, device="cpu").device.type == "cpu"
    monkeypatch.setenv("CLIPWORKS_DEVICE", "")
    assert load(path).device.type == "cpu"
    assert load(path, device="auto").device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ClipworksError, match=r"precision must be one of"):
        load(path, precision="fp8")


def test_an_encoder_knows_where_it_came_from_until_it_is_changed(tmp_path, monkeypatch):
    assert load().source == "clipworks-small"
    monkeypatch.chdir(tmp_path)
    save(encoder(), "x.safetensors")
    made = load("x.safetensors")
    assert made.source == str(tmp_path / "x.safetensors")
    assert copy.deepcopy(made).source is None
    assert load("x.safetensors").to_precision("bf16").to_precision("fp32").source is None
    assert load("x.safetensors", precision="bf16").source == made.source
    assert load("x.safetensors", image_size=2 * made.image_size).source is None
    with torch.no_grad():
        next(made.visual.parameters()).add_(1)
    assert made.source is None
    assert encoder().source is None


def test_the_cache_is_used_without_the_network(tmp_path, cache):
    box, asked = cache
    put(box, "org/name", open_clip_folder(tmp_path))
    put(box, "openai/clip-vit-base-patch32", open_clip_folder(tmp_path))
    want = load(tmp_path / "made").fingerprint
    assert load("hf:org/name").fingerprint == load("ViT-B-32/openai").fingerprint == want
    put(box, "org/name", tmp_path / "made", revision="v2")
    assert load("hf:org/name@v2").fingerprint == want
    assert asked == []


def test_nothing_is_downloaded_unasked(cache):
    with pytest.raises(ClipworksError, match=r"downloaded unasked. .*load\('hf:openai/clip-vit-base-patch16'"):
        load("ViT-B-16/openai")
    assert cache[1] == []


def test_the_network_fails(cache):
    with pytest.raises(ClipworksError, match=r"hf:org/none is not in .* cache .*no network in tests.*give the path"):
        load("hf:org/none")
    assert cache[1] == ["org/none"]
    for wrong in ("hf:name", "hf:", "hf:../../etc/passwd", "hf:https://example.org/x"):
        with pytest.raises(ClipworksError, match=r"must be 'hf:org/name'"):
            load(wrong)
    assert cache[1] == ["org/none"]


def test_a_download_takes_the_best_weights_and_their_side_files(tmp_path, cache, monkeypatch):
    import huggingface_hub

    box, _ = cache
    made = open_clip_folder(tmp_path)
    listed = ["README.md", "open_clip_pytorch_model.bin", "open_clip_model.safetensors", "open_clip_config.json"]
    wanted = []
    real = huggingface_hub.snapshot_download

    def fetch(name, *, revision=None, local_files_only=False, allow_patterns=None):
        if local_files_only:
            return real(name, revision=revision, local_files_only=True)
        wanted.extend(allow_patterns)
        put(box, name, made)
        return str(box / "models--org--name" / "snapshots" / ("c" * 40))

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, revision=None: listed)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert load("hf:org/name").fingerprint == load(made).fingerprint
    assert wanted[0] == "open_clip_model.safetensors"
    assert "open_clip_config.json" in wanted
    assert not any("bin" in w or "README" in w for w in wanted)
    wanted.clear()
    load("hf:org/name")
    assert wanted == []
    listed[:] = ["one.bin", "two.bin"]
    with pytest.raises(BadWeights, match=r"holds no weights that can be told apart: one.bin, two.bin"):
        load("hf:org/other")


def test_a_half_filled_cache_is_no_cache(tmp_path, cache):
    box, asked = cache
    made = open_clip_folder(tmp_path)
    (made / "open_clip_model.safetensors").unlink()
    put(box, "org/part", made)
    with pytest.raises(ClipworksError, match=r"could not be fetched"):
        load("hf:org/part")
    (made / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    put(box, "org/shards", made)
    with pytest.raises(ClipworksError, match=r"could not be fetched"):
        load("hf:org/shards")
    assert asked == ["org/part", "org/shards"]


def test_guide(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    guide = Path(__file__).parents[2] / "docs" / "weights.md"
    failed, tried = doctest.testfile(str(guide), module_relative=False)
    assert failed == 0
    assert tried > 15


def test_unknown_layouts_say_what_was_found(tmp_path):
    torch.save({"layer.weight": torch.zeros(3, 2), "epoch": 7}, tmp_path / "other.pt")
    with pytest.raises(BadWeights, match=r"unknown layout.*1 tensors.*other.pt \(torch zip\): layer.weight \(3, 2\)"):
        load(tmp_path / "other.pt")
    with pytest.raises(BadWeights, match=r"an architecture goes with a state dictionary of .* Found 1 tensors"):
        load(f"ViT-B-32:{tmp_path / 'other.pt'}")
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    with pytest.raises(BadWeights, match=r"neither safetensors nor a file of torch.save"):
        load(tmp_path / "page.pt")


def test_an_argument_that_means_an_encoder_is_named():
    with pytest.raises(ClipworksError, match=r"encoder: name_or_path must be a name .* Got 'clipworks-smal'"):
        resolve("clipworks-smal")
