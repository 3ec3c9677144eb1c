"""The improved recipe: its weights and pairs, the noise on words, what stays separate."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipworks.errors import ClipworksError
from clipworks.pretraining.improved_baselines import OPERATIONS, WEAK, ImprovedRecipe
from clipworks.pretraining.word_noise import STOP_WORDS, deleted, swapped, with_synonyms, without_stop_words
from clipworks.training.recipe import ContrastiveRecipe

from .small import same, step_of, trained, unit_rows

SMALL = {"hidden": 16, "out": 8}


def smoothed(logits, e):
    """Cross-entropy of rows against (1 - e) onehot + e / B, in numpy."""
    log = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    target = (1 - e) * np.eye(len(logits)) + e / len(logits)
    return -(target * log).sum(1).mean()


def made(n=5, a=2, seed=0):
    make = lambda s, *shape: torch.tensor(unit_rows(*shape, 8, seed=seed + s))  # noqa: E731
    return {"image": make(0, n), "text": make(1, n), "scale": torch.tensor(4.0), "local_image": make(2, n, a),
            "local_text": make(3, n, a), "local_scale": torch.tensor(3.0)}  # fmt: skip


def test_the_loss_written_out():
    f = {k: v.numpy() for k, v in made().items()}
    both = lambda z, e: (smoothed(z, e) + smoothed(z.T, e)) / 2  # noqa: E731
    whole = both(4.0 * f["image"] @ f["text"].T, 0.0)
    local = np.mean([both(3.0 * f["local_image"][:, a] @ f["local_text"][:, b].T, 0.1) for a in (0, 1) for b in (0, 1)])
    found = ImprovedRecipe().losses(made())
    assert found["global"].item() == pytest.approx(whole / 3, abs=1e-12)
    assert found["local"].item() == pytest.approx(2 * local / 3, abs=1e-12)


def test_equal_views_without_smoothing_give_the_global_loss():
    f = made()
    f["local_image"], f["local_text"] = (f[s][:, None].expand(-1, 2, -1) for s in ("image", "text"))
    f["local_scale"] = f["scale"]
    found = ImprovedRecipe(smoothing=0.0).losses(f)
    plain = ContrastiveRecipe().losses({k: f[k] for k in ("image", "text", "scale")})["infonce"]
    assert sum(found.values()).item() == pytest.approx(plain.item(), abs=1e-12)


def test_smoothing_is_bounded_by_the_targets_entropy():
    target = np.full(5, 0.1 / 5)
    target[0] += 0.9
    floor = -(target * np.log(target)).sum()
    f = made()
    f["local_text"] = f["local_image"] = torch.eye(5, 8, dtype=torch.float64)[:, None].expand(-1, 2, -1)
    for scale in (1.0, 4.0, 8.0, 50.0):
        local = ImprovedRecipe().losses({**f, "local_scale": torch.tensor(scale)})["local"].item() * 3 / 2
        assert local >= floor - 1e-9


def test_all_pairs_of_views_count():
    f = made()
    one = ImprovedRecipe().losses(f)["local"]
    assert torch.allclose(one, ImprovedRecipe().losses({**f, "local_image": f["local_image"].flip(1)})["local"])
    mixed = f["local_image"].clone()
    mixed[0] = mixed[0].flip(0)  # one sample's views change places
    assert not torch.allclose(one, ImprovedRecipe().losses({**f, "local_image": mixed})["local"])


def test_no_strong_views_is_plain_clip(tmp_path):
    plain = trained(tmp_path / "a", ContrastiveRecipe("infonce", WEAK))
    recipe = ImprovedRecipe(strong_views=0, stop_words=0.0, **SMALL)
    assert same(plain.encoder, trained(tmp_path / "b", recipe).encoder)


def test_the_scales_learn_apart():
    recipe = ImprovedRecipe(**SMALL)
    encoder, batch = step_of(recipe)
    found = recipe.forward(encoder, batch)
    found["global"].backward(retain_graph=True)
    assert recipe.log_scale.grad is None or recipe.log_scale.grad == 0
    assert encoder.log_scale.grad != 0
    before = encoder.log_scale.grad.clone()
    found["local"].backward()
    assert encoder.log_scale.grad == before
    assert recipe.log_scale.grad != 0


def test_shapes_and_unit_rows():
    recipe = ImprovedRecipe(strong_views=3, **SMALL)
    encoder, batch = step_of(recipe)
    assert batch["strong"].shape[:2] == batch["strong_tokens"].shape[:2] == (8, 3)
    assert not torch.equal(batch["strong"][:, 0], batch["strong"][:, 1])
    f = recipe.features(encoder, batch)
    assert f["local_image"].shape == f["local_text"].shape == (8, 3, 8)
    assert torch.allclose(f["local_text"].norm(dim=-1), torch.ones(8, 3))
    assert f["local_scale"].item() == pytest.approx(10.0, rel=1e-5)
    recipe.log_scale.data.fill_(9.0)
    assert recipe.features(encoder, batch)["local_scale"].item() == pytest.approx(100.0, rel=1e-4)


def test_the_projector_sees_features_before_the_projection():
    recipe = ImprovedRecipe(**SMALL)
    encoder, batch = step_of(recipe)
    recipe.eval()
    pixels, tokens = batch["pixels"], batch["tokens"]
    image, text = recipe.local(encoder, pixels, tokens)
    x = encoder.visual.norm_post(encoder.visual.run(pixels).tokens[:, 0])
    y = torch.stack([encoder.text.norm(encoder.text.run(t[None]).tokens)[0, (t == 2).nonzero()[0, 0]] for t in tokens])
    assert torch.allclose(image, F.normalize(recipe.image_head(x), dim=-1), atol=1e-5)
    assert torch.allclose(text, F.normalize(recipe.text_head(y), dim=-1), atol=1e-5)
    # what is projected is what the encoder itself projects
    assert torch.allclose(encoder.visual.projection(x), encoder.visual(pixels), atol=1e-5)
    assert torch.allclose(encoder.text.projection(y), encoder.text(tokens), atol=1e-5)


def test_training_moves_heads_and_keeps_the_encoders_shape(tmp_path):
    report = trained(tmp_path, ImprovedRecipe(**SMALL))
    assert "log_scale" in report.parts
    assert report.parts["log_scale"].item() != pytest.approx(math.log(10), abs=1e-7)
    assert report.encoder.encode_image(torch.zeros(1, 3, 32, 32)).shape == (1, 32)


def test_the_heads_start_is_a_function_of_the_seed():
    heads = []
    for seed in (0, 0, 1):
        recipe = ImprovedRecipe(seed=seed, **SMALL)
        torch.manual_seed(len(heads))  # whatever the global state is
        step_of(recipe)
        heads.append(recipe.image_head[0].weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_stop_words():
    assert without_stop_words("a photo of the cat") == "photo cat"
    for text in ("of the", "A", ""):
        assert without_stop_words(text) == text
    assert "left" not in STOP_WORDS


def test_swaps_keep_the_words_and_deletion_keeps_one():
    text = "one two three four five six"
    for seed in range(100):
        draw = np.random.default_rng(seed)
        assert sorted(swapped(text, draw).split()) == sorted(text.split())
        assert swapped(text, draw) != text
        assert deleted(text, draw, 0.0) == text
        assert deleted(text, draw, 1.0) in text.split()
        assert set(deleted(text, draw, 0.5).split()) <= set(text.split())
        assert with_synonyms(text, draw, {"two": ["pair"]}) == text.replace("two", "pair")
        assert with_synonyms(text, draw, {}) == text
    assert swapped("one", draw) == "one"
    assert deleted("", draw) == ""


def test_operations_have_their_shares():
    """Synonyms, swaps and deletions leave different traces on one sentence."""
    recipe = ImprovedRecipe(synonyms={"alpha": ["OMEGA"]})
    text = "alpha beta gamma delta epsilon zeta eta theta iota kappa"
    found = [recipe.strong_text(text, np.random.default_rng(i)).split() for i in range(6000)]
    synonym = sum("OMEGA" in words for words in found) / 6000
    swap = sum(sorted(words) == sorted(text.split()) and words != text.split() for words in found) / 6000
    assert abs(synonym - OPERATIONS["synonym"]) < 3.5 * math.sqrt(0.24 / 6000)
    assert abs(swap - OPERATIONS["swap"]) < 3.5 * math.sqrt(0.24 / 6000)
    assert sum(OPERATIONS.values()) == pytest.approx(1)


def test_weak_texts_lose_stop_words_with_their_probability():
    recipe = ImprovedRecipe()
    short = sum(recipe.weak_text("a cat", np.random.default_rng(i)) == "cat" for i in range(3000)) / 3000
    assert abs(short - 0.8) < 3.5 * math.sqrt(0.16 / 3000)


def test_faults():
    for wrong in ({"strong_views": -1}, {"stop_words": 2.0}, {"smoothing": -0.1}):
        with pytest.raises(ClipworksError, match=next(iter(wrong))):
            ImprovedRecipe(**wrong)
