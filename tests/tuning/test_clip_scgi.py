"""CLIP-SCGI: inversion and fusion in numpy and at their zeros, losses and cameras by hand, what learns and helps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clipworks.errors import ClipworksError
from clipworks.losses.infonce import infonce
from clipworks.metrics.retrieval import image_retrieval
from clipworks.tuning.clip_scgi import CLIPSCGI, Fusion, IdentityRecipe, Inversion, Sentence, joint_tokens
from clipworks.tuning.identity import batch_hard_triplet, identity_contrast, identity_rows, same_camera
from clipworks.tuning.shots import labelled

from .toys import NAMES, SHAPES, changed, clip_shaped, pixels, quick

both_shapes = pytest.mark.parametrize("shape", SHAPES)


def scgi(**settings):
    return quick(CLIPSCGI, **{"heads": 2, "per_identity": 2, "lr": 1e-3, "module_rate": 1.0, **settings})


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm(x, layer):
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * layer.weight.detach().numpy() + layer.bias.detach().numpy()


def linear(x, layer):
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def attend(x, context, layer, heads):
    q, k, v = (linear(part, one) for part, one in ((x, layer.q), (context, layer.k), (context, layer.v)))
    size, out = q.shape[-1] // heads, []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        logits = q[:, part] @ k[:, part].T / np.sqrt(size)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        out.append(weights / weights.sum(1, keepdims=True) @ v[:, part])
    return linear(np.concatenate(out, 1), layer.out)


def test_the_inversion_is_the_formula():
    torch.manual_seed(0)
    made, x = Inversion(8, 6, 2, 2).double(), noise(3, 5, 8)
    for row, found in zip(x.numpy(), made(x).detach().numpy(), strict=True):
        queries = made.queries.detach().numpy()
        asked = queries + attend(norm(queries, made.norm_queries), norm(row, made.norm_tokens), made.attention, 2)
        inner = torch.from_numpy(linear(norm(asked, made.norm), made.mlp.up))
        asked = asked + linear(F.gelu(inner).numpy(), made.mlp.down)
        parts = []
        for net, value in ((made.whole, row[0]), (made.local, asked.mean(0))):
            for number in (0, 2, 4):
                value = linear(value, net[number])
                value = np.maximum(value, 0) if number < 4 else value
            parts.append(value)
        np.testing.assert_allclose(found, parts[0] + parts[1], atol=1e-10)


def test_the_fusion_attends_from_words_to_tokens():
    torch.manual_seed(0)
    made, words, tokens = Fusion(8, 2, 0).double(), noise(2, 4, 8), noise(2, 5, 8, seed=1)
    for row, image, found in zip(words.numpy(), tokens.numpy(), made(words, tokens).detach().numpy(), strict=True):
        expected = row + attend(norm(row, made.norm_words), norm(image, made.norm_tokens), made.attention, 2)
        np.testing.assert_allclose(found, expected, atol=1e-10)


@both_shapes
def test_with_zeros_the_pseudo_word_is_zero_and_the_fusion_gives_the_sentence(shape):
    """Card: S* = 0 leaves the sentence but for one zero; zero branches give the text's own vector for every image."""
    encoder = scgi()._shaped(SHAPES[shape]())
    with torch.no_grad():
        for net in (encoder.inversion.whole, encoder.inversion.local):
            net[-1].weight.zero_(), net[-1].bias.zero_()
        for part in (encoder.fusion.attention, *(b.attention for b in encoder.fusion.blocks)):
            part.out.weight.zero_(), part.out.bias.zero_()
        for block in encoder.fusion.blocks:
            block.mlp.down.weight.zero_(), block.mlp.down.bias.zero_()
    tokens = joint_tokens(encoder.visual, pixels(3))
    word = encoder.inversion(tokens)
    assert (word == 0).all()
    sentence = Sentence(encoder, "a photo of a", "old oak")
    given = encoder.tokenize("a photo of a * old oak")
    assert torch.equal(sentence.ids, given)
    embedded = encoder.text.tokens(given)
    embedded[:, sentence.slot] = 0
    mask = None if encoder.config.text.pool == "eot" else torch.ones_like(given, dtype=torch.bool)
    eot = encoder.text.end(given) if encoder.config.text.pool == "eot" else None
    expected = encoder.text.run(embeddings=embedded, eot=eot, mask=mask).pooled
    said = sentence.run(encoder, word)
    torch.testing.assert_close(said.pooled, expected.expand(3, -1), atol=1e-6, rtol=0)
    if encoder.config.text.pool == "eot":  # the mean over words and the projection may change places only to rounding
        read = sentence.read(encoder.fusion(sentence.project(encoder, said), tokens))
        torch.testing.assert_close(read, said.pooled, atol=1e-6, rtol=0)
    plain = Sentence(encoder, "a photo of a person")
    torch.testing.assert_close(plain.run(encoder).pooled, encoder.encode_text(encoder.tokenize("a photo of a person"),
                               normalize=False), atol=1e-6, rtol=0)  # fmt: skip


