"""GRAIN: the decoder, what a step compares, limits of the weights, and reading a trained encoder through it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipworks.errors import BadWeights, ClipworksError
from clipworks.losses.grain import grain
from clipworks.losses.regions import centres
from clipworks.pretraining.cloc import image_tokens
from clipworks.pretraining.grain import Decoder, GrainRecipe, Grounded
from clipworks.training.feed import step_generator
from clipworks.training.recipe import ContrastiveRecipe
from training.toy import tiny

from .scenes import NAMES, scenes
from .small import same, trained

SMALL = {"layers": 2, "heads": 2, "width": 32, "hidden": 64}


def step(recipe, count=5, **options):
    encoder = tiny()
    recipe.bind(encoder, None)
    recipe.eval()  # dropout off
    return encoder, recipe.batch(scenes(count, **options), 0, step_generator(0, 0))


def test_the_order_of_tokens_does_not_matter():
    torch.manual_seed(0)
    model = Decoder(16, 8, queries=3, **SMALL).eval()
    tokens = torch.rand(2, 9, 16, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    for one, other in zip(model(tokens), model(tokens[:, order]), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    image, regions, boxes = model(tokens)
    assert image.shape == (2, 8)
    assert torch.allclose(regions.norm(dim=-1), torch.ones(2, 3), atol=1e-5)
    assert ((boxes >= 0) & (boxes <= 1)).all()


def test_layers_begin_differently():
    layers = Decoder(16, 8, **SMALL).decoder.layers
    assert not torch.equal(layers[0].linear1.weight, layers[1].linear1.weight)


def test_the_last_query_is_the_images_and_sees_the_others():
    """Pre-norm layers written out: self-attention among the queries, cross-attention to the tokens, feed-forward."""
    torch.manual_seed(0)
    model = Decoder(16, 8, queries=2, **{**SMALL, "layers": 1}).eval().double()
    tokens = torch.rand(1, 5, 16, generator=torch.Generator().manual_seed(0)).double()
    layer, memory, x = model.decoder.layers[0], model.memory(tokens), model.queries[None]

    def attend(part, q, kv):
        heads = []
        for name, source in (("q", q), ("k", kv), ("v", kv)):
            row = {"q": 0, "k": 1, "v": 2}[name]
            w, b = part.in_proj_weight.chunk(3)[row], part.in_proj_bias.chunk(3)[row]
            heads.append((source @ w.T + b).unflatten(-1, (2, 16)).transpose(1, 2))
        weights = (heads[0] @ heads[1].transpose(-1, -2) / 4).softmax(-1)
        return part.out_proj((weights @ heads[2]).transpose(1, 2).flatten(2))

    y = layer.norm1(x)
    x = x + attend(layer.self_attn, y, y)
    x = x + attend(layer.multihead_attn, layer.norm2(x), memory)
    x = x + layer.linear2(F.relu(layer.linear1(layer.norm3(x))))
    x = model.decoder.norm(x)
    image, regions, boxes = model(tokens)
    assert torch.allclose(image, model.image(x[:, -1]), atol=1e-9)
    assert torch.allclose(regions, F.normalize(model.region(x[:, :-1]).float(), dim=-1), atol=1e-6)
    assert torch.allclose(boxes, model.box(x[:, :-1]).float().sigmoid(), atol=1e-6)


def test_losses_of_a_step():
    recipe = GrainRecipe(boxes=0.4, descriptions=0.6, **SMALL)
    encoder, batch = step(recipe, least=1)
    found = recipe.forward(encoder, batch)
    image, region, predicted = recipe.decoder(image_tokens(encoder.visual, batch["pixels"])[1])
    words = encoder.encode_text(batch["words"].flatten(0, 1)).unflatten(0, batch["labels"].shape)
    expected = grain(
        F.normalize(image, dim=-1), encoder.encode_text(batch["tokens"]), encoder.log_scale.exp(), region, predicted,
        words, centres(batch["boxes"]), batch["labels"], boxes=0.4, descriptions=0.6,
    )  # fmt: skip
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-4)


def test_no_region_in_the_whole_batch():
    recipe = GrainRecipe(**SMALL)
    encoder, _ = step(recipe)
    items = scenes(4)
    for item in items:
        item.columns = {}
    found = recipe.forward(encoder, recipe.batch(items, 0, step_generator(0, 0)))
    assert found["boxes"].item() == found["descriptions"].item() == 0
    torch.stack(list(found.values())).sum().backward()
    assert recipe.decoder.memory.weight.grad.abs().sum() > 0, "the image's query reads on"


def test_without_decoder_it_is_plain_clip(tmp_path):
    plain = trained(tmp_path / "a", ContrastiveRecipe(), scenes(8), steps=2)
    off = GrainRecipe(image_query=False, boxes=0, descriptions=0)
    assert same(plain.encoder, trained(tmp_path / "b", off, scenes(8), steps=2).encoder)


@pytest.mark.slow
def test_regions_are_found_and_named(tmp_path):
    """Images that training did not see; captions say nothing of colours."""
    data, test = scenes(256, least=1, most=2), scenes(16, seed=9, least=1, most=2)
    recipe = "grain(queries=2, layers=2, heads=2, width=32, hidden=64, dropout=0.0)"
    report = trained(tmp_path, recipe, data, steps=250, batch_size=32, lr=3e-3, augment="none")
    assert report.losses["boxes"] < 1.2
    model = Grounded(report.encoder, Decoder.load(tmp_path / "parts.safetensors", heads=2))
    rows = model.images([item.image for item in test])
    assert rows.shape == (16, 32)
    assert torch.allclose(rows.norm(dim=1), torch.ones(16), atol=1e-5)
    right = []
    for item in test:
        best = model.find(item.image, NAMES)
        assert [c for *_, c in best] == sorted((c for *_, c in best), reverse=True)
        right.append(best[0][1] in {r["text"] for r in item.columns["regions"]})
    assert np.mean(right) > 0.8, "one or two of four colours: chance is below a half"


def test_faults(tmp_path):
    for wrong in ({"boxes": -1.0}, {"descriptions": -1.0}):
        with pytest.raises(ClipworksError, match=next(iter(wrong))):
            GrainRecipe(**wrong)
    with pytest.raises(ClipworksError, match="regions"):
        GrainRecipe(queries=0)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(BadWeights, match="holds no decoder"):
        Decoder.load(tmp_path / "a.safetensors")
