"""Caption pools: which text is drawn how often, for which image, and what several texts per image cost."""

import itertools

import numpy as np
import pytest
import torch

from clipworks.errors import ClipworksError
from clipworks.pretraining.caption_pools import CaptionPools, draw_captions, read_pools, split_sentences
from clipworks.training.recipe import ContrastiveRecipe
from training.toy import tiny

from .small import items, same, step_of, trained, unit_rows

POOL = ["the own caption", "first rewrite here", "second rewrite here", "third rewrite here"]


def often(draws, **options):
    found = [draw_captions(POOL, np.random.default_rng(i), **options) for i in range(draws)]
    return {text: sum(text in f for f in found) / draws for text in POOL}


def test_uniform_over_all_texts():
    for share in often(10_000).values():
        assert abs(share - 0.25) < 3 * np.sqrt(0.25 * 0.75 / 10_000)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
def test_the_own_caption_has_its_probability(p):
    shares = often(4000, original=p)
    assert abs(shares[POOL[0]] - p) <= 3.5 * np.sqrt(p * (1 - p) / 4000)
    for text in POOL[1:]:
        assert abs(shares[text] - (1 - p) / 3) < 0.035


def test_short_rewrites_give_way():
    found = {draw_captions(["own caption", "one", ""], np.random.default_rng(i))[0] for i in range(200)}
    assert found == {"own caption"}
    assert "one" in {draw_captions(["own caption", "one"], np.random.default_rng(i), min_words=1)[0] for i in range(50)}


def test_several_without_repetition_as_far_as_there_are_enough():
    for seed in range(50):
        draw = np.random.default_rng(seed)
        assert sorted(draw_captions(POOL, draw, count=4)) == sorted(POOL)
        with_own = draw_captions(POOL, draw, count=3, keep_original=True)
        assert with_own[0] == POOL[0]
        assert len({*with_own}) == 3
        more = draw_captions(POOL, draw, count=6, keep_original=True)
        assert more[0] == POOL[0]
        assert set(more[1:4]) == set(POOL[1:])
        assert draw_captions(POOL[:1], draw, count=3) == POOL[:1] * 3
        assert draw_captions(POOL[:1], draw, count=2, original=0.0) == POOL[:1] * 2


def test_the_draw_is_by_sample_and_step():
    """Over two steps with p = .5 about half of the images change their source, and within a step they differ."""
    recipe = CaptionPools({f"p{i}": [f"rewrite of {i}"] for i in range(400)}, original=0.5)
    data = items(400)
    chosen = [recipe.texts(data, np.random.default_rng([0, step]).spawn(400)) for step in range(2)]
    rewritten = np.array([[text.startswith("rewrite") for text in texts] for texts in chosen])
    assert abs(rewritten.mean() - 0.5) < 3.5 * np.sqrt(0.25 / 800)
    assert abs((rewritten[0] != rewritten[1]).mean() - 0.5) < 3.5 * np.sqrt(0.25 / 400)


def test_an_image_only_sees_texts_of_its_own_key(tmp_path):
    for style in ("a", "b"):
        (tmp_path / style).write_text("".join(f"{style} says {i}\n" for i in range(16)))
    pools = read_pools([f"p{i}" for i in range(16)], tmp_path / "a", tmp_path / "b")
    data = items(16)
    del data[3], data[7]  # broken images are left out, and nothing shifts
    recipe = CaptionPools(pools, original=0.0)
    for step in range(5):
        texts = recipe.texts(data, np.random.default_rng(step).spawn(len(data)))
        assert [text.split()[-1] for text in texts] == [item.key[1:] for item in data]


def test_files_must_fit(tmp_path):
    file = tmp_path / "rewrites"
    file.write_text("one\ntwo\n")
    assert read_pools(["a", "b"], file) == {"a": ["one"], "b": ["two"]}
    with pytest.raises(ClipworksError, match=r"a line per key, 3 in all. It has 2"):
        read_pools(["a", "b", "c"], file)
    with pytest.raises(ClipworksError, match="keys must be distinct"):
        read_pools(["a", "a"], file)


@pytest.mark.parametrize(
    "recipe", [CaptionPools(), CaptionPools({"p0": ["never drawn here"]}, original=1.0),
               CaptionPools({f"p{i}": [] for i in range(16)})],
)  # fmt: skip
def test_without_other_captions_it_is_plain_clip_bit_for_bit(tmp_path, recipe):
    """Own draws of a sample come after those of its pixels, so the plain view is the same."""
    plain = trained(tmp_path / "a", ContrastiveRecipe())
    pooled = trained(tmp_path / "b", recipe)
    assert same(plain.encoder, pooled.encoder)
    assert sum(p.numel() for p in pooled.encoder.parameters()) == sum(p.numel() for p in tiny().parameters())


def test_rewrites_equal_to_the_original_change_nothing(tmp_path):
    pools = {item.key: [item.caption] * 4 for item in items()}
    plain = trained(tmp_path / "a", ContrastiveRecipe())
    assert same(plain.encoder, trained(tmp_path / "b", CaptionPools(pools)).encoder)


def oracle(image, texts, scale):
    """Mean over slots of the mean of both cross-entropies, in numpy."""

    def cross_entropy(logits):
        logits = logits - logits.max(1, keepdims=True)
        return -(np.diag(logits) - np.log(np.exp(logits).sum(1))).mean()

    slots = [scale * image @ texts[:, k].T for k in range(texts.shape[1])]
    return np.mean([(cross_entropy(s) + cross_entropy(s.T)) / 2 for s in slots])