@both_shapes
def test_the_image_tokens_are_all_in_the_joint_space(shape):
    encoder, x = SHAPES[shape](), pixels(2)
    tokens = joint_tokens(encoder.visual, x)
    assert tokens.shape == (2, 17, 8)
    torch.testing.assert_close(F.normalize(tokens[:, 0], dim=1), encoder.encode_image(x))
    out = encoder.visual.run(x)
    one = encoder.visual.projection(encoder.visual.norm_post(out.tokens[:, out.prefix + 3]))
    torch.testing.assert_close(tokens[:, 4], one)
    tall = joint_tokens(encoder.visual, torch.randn(2, 3, 32, 16))  # twice as high: positions are interpolated
    assert tall.shape == (2, 33, 8)


def test_one_identity_each_is_infonce_and_equal_features_give_log_b():
    """Card: with all different it is the symmetric contrast; with equal features log B in each direction."""
    image, text, each = noise(5, 8), noise(5, 8, seed=1), torch.arange(5)
    found = identity_contrast(F.normalize(image, dim=1), F.normalize(text, dim=1), each, 0.1)
    torch.testing.assert_close(found / 2, infonce(F.normalize(image, dim=1), F.normalize(text, dim=1), 10.0))
    same = torch.ones(5, 8, dtype=torch.float64)
    assert identity_contrast(same, same, torch.tensor([0, 0, 1, 2, 2])).item() == pytest.approx(2 * np.log(5))
    labels = [0, 1, 0, 2, 1]
    a, b, total = image.numpy(), text.numpy(), 0.0
    for one, two in ((a, b), (b, a)):
        for i in range(5):
            right = [p for p in range(5) if labels[p] == labels[i]]
            below = sum(np.exp(one[i] @ two[j] / 0.7) for j in range(5))
            total -= sum(np.log(np.exp(one[i] @ two[p] / 0.7) / below) for p in right) / len(right) / 5
    assert identity_contrast(image, text, torch.tensor(labels), 0.7).item() == pytest.approx(total)


def test_batch_hard_triplets_by_hand():
    """Card: four points on a line; no loss where classes are farther apart than the margin."""
    line, labels = torch.tensor([[0.0], [3.0], [4.0], [9.0]]), torch.tensor([0, 0, 1, 1])
    # farthest of one's own: 3, 3, 5, 5; nearest of the other: 4, 1, 1, 6
    expected = (max(0, 3 - 4 + 0.3) + (3 - 1 + 0.3) + (5 - 1 + 0.3) + max(0, 5 - 6 + 0.3)) / 4
    assert batch_hard_triplet(line, labels, 0.3).item() == pytest.approx(expected)
    assert batch_hard_triplet(torch.tensor([[0.0], [0.1], [5.0], [5.2]]), labels).item() == 0
    same = torch.zeros(4, 2, requires_grad=True)
    assert torch.isfinite(torch.autograd.grad(batch_hard_triplet(same, labels), same)[0]).all()


