"""Training on masks of real photos helps on photos that were not trained on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import clipworks
from clipworks.segment.denseclip import DenseCLIP

ROOT = Path(__file__).parents[2]
PETS = ROOT.parent / "shared" / "data" / "pets-600"
sys.path.insert(0, str(ROOT / "benchmarks"))
benchmark = pytest.importorskip("trained_segmentation")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.shared_data,
    pytest.mark.skipif(not PETS.is_dir(), reason="the data is not beside the checkout"),
]


def test_the_photos_to_learn_from_are_not_judged():
    train, test = benchmark.pets(PETS, 5, 3)
    assert len(train) == 15
    assert len(test) == 9
    assert not {path for path, _ in train} & {path for path, _ in test}
    for _, labels in [*train, *test]:
        assert set(labels.ravel().tolist()) <= {0, 1, 2, 255}


def test_denseclip_after_training_and_before():
    encoder = clipworks.load("clipworks-small")
    train, test = benchmark.pets(PETS, 8, 4)
    images, maps = zip(*train, strict=True)

    def figure(steps):
        method = DenseCLIP(encoder, tower=False, lr=1e-3, steps=steps, batch_size=4, side=224)
        method.fit(images, maps, benchmark.NAMES, progress=False)
        return benchmark.judged(method, encoder, test, 224)["miou"]

    assert figure(40) > figure(1) + 15
