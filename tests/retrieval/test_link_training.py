"""Both stages of training for linkage: what a batch holds, and that records of a group come nearer."""

import numpy as np
import pytest
import torch
from PIL import Image

from clipworks.data.item import Item
from clipworks.encoders.toy import toy_encoder
from clipworks.errors import ClipworksError
from clipworks.losses.supcon import supcon
from clipworks.retrieval.clippings import record_vectors
from clipworks.retrieval.link_training import DistinctTexts, LinkRecipe, train_linker


def records(groups=4, each=3):
    rng = np.random.default_rng(0)
    found = []
    for g in range(groups):
        base = rng.integers(0, 256, (16, 16, 3))
        for i in range(each):
            noisy = (base + rng.integers(-60, 61, base.shape)).clip(0, 255).astype(np.uint8)
            found.append(Item(f"{g}-{i}", Image.fromarray(noisy), caption=f"firm {g} works {i}", label=f"g{g}"))
    return found


def test_a_text_is_once_in_a_batch():
    items = records()
    items[1].caption = items[0].caption
    recipe = DistinctTexts()
    recipe.bind(toy_encoder(), None)
    found = recipe.batch(items[:4], 0, np.random.default_rng(0))
    assert len(found["pixels"]) == len(found["tokens"]) == 3


def test_a_step_is_the_contrast_of_its_own_records():
    items, model = records(), toy_encoder()
    recipe = LinkRecipe(items, [np.array([0, 1, 2, 3, 4, 5]), np.array([6, 7, 8, 9, 10, 11])])
    recipe.bind(model, None)
    batch = recipe.batch(items[:2], 1, np.random.default_rng(0))
    assert batch["labels"].tolist() == [2, 2, 2, 3, 3, 3]
    own = items[6:]
    rows = record_vectors(model.images([i.image for i in own]), model.texts([i.caption for i in own]))
    expected = supcon(torch.from_numpy(rows), batch["labels"], 0.1)
    assert recipe.forward(model, batch)["supcon"].item() == pytest.approx(expected.item(), abs=1e-4)


def test_records_of_a_group_come_nearer():
    items, model = records(), toy_encoder()

    def spread(encoder):
        rows = record_vectors(encoder.images([i.image for i in items]), encoder.texts([i.caption for i in items]))
        labels = torch.tensor([int(i.label[1:]) for i in items])
        return supcon(torch.from_numpy(rows), labels).item()

    before = spread(model)
    reports = train_linker(items, model, pairs=1, rounds=4, pairs_lr=1e-3, lr=3e-3, batch_size=9, augment="none")
    assert [next(iter(r.losses)) for r in reports] == ["loss"] * 5
    assert spread(reports[-1].encoder) < before
    assert spread(model) == before  # the encoder that was given is as it was


def test_mistakes_are_named():
    bare = [Item("a", Image.new("RGB", (8, 8)), caption="a")]
    with pytest.raises(ClipworksError, match="a label for stage 2"):
        train_linker(bare, toy_encoder(), rounds=1)
    with pytest.raises(ClipworksError, match=r"at least 1\. Got 0 of both"):
        train_linker(bare, toy_encoder(), pairs=0)