def test_a_batch_has_several_images_of_every_identity():
    labels = [f"{i}" for i in range(9) for _ in range(5)] + ["rare"]
    rows = identity_rows(labels, 12, 4, np.random.default_rng(0))
    counts = np.unique([labels[r] for r in rows], return_counts=True)[1]
    assert counts.tolist() == [4, 4, 4]
    assert len(set(rows.tolist())) >= 9
    few = identity_rows(["a", "b", "b"], 4, 2, np.random.default_rng(0))
    assert sorted(few.tolist()) == [0, 0, 1, 2]


def test_images_of_ones_own_camera_do_not_count():
    """Card: a toy by hand. Query 0 finds its own camera's image first, which is junk; then another, then its own."""
    angle = np.array([0.0, 0.1, 0.2, 0.3, 1.5])
    x = np.stack([np.cos(angle), np.sin(angle)], 1)
    labels, cameras = np.array([1, 1, 2, 1, 2]), np.array([0, 0, 0, 1, 1])
    found = image_retrieval(x, labels, ignore=same_camera(labels, cameras), cutoffs=(1,))
    # 0: [1 junk] 2 no, 3 yes -> 1/2;  1: 2 no, [0 junk], 3 yes -> 1/2;  2: 1, 3, 0 no, 4 yes -> 1/4 (1 and 3 tie);
    # 3: 2 no, 1 yes, 0 yes -> (1/2 + 2/3) / 2;  4: 3, 2 yes -> 1/2
    np.testing.assert_allclose(found.average_precision, [1 / 2, 1 / 2, 1 / 4, 7 / 12, 1 / 2])
    twins = np.array([[1.0, 0], [1.0, 0], [0, 1.0], [0, 1.0]])
    sure = image_retrieval(twins, [1, 1, 2, 2], ignore=same_camera([1, 1, 2, 2], [0, 1, 0, 1]), cutoffs=(1,))
    assert sure.recall[1] == sure.mean_average_precision == 1.0
    apart = same_camera([1, 2], [0, 0], [1, 1, 2], [0, 1, 1])
    assert apart.tolist() == [[True, False, False], [False, False, False]]
    with pytest.raises(ClipworksError, match="cameras must hold one per label"):
        same_camera([1, 2], [0])


def recipe_of(encoder, known):
    x, y = pixels(6), np.array([0, 0, 1, 1, 2, 2])
    shots = labelled(list(x), y, NAMES)
    recipe = IdentityRecipe(shots, known, Sentence(encoder, "a photo of a", "person"), 2, 0.1, 0.3, 1.0)
    recipe.bind(encoder, None)
    return recipe, recipe.batch(shots.items, 0, np.random.default_rng(0))


def test_a_caption_of_ones_changes_nothing_and_the_tower_learns_through_both_ways():
    encoder = scgi()._shaped(clip_shaped())
    recipe, batch = recipe_of(encoder, torch.ones(6, 1, 8))
    tokens = joint_tokens(encoder.visual, batch["pixels"])
    assert torch.equal(tokens * batch["known"][:, None], tokens)
    encoder.text.requires_grad_(False)
    said = recipe.sentence.run(encoder, encoder.inversion(tokens))
    ways = [identity_contrast(tokens[:, 0], said.pooled.detach(), batch["labels"]),
            identity_contrast(tokens[:, 0].detach(), said.pooled, batch["labels"])]  # fmt: skip
    for loss in ways:
        (gradient,) = torch.autograd.grad(loss, encoder.visual.projection.weight, retain_graph=True)
        assert gradient.abs().sum() > 0
    found = recipe.forward(encoder, batch)
    torch.testing.assert_close(found["contrast"], identity_contrast(tokens[:, 0], said.pooled, batch["labels"]))
    sum(found.values()).backward()
    assert all(p.grad is None for p in encoder.text.parameters())
    assert all(p.grad is not None for part in (encoder.inversion, encoder.fusion) for p in part.parameters())


