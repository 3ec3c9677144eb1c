"""What runs on the CPU runs on a CUDA device, with the same answers; skipped where there is none."""

import copy

import numpy as np
import pytest
import torch
from replay import copied, differences, leaves, recorded_calls

import clipworks
from clipworks.registry import get_method, methods

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FUNCTIONS = [m for m in methods() if not m.object[0].isupper()]
CLASSES = [m for m in methods() if m.object[0].isupper() and hasattr(get_method(f"{m.area}/{m.name}"), "fit")]
NEAR = 2e-2  # of learned things: the sums of a GPU are in another order, and every step carries it on


def there(leaf):
    """A tensor on the device; an array stays what it is."""
    if isinstance(leaf, torch.Tensor):
        return leaf.detach().cuda().requires_grad_(leaf.requires_grad)
    return leaf


def moved(value):
    """An encoder or another module on the device, and every tensor of anything else."""
    return copy.deepcopy(value).cuda() if isinstance(value, torch.nn.Module) else leaves(value, there)


@pytest.mark.parametrize("info", FUNCTIONS, ids=lambda m: f"{m.area}/{m.name}")
def test_functions(info):
    for call in recorded_calls(info):
        args, kwargs = copied((call.args, call.kwargs))
        found = call.target(*[moved(a) for a in args], **{name: moved(a) for name, a in kwargs.items()})
        assert not differences(call.result, found, NEAR)


@pytest.mark.parametrize("info", CLASSES, ids=lambda m: f"{m.area}/{m.name}")
def test_estimators_on_an_encoder(info):
    reached = 0
    for call in recorded_calls(info):
        settings = call.owner.get_params(deep=False)
        if not any(isinstance(value, torch.nn.Module) for value in settings.values()):
            continue
        args, kwargs = copied((call.args, call.kwargs))
        estimator = type(call.owner)(**{name: moved(value) for name, value in settings.items()}).fit(*args, **kwargs)
        expected = call.again()
        for name in ("predict", "predict_proba", "decision_function", "transform", "score_samples"):
            if hasattr(expected, name):
                one, two = (np.asarray(getattr(e, name)(copied(call.args[0]))) for e in (expected, estimator))
                assert not differences(one, two, NEAR), name
                reached += 1
    if not reached:
        pytest.skip("it needs no encoder")


def test_the_bundled_encoder_is_exact_and_leaves_no_setting_behind():
    home, away = clipworks.load(), clipworks.load(device="cuda")
    pixels = torch.randn(8, 3, home.image_size, home.image_size, generator=torch.Generator().manual_seed(0))
    words = ["a photo of a cat", "two red buses in a street of an old town"]
    before = torch.backends.cudnn.allow_tf32
    assert (home.images(pixels) - away.images(pixels)).abs().max() < 1e-5
    assert (home.texts(words) - away.texts(words)).abs().max() < 1e-5
    assert home.fingerprint == away.fingerprint
    assert torch.backends.cudnn.allow_tf32 == before


def test_the_environment_says_where_a_named_encoder_goes(monkeypatch):
    monkeypatch.setenv("CLIPWORKS_DEVICE", "auto")
    assert clipworks.load().device.type == "cuda"
    assert clipworks.load(device="cpu").device.type == "cpu"


def test_a_collection_made_on_the_device_is_searched_without_it(tmp_path):
    pytest.importorskip("lancedb")
    from PIL import Image

    draw = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(draw.integers(0, 255, (40, 50, 3), np.uint8)).save(tmp_path / f"{i}.png")
    there_ = clipworks.embed(tmp_path, tmp_path / "there", device="cuda", precision="fp32", progress=False)
    here = clipworks.embed(tmp_path, tmp_path / "here", device="cpu", precision="fp32", progress=False)
    one, two = (clipworks.Collection.open(report.path) for report in (there_, here))
    assert one.fingerprint == two.fingerprint
    assert np.abs(one.vectors[:].astype(np.float32) - two.vectors[:].astype(np.float32)).max() < 1e-3
    assert clipworks.search(one, "noise", k=1).keys == clipworks.search(two, "noise", k=1).keys
