"""The bundled model: what it is, that it needs nothing but the package, and that it sees what it should."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import clipworks
from clipworks.encoders import loading
from clipworks.zeroshot.classifier import class_vectors

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT / "benchmarks"))
small_model = pytest.importorskip("small_model")


needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the data is not beside the checkout")


@pytest.fixture(scope="module")
def encoder():
    return clipworks.load("clipworks-small")


def thinned(images, labels, names, per_class):
    """The first images of every class."""
    seen, kept = dict.fromkeys(range(len(names)), 0), []
    for i, label in enumerate(labels):
        seen[label] += 1
        if seen[label] <= per_class:
            kept.append(i)
    return [images[i] for i in kept], [labels[i] for i in kept], names


def test_what_it_is(encoder):
    path = loading.BUNDLED / "clipworks-small.safetensors"
    assert path.stat().st_size <= 40_000_000
    assert {"name": "clipworks-small", "source": "bundled"}.items() <= clipworks.models()[0].items()
    assert encoder.config.vision.kind == "vit"
    assert encoder.config.vision.class_token
    assert (encoder.dim, encoder.image_size, encoder.context_length) == (512, 224, 77)


def test_loads_without_network_in_the_same_state_each_time(encoder, monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert clipworks.load().fingerprint == encoder.fingerprint


def test_every_seam_of_the_image_tower_works_on_it(encoder):
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    plain = encoder.visual.run(pixels, output_layers=(0, 2), output_attention=(2,))
    assert plain.tokens.shape == (2, 50, 384)
    torch.testing.assert_close(plain.layers[2], plain.tokens)
    assert plain.class_attention(2).shape == (2, 6, 49)
    prompted = encoder.visual.run(pixels, prompts={1: torch.zeros(4, 384)})
    assert prompted.tokens.shape == (2, 54, 384)
    assert not torch.allclose(encoder.visual.run(pixels, attention={2: "vv"}).pooled, plain.pooled)
    kept = encoder.visual.run(pixels, keep=torch.arange(49).expand(2, -1))
    torch.testing.assert_close(kept.pooled, plain.pooled, rtol=1e-4, atol=1e-4)
    assert encoder.visual.run(torch.randn(1, 3, 160, 256)).tokens.shape == (1, 1 + 5 * 8, 384)


def test_reads_free_english(encoder):
    """Sentences that mean the same are nearer than sentences that share words."""
    a, b, c = encoder.texts(["a man is riding a horse on the beach", "somebody rides a horse by the sea",
                             "a man is eating an apple on the beach"])  # fmt: skip
    assert a @ b > a @ c + 0.1


@needs_data
@pytest.mark.shared_data
def test_caltech_zero_shot(encoder):
    images, labels, names = thinned(*small_model.caltech(SHARED / "caltech101-128"), per_class=4)
    assert small_model.accuracy(encoder, images, labels, names)["accuracy"] >= 45


@needs_data
@pytest.mark.shared_data
def test_pets_zero_shot(encoder):
    images, labels, names = small_model.pets(SHARED / "pets-600")  # all: the breeds differ too much for a part
    assert small_model.accuracy(encoder, images, labels, names)["accuracy"] >= 62


@needs_data
@pytest.mark.shared_data
def test_pacs_zero_shot(encoder):
    found = []
    for domain in ("photo", "art_painting", "cartoon", "sketch"):
        images, labels, names = thinned(*small_model.folders(SHARED / "pacs-128" / domain), per_class=15)
        found.append(small_model.accuracy(encoder, images, labels, names)["accuracy"])
    assert np.mean(found) >= 45


@needs_data
@pytest.mark.shared_data
def test_retrieval_on_coco(encoder):
    found = small_model.retrieval(encoder, SHARED / "coco-mini")
    assert found["text_to_image_recall@1"] >= 6
    assert found["image_to_text_recall@1"] >= 6


@needs_data
@pytest.mark.shared_data
def test_cosines_to_the_right_words_are_positive(encoder):
    """Scores that a user may set a threshold on: the right class is well above the mean of the others."""
    images, labels, names = thinned(*small_model.caltech(SHARED / "caltech101-128"), per_class=1)
    scores = encoder.images(images) @ class_vectors(names, encoder).T
    right = scores[torch.arange(len(labels)), torch.tensor(labels)]
    assert right.mean() > scores.quantile(0.95)