def test_several_texts_are_the_mean_of_their_losses():
    image, texts = unit_rows(5, 8), unit_rows(5, 3, 8, seed=1)
    features = {"image": torch.tensor(image), "text": torch.tensor(texts), "scale": torch.tensor(7.0)}
    found = CaptionPools(texts_per_image=3).losses(features)
    assert found["infonce"].item() == pytest.approx(oracle(image, texts, 7.0), abs=1e-12)


def test_equal_texts_give_loss_and_gradient_of_one():
    pools = {item.key: [item.caption] for item in items()}
    grads = []
    for count in (1, 3):
        encoder, batch = step_of(CaptionPools(pools, texts_per_image=count))
        encoder = encoder.double()  # batches of another size are summed in another order
        recipe = CaptionPools(pools, texts_per_image=count)
        assert batch["tokens"].ndim == (2 if count == 1 else 3)
        loss = recipe.forward(encoder, batch)["infonce"]
        loss.backward()
        grads.append((loss.item(), [p.grad for p in encoder.parameters() if p.grad is not None]))
    assert grads[0][0] == pytest.approx(grads[1][0], abs=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads[0][1], grads[1][1], strict=True))


def test_tokens_of_one_image_stay_together():
    words = ["red", "green", "blue", "yellow", "square", "cross", "photo", "the"]
    pools = {f"p{i}": [f"of {words[i]}"] for i in range(8)}
    encoder, batch = step_of(CaptionPools(pools, texts_per_image=2, keep_original=True))
    for i in range(8):
        ids = encoder.tokenize([items()[i].caption, f"of {words[i]}"])
        width = ids.shape[1]
        assert torch.equal(batch["tokens"][i, :, :width], ids)


def test_columns_and_missing_ones():
    data = items(4, other=[f"text number {i}" for i in range(4)], more=[["list a", "list b"]] * 4)
    recipe = CaptionPools(columns=["other", "more"])
    assert recipe.captions_of(data[2])[1:] == ["text number 2", "list a", "list b"]
    with pytest.raises(ClipworksError, match=r"none named 'othr'. Did you mean 'other'"):
        CaptionPools(columns=["othr"]).captions_of(data[0])
    for wrong in ({"original": 1.5}, {"texts_per_image": 0}):
        with pytest.raises(ClipworksError, match=next(iter(wrong))):
            CaptionPools(**wrong)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("A dog runs. It is brown.", ["A dog runs.", "It is brown."]),
        ("Weighs 2.5 kg today", ["Weighs 2.5 kg today"]),
        ("Dr. Smith and Mrs. J. Doe smile. They wave!", ["Dr. Smith and Mrs. J. Doe smile.", "They wave!"]),
        ("first line\nsecond line\n\n", ["first line", "second line"]),
        ("Yes. A cat sits.", ["A cat sits."]),
        ("Cat.", ["Cat."]),
        ("  ", []),
    ],
)
def test_sentences(text, pieces):
    assert split_sentences(text) == pieces


def test_sentences_enter_the_pool_one_by_one():
    recipe = CaptionPools({"p0": ["A cat sits. A dog runs."]}, sentences=True)
    assert recipe.captions_of(items(1)[0])[1:] == ["A cat sits.", "A dog runs."]


def test_new_words_are_learned_only_from_the_pool(tmp_path):
    """Captions with one vocabulary, rewrites with another: words of the other name the class only if it was read."""
    other = {"red": "photo", "green": "of", "blue": "the", "yellow": "a"}  # words that no caption contains alone
    data = items(64)
    colours = [item.caption.split()[-2] for item in data]
    for item, colour in zip(data, colours, strict=True):
        item.caption = colour
    pools = {item.key: [other[colour]] for item, colour in zip(data, colours, strict=True)}
    right = []
    for recipe in (CaptionPools(min_words=1), CaptionPools(pools, min_words=1)):
        out = tmp_path / str(len(right))
        encoder = trained(out, recipe, data, steps=60, batch_size=16, lr=3e-3).encoder
        scores = encoder.images([item.image for item in data]) @ encoder.texts(list(other.values())).T
        truth = torch.tensor([list(other).index(colour) for colour in colours])
        right.append((scores.argmax(1) == truth).float().mean().item())
    assert right[1] > 0.75
    assert right[1] > right[0] + 0.25


def test_a_mixture_learns_names_and_looks(tmp_path):
    """Names of classes, half of them wrong, against descriptions without names: each alone knows one vocabulary."""
    name_of = {"red": "photo", "green": "of", "blue": "the", "yellow": "a"}
    rng = np.random.default_rng(0)
    data = items(64)
    colours = [item.caption.split()[-2] for item in data]
    for item, colour in zip(data, colours, strict=True):
        item.caption = name_of[colour] if rng.random() < 0.5 else str(rng.choice(list(name_of.values())))
    pools = {item.key: [colour] for item, colour in zip(data, colours, strict=True)}
    truth = torch.tensor([list(name_of).index(colour) for colour in colours])
    right = {}
    for p in (1.0, 0.5, 0.0):
        recipe = CaptionPools(pools, original=p, min_words=1)
        encoder = trained(tmp_path / str(p), recipe, data, steps=100, batch_size=16, lr=3e-3).encoder
        image = encoder.images([item.image for item in data])
        for what, words in (("names", list(name_of.values())), ("looks", list(name_of))):
            guess = (image @ encoder.texts(words).T).argmax(1)
            right[p, what] = (guess == truth).float().mean().item()
    assert right[0.5, "looks"] > right[1.0, "looks"] + 0.2
    assert right[0.5, "names"] > right[0.0, "names"] + 0.2


def test_settings_tell_runs_apart():
    shown = [repr(CaptionPools(original=p, sentences=s).settings) for p, s in itertools.product((None, 0.5), (0, 1))]
    assert len(set(shown)) == 4