def test_what_is_searched_by_reads_no_caption():
    encoder, x = clip_shaped(), pixels(6)
    y = ["cat", "cat", "dog", "dog", "old oak", "old oak"]
    method = scgi(encoder=encoder).fit(x, y, captions=[f"number {i}" for i in range(6)])
    other = scgi(encoder=encoder).fit(x, y, captions=[f"number {5 - i}" for i in range(6)])
    assert changed(method.encoder_, other.encoder_)  # in training they matter
    made = method.encoder_
    ids = made.tokenize("a photo of a person")
    words = made.text.project(made.text.run(ids).tokens).expand(6, -1, -1)
    fused = made.fusion(words, joint_tokens(made.visual, x))[:, made.text.end(ids)[0]]
    torch.testing.assert_close(method.vectors(x), F.normalize(fused, dim=1).detach(), atol=1e-6, rtol=0)
    torch.testing.assert_close(method.vectors(x, reading="visual"), made.images(x))
    with pytest.raises(ClipworksError, match="Did you mean 'visual'"):
        method.vectors(x, reading="visuals")
    with pytest.raises(ClipworksError, match="heads must divide"):
        scgi(encoder=encoder, heads=3).fit(x, y)


def test_saved_and_loaded_it_searches_alike(tmp_path):
    encoder, x = clip_shaped(), pixels(6)
    method = scgi(encoder=encoder, subject="cat").fit(x, ["cat", "cat", "dog", "dog", "old oak", "old oak"])
    again = CLIPSCGI.load(method.save(tmp_path / "a.safetensors"), encoder=encoder)
    assert torch.equal(again.vectors(x), method.vectors(x))
    assert not hasattr(method.merge(), "fusion")


def people(count, seed):
    """Four noisy images each of some colours."""
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(count), 4)
    looks = rng.normal(0, 1.0, (count, 3))[y][:, :, None, None]
    coarse = rng.normal(0, 1.0, (len(y), 1, 4, 4)).repeat(4, 2).repeat(4, 3)
    return torch.from_numpy((looks + coarse + rng.normal(0, 1.0, (len(y), 3, 16, 16))).astype(np.float32)), y


def test_identities_never_seen_are_found_better_in_both_readings():
    (x, y), (held, answers), names = people(12, 0), people(8, 1), [f"person {i}" for i in range(12)]
    settings = {"lr": 2e-3, "epochs": 40, "batch_size": 24, "per_identity": 4}
    method = scgi(encoder=clip_shaped(), names=names, **settings).fit(x, y)
    start = image_retrieval(clip_shaped().images(held), answers).mean_average_precision
    for reading in ("fused", "visual"):
        found = image_retrieval(method.vectors(held, reading=reading), answers).mean_average_precision
        assert found > start + 0.15, reading
    cameras = np.arange(32) % 2
    ignore = same_camera(answers, cameras)
    expected = image_retrieval(method.vectors(held), answers, ignore=ignore).mean_average_precision
    assert method.retrieval(held, answers, cameras).mean_average_precision == expected


def test_captions_that_were_not_given_name_nobody():
    encoder, x = clip_shaped(), pixels(6)
    one, two = (scgi(encoder=encoder, names=[f"{n} {i}" for i in range(3)]).fit(x, np.arange(6) // 2)
                for n in ("person", "friend"))  # fmt: skip
    assert not changed(one.encoder_, two.encoder_)
    same = ["a photo of a person."] * 6
    given = scgi(encoder=encoder, names=["a", "b", "c"]).fit(x, np.arange(6) // 2, captions=same)
    assert not changed(one.encoder_, given.encoder_)
