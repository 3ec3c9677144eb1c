"""GenCLIP, as read: its branches by hand, the facts of its card, and words learned on one thing for another."""

import numpy as np
import pytest
import torch
from parts import flawed, good, toy

from clipworks.anomaly.adapters import map_loss, states
from clipworks.anomaly.genclip import GenCLIP
from clipworks.errors import ClipworksError
from clipworks.metrics.anomaly import pixel_auroc


def lot(seed=1, n=8):
    images, masks = flawed(n, seed)
    return torch.cat([good(n, seed + 50), images]), np.concatenate([np.zeros_like(masks), masks])


def maps(detector, images):
    return np.stack([m.heat for m in detector.fit(None).score_maps(images)])


def test_query_branch_by_hand():
    encoder, x = toy(), good(2)
    detector = GenCLIP(encoder, tokens=2, vision=0.0).fit(None)
    context = detector.prompts_.states.context
    ids = encoder.tokenize(["good object", "damaged object"])
    embedded = encoder.text.tokens(ids)
    rows = torch.cat([embedded[:, :1], context, embedded[:, 1:]], 1)
    text = encoder.encode_text(embeddings=rows, eot=torch.tensor([5, 5])).detach()
    output = encoder.visual.run(x, output_layers=(0, 1))
    layers = [torch.nn.functional.normalize(encoder.visual.project(output.layers[i][:, 1:]), dim=-1) for i in (0, 1)]
    heat = np.mean([(z @ text.T / 0.07).softmax(-1)[..., 1].detach().numpy() for z in layers], 0)
    whole = (encoder.images(x) @ text.T / 0.07).softmax(-1)[:, 1].numpy()
    np.testing.assert_allclose(detector.score(x), (whole + heat.max(1)) / 2, atol=1e-5)


def test_without_the_vision_branch_names_and_images_do_not_enter_the_words():
    """Card, fact 1."""
    x = flawed(2)[0]
    first, second = (GenCLIP(toy(), name=n, vision=0.0, tokens=2, keep_names=True) for n in ("screw", "wooden board"))
    np.testing.assert_array_equal(maps(first, x), maps(second, x))
    assert first._query(first.prompts_).shape == (2, 8)


def test_branches_are_averaged():
    """Card, fact 3."""
    x = flawed(2)[0]
    only = [maps(GenCLIP(toy(), vision=v, tokens=2), x) for v in (0.0, 1.0)]
    np.testing.assert_allclose(maps(GenCLIP(toy(), vision=0.5, tokens=2), x), np.mean(only, 0), atol=1e-6)


def test_the_name_filter():
    """Card, fact 4."""
    x = flawed(4)[0]

    def with_name(name, keep):
        return maps(GenCLIP(toy(), name=name, keep_names=keep, vision=1.0, tokens=2), x)

    np.testing.assert_array_equal(with_name("screw", False), with_name("wooden board", False))
    assert np.abs(with_name("screw", True) - with_name("wooden board", True)).max() > 1e-6
    np.testing.assert_array_equal(with_name("screw", False), with_name("object", True))
    detector = GenCLIP(toy(), name="screw", tokens=2, vision=1.0).fit(None)
    named = detector._described(x)["named"].numpy()
    v, t = detector._model.images(x), detector._model.texts(["a photo of a screw", "a photo of an object"])
    assert named.tolist() == (v @ t[0] > v @ t[1]).tolist()
    chosen = np.where(named[:, None, None], with_name("screw", True), with_name("screw", False))
    np.testing.assert_allclose(maps(detector, x), chosen, atol=1e-6)


def test_equal_and_swapped_texts():
    """Card, fact 5."""
    z, text = torch.randn(2, 3, 3, 8), torch.randn(2, 8)
    np.testing.assert_allclose(states(z, text[[0, 0]]), 0.5)
    torch.testing.assert_close(states(z, text) + states(z, text.flip(0)), torch.ones(2, 3, 3))
    torch.testing.assert_close(states(z, text.expand(2, 2, 8)), states(z, text))


def test_who_is_trained():
    """Card, fact 7."""
    encoder = toy()
    detector = GenCLIP(encoder, tokens=2).fit(None)
    described, prompts = detector._described(good(2)), detector.prompts_
    mask = torch.zeros(2, 6, 6)
    named = dict(prompts.named_parameters())
    for text, expected in ((detector._query(prompts), {"states"}),
                           (detector._vision(prompts, described), {"states", "maps"})):  # fmt: skip
        slopes = torch.autograd.grad(map_loss(states(described["layer0"], text), mask), list(named.values()),
                                     allow_unused=True)  # fmt: skip
        assert {n.split(".")[0] for n, g in zip(named, slopes, strict=True) if g is not None} == expected
    before = encoder.fingerprint
    GenCLIP(encoder, tokens=2, epochs=1).train(*lot())
    assert encoder.refresh() == before
    assert all(p.grad is None for p in encoder.parameters())


def category(seed, n):
    """n images of one texture, half with a square of fixed colour added, and masks."""
    draw = torch.Generator().manual_seed(seed)
    texture = 0.2 * torch.randn(3, 24, 24, generator=draw)
    images = texture + 0.1 * torch.randn(n, 3, 24, 24, generator=draw)
    masks = torch.zeros(n, 24, 24, dtype=torch.bool)
    for i in range(0, n, 2):
        y, x = (4 * torch.randint(0, 5, (2,), generator=draw)).tolist()
        images[i, 0, y : y + 8, x : x + 8] += 4
        masks[i, y : y + 8, x : x + 8] = True
    return images, masks.numpy()


def test_words_learned_on_some_things_find_defects_of_another():
    """Card, fact 8: categories A to C for training, D for the test; defects are shifts along one direction."""
    images, masks = (np.concatenate(parts) for parts in zip(*(category(s, 8) for s in (1, 2, 3)), strict=True))
    # in four dimensions, where words of the toy's random tower can point in the direction of the defects
    detector = GenCLIP(toy(dim=4), tokens=4, epochs=80, batch_size=24, lr=0.1).train(torch.from_numpy(images), masks)
    assert detector.history_[-1] < 0.8 * detector.history_[0]
    other, truth = category(4, 12)
    assert pixel_auroc(maps(detector, other), truth) > 0.9
    detector.vision = 0.0
    assert pixel_auroc(maps(detector, other), truth) > 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vision": 2}, "vision must lie in"),
        ({"name": ""}, "name must be the object in words"),
        ({"tokens": 0}, "tokens must lie in"),
        ({"layers": [9]}, r"^layers must name layers from 0 to \d .* Got 9"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ClipworksError, match=message):
        GenCLIP(toy(), **settings).fit(good(2))


def test_training_needs_both_kinds():
    with pytest.raises(ClipworksError, match="Got 0 defective of 16"):
        GenCLIP(toy()).train(lot()[0], lot()[1] * 0)
