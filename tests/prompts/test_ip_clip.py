"""IP-CLIP from its formula, and the checkable facts of its card."""

import math

import numpy as np
import prompt_toys as toys
import pytest
import torch
import torch.nn.functional as F

from clipworks.errors import ClipworksError
from clipworks.prompts import ip_clip
from clipworks.prompts.ip_clip import IPCLIP, attended, attention, bounded, confident, divergence
from clipworks.prompts.kept import Kept
from clipworks.prompts.parts import frozen


class Watched(IPCLIP):
    """Remembers the last batch."""

    def draw(self, kept, rows, rng):
        self._seen = rows, super().draw(kept, rows, rng)
        return self._seen[1]


def ours(**settings):
    return Watched(toys.NAMES, encoder=toys.encoder(), **{"epochs": 2, "batch_size": 6, **settings})


def domains(n=6):
    x, y = toys.pixels(n)
    return x, y, {"other": x.flip(-1) + 1, "other_y": y}


def context(p, mean, deviation):
    """(2L + 4, width) of one image from its statistics (L, channels), by loops over the blocks."""
    domain, content = [], p["combine.bias"]
    for layer, (m, s) in enumerate(zip(mean, deviation, strict=True)):
        hidden = p[f"style.{layer}.down.weight"] @ ((m + s) / 2) + p[f"style.{layer}.down.bias"]
        domain.append(p[f"style.{layer}.up.weight"] @ hidden + p[f"style.{layer}.up.bias"])
        token = p[f"content.{layer}.weight"] @ m + p[f"content.{layer}.bias"]
        content = content + p["combine.weight"][0, layer] * token
    return torch.stack(domain + domain + [content] * 4)


def class_vectors(model, p, x):
    """(B, C, dim) image by image, class by class."""
    found = []
    for mean, deviation in zip(x["mean"], x["deviation"], strict=True):
        found.append(torch.stack([toys.sentence(model, n, context(p, mean, deviation)) for n in toys.NAMES]))
    return torch.stack(found)


def statistics(model, pixels):
    """Mean and deviation over the tokens of every block, by numpy."""
    layers = model.visual.run(pixels, output_layers=(0, 1, 2)).layers
    tokens = np.stack([layers[i].detach().numpy() for i in range(3)], 1)
    return {"mean": torch.from_numpy(tokens.mean(2)), "deviation": torch.from_numpy(tokens.std(2))}


def test_logits_are_the_formula_image_by_image():
    """Card, facts 4: there are 2L + 4 tokens, 28 for twelve blocks; and no image depends on its batch."""
    x, y, other = domains(4)
    method = ours().fit(x, y, **other)
    model, p = method.encoder, method.learned_
    t = class_vectors(model, p, statistics(model, x))
    want = model.logit_scale * (t * model.images(x)[:, None]).sum(-1)
    np.testing.assert_allclose(method.logits(x), want.detach(), atol=2e-3)
    np.testing.assert_allclose(method.logits(x[2:3]), method.logits(x)[2:3], atol=1e-3)
    assert method._sentences.shared == 1 + 2 * 3 + 4
    twelve = IPCLIP(toys.NAMES)
    twelve.names_ = ["cat"]
    twelve.ready(toys.vit_b16())
    assert twelve._sentences.shared == 1 + 28


def attended_by_hand(layers, images, bank):
    """The attention by torch's own layers, in training mode."""
    dim = images.shape[1]
    made = [torch.nn.Linear(dim, dim // 8), torch.nn.BatchNorm1d(dim // 8), torch.nn.ReLU()]
    made += [torch.nn.Linear(dim // 8, dim // 8), torch.nn.BatchNorm1d(dim // 8), torch.nn.ReLU()]
    made += [torch.nn.Linear(dim // 8, 3 * dim)]
    for place, name in ((0, "first"), (3, "second"), (6, "qkv")):
        made[place].load_state_dict({k: layers[f"{name}.{k}"] for k in ("weight", "bias")})
    project = torch.nn.Sequential(*made)
    q = project(images)[:, :dim]
    k, v = project(bank)[:, dim : 2 * dim], project(bank)[:, 2 * dim :]
    mixed = torch.softmax(0.1 * q @ k.T, 1) @ v
    return toys.unit(images + mixed @ layers["post.weight"].T + layers["post.bias"]).detach()


def bank_by_hand(model, images, labels, size=5):
    """Class means of the most confident zero-shot predictions, one image after the other."""
    words = model.texts([f"a photo of a {n.replace('_', ' ')}." for n in toys.NAMES])
    rows = (model.logit_scale * images @ words.T).softmax(1)
    means = []
    for c in range(3):
        found = [(float(p.max()), i) for i, p in enumerate(rows) if p.argmax() == c and labels[i] in (c, None)]
        chosen = [i for _, i in sorted(found, reverse=True)[:size]]
        means.append(images[chosen].mean(0) if chosen else torch.zeros(16))
    return torch.stack(means)


@pytest.mark.parametrize(("scenario", "weights"), [("specified", (-1, 0.1, 0.01, 1)), ("free", (1, 5, 1, 5))])
def test_the_loss_and_a_step_are_those_of_the_formula(scenario, weights):
    x, y, other = domains()
    method = ours(scenario=scenario, epochs=1, lr=0.01, bank_size=1).fit(x, y, **other)
    model, (rows, batch) = method.encoder, method._seen
    p = {name: value.requires_grad_() for name, value in method.start(model).items()}
    labels, foreign_y = torch.tensor(y)[rows], batch["other_y"]
    halves = [{k: batch[k][part] for k in ("image", "mean", "deviation")} for part in (slice(0, 6), slice(6, 12))]
    torch.testing.assert_close(halves[0]["image"], model.images(x[rows]), atol=1e-5, rtol=0)
    t, t_other = (class_vectors(model, p, half) for half in halves)
    vectors = model.images(x), model.images(other["other"])
    banks = bank_by_hand(model, vectors[0], y, 1), bank_by_hand(model, vectors[1], [None] * 6, 1)
    images = [halves[0]["image"], halves[1]["image"]]
    images += [attended_by_hand(method._attention, images[0], bank) for bank in banks]

    def logits(rows, texts):
        return model.logit_scale * torch.einsum("bd,bcd->bc", rows, texts)

    found = [logits(*pair) for pair in zip(images, (t, t_other, t, t_other), strict=True)]
    ce = [F.cross_entropy(s, foreign_y if i == 1 else labels) for i, s in enumerate(found)]
    tokens = [torch.stack([context(p, m, s)[:3] for m, s in zip(h["mean"], h["deviation"], strict=True)])
              for h in halves]  # fmt: skip
    shares = found[1].softmax(1)
    shares = shares / shares.square().sum(0).sqrt()
    entropy = -(shares * torch.log(shares + 1e-8)).sum() / 6
    q, own = t_other.softmax(1), t.softmax(1)
    kl = (q * (q / own).log()).sum() / 6
    parts = [ce[2], -(tokens[0] - tokens[1]).square().mean(), entropy, -kl]
    assert max(c.item() for c in ce) < 5
    value = ce[0] - ce[1] - ce[3] + sum(w * part for w, part in zip(weights, parts, strict=True))
    np.testing.assert_allclose(method.losses_, [value.item()], rtol=1e-3)
    want = torch.autograd.grad(value, list(p.values()))
    with frozen(model):
        q = {name: v.detach().clone().requires_grad_() for name, v in p.items()}
        method.backward(q, batch, labels)
    for (name, tensor), gradient in zip(q.items(), want, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, atol=1e-4, rtol=1e-2, msg=name)


def test_what_is_maximised_is_bounded():
    """Card, fact 1."""
    for start, slope in ((5.5, 0.0), (4.9, 1.0)):
        loss = torch.tensor(start, requires_grad=True)
        bounded(loss).backward()
        assert loss.grad == slope


def test_domains_that_are_alike_have_nothing_to_keep_apart(monkeypatch):
    """Card, facts 2, 3 and 6: with the same images twice and an attention that adds nothing, all that is left of the
    loss is the entropy and the cross entropy of the enhanced images, which are the images."""
    x, y, _ = domains()
    silent = {name: torch.zeros_like(value) for name, value in attention(16, 0).items()}
    images = toys.encoder().images(x)
    torch.testing.assert_close(attended(silent, images, images[:3]), images)
    monkeypatch.setattr(ip_clip, "attention", lambda dim, seed: silent)
    method = ours(epochs=1).fit(x, y, other=x, other_y=y)
    rows, batch = method._seen
    twin = {k: torch.cat([v[:6], v[:6]]) for k, v in batch.items() if k != "other_y"}
    labels = torch.tensor(y)[rows]
    p, every = method.start(method.encoder), torch.arange(3)
    texts = method.texts(p, twin, every)
    assert divergence(*texts.chunk(2, dim=1)).item() == pytest.approx(0, abs=1e-6)
    assert torch.equal(*method.domain(p, twin).chunk(2))
    ce = F.cross_entropy(method.scores(twin["image"], texts)[:6], labels).detach()
    method._weights = ip_clip.Weights(1.0, 7.0, 0.0, 9.0)
    found = method.loss(p, {**twin, "other_y": labels}, labels, twin["image"], texts)
    assert found.item() == pytest.approx(0, abs=1e-4)  # CE - CE + CE - CE
    method._weights = ip_clip.Weights(0.0, 0.0, 0.0, 0.0)
    found = method.loss(p, {**twin, "other_y": labels}, labels, twin["image"], texts)
    assert found.item() == pytest.approx(-ce.item(), abs=1e-4)


def test_banks():
    """Card, fact 5."""
    draw = torch.Generator().manual_seed(0)
    shares = torch.randn(200, 4, generator=draw).softmax(1)
    labels = torch.randint(4, (200,), generator=draw)
    for given in (labels, None):
        bank, taken = confident(shares, given, 5), torch.zeros(200, dtype=torch.bool)
        for number, rows in enumerate(bank):
            assert len(rows) == 5
            assert (shares[rows].argmax(1) == number).all()
            assert given is None or (labels[rows] == number).all()
            taken[rows] = True
            left = ~taken & (shares.argmax(1) == number) & (labels == number if given is not None else True)
            assert shares[rows, number].min() >= shares[left, number].max()


def test_statistics_know_no_order():
    """Card, fact 4."""
    model, (x, _) = toys.encoder(), toys.pixels(2)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    tiles = F.unfold(x, 8, stride=8)[:, :, order]
    shuffled = F.fold(tiles, (32, 32), 8, stride=8)
    here, positions = IPCLIP().look(model, x), model.visual.positions
    before = positions.detach().clone()
    with torch.no_grad():
        positions[1:] = before[1:][order]
        there = IPCLIP().look(model, shuffled)
        positions.copy_(before)
    assert here
    assert here.keys() == there.keys()
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, atol=1e-5, rtol=1e-4)


def test_only_its_own_moves_and_is_saved(tmp_path):
    """Card, fact 7; without other images, changed views take their place."""
    x, y, other = domains()
    method = ours()
    toys.assert_only_the_learned_moves(method, x, y)
    assert method._weights == ip_clip.SCENARIOS["free"]
    fixed = {name: value.clone() for name, value in method._attention.items()}
    method.fit(x, y, **other)
    assert method._weights == ip_clip.SCENARIOS["specified"]
    assert all(torch.equal(value, fixed[name]) for name, value in method._attention.items())
    toys.assert_file_round_trip(IPCLIP(toys.NAMES, encoder=toys.encoder(), epochs=1).fit(x, y), x, tmp_path / "ip.st")
    layer = (24 * 256 + 256) + (256 * 20 + 20) + (24 * 20 + 20)
    assert sum(v.numel() for v in method.learned_.values()) == 3 * layer + 4
    assert toys.numbers(IPCLIP()) == 8_666_125 == 12 * (768 * 256 + 256 + 256 * 512 + 512 + 768 * 512 + 512) + 13


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("scenario", ["specified", "free"])
def test_it_serves_one_domain_alone(scenario, seed):
    """Card, fact 8: images at their class words in either domain, which differ by a constant in what the layers see.
    With a trained CLIP's scale, 100: at the toy's 14 the style term outweighs what images say, and both domains lose.
    """
    model = toys.encoder.__wrapped__()
    with torch.no_grad():
        model.log_scale.fill_(math.log(100))
    words, draw = model.texts([f"a photo of a {n.replace('_', ' ')}." for n in toys.NAMES]), torch.Generator()
    apart = toys.unit(words - words.mean(0))  # a random text tower says much the same of all
    y = torch.arange(24) % 3

    def kept(shift, seed):
        draw.manual_seed(seed)
        image = toys.unit(apart[y] + 0.05 * torch.randn(24, 16, generator=draw))
        mean, deviation = (shift + 0.02 * torch.randn(24, 3, 24, generator=draw) for _ in range(2))
        parts = {"image": image, "mean": mean, "deviation": deviation}
        return Kept({k: v[:, None] for k, v in parts.items()}, "own", model.fingerprint)

    def zero_shot():
        return [float(((kept(shift, 1).tensors["image"][:, 0] @ words.T).argmax(1) == y).float().mean())
                for shift in (1.0, -1.0)]  # fmt: skip

    assert zero_shot() == [1.0, 1.0]
    method = IPCLIP(toys.NAMES, encoder=model, scenario=scenario, epochs=30, batch_size=12, seed=seed)
    method.fit(kept(1.0, 0), y, other=kept(-1.0, 0), other_y=y)
    at_home, elsewhere = (method.score(kept(shift, 1), y) for shift in (1.0, -1.0))
    assert at_home > 0.9
    assert elsewhere < 0.5
    assert ip_clip.protection(at_home, 1.0, elsewhere, 1.0) > 0.4
    words = model.texts([f"a photo of a {n.replace('_', ' ')}." for n in toys.NAMES])
    assert zero_shot() == [1.0, 1.0]  # the limit of the protection: who has the encoder has zero-shot CLIP


def test_what_cannot_be_used_is_named():
    x, y, other = domains()
    for settings, given, message in (
        ({"scenario": "fre"}, other, "Did you mean 'free'"),
        ({"bank_size": 0}, other, "bank_size"),
        ({"views": 1}, {}, "views must be at least 2"),
        ({}, {"other": x}, "other and other_y must be given together"),
        ({}, {"other": x, "other_y": y[:-1]}, "other_y must hold one label per image"),
        ({}, {"other": x, "other_y": [7] * 6}, "other_y"),
    ):
        with pytest.raises(ClipworksError, match=message):
            ours(**settings).fit(x, y, **given)
    assert math.isclose(ip_clip.protection(1, 1, 0.5, 1), 0.5)


def test_bundled_model():
    def make(names, **settings):
        return IPCLIP(names, epochs=3, lr=0.005, batch_size=4, **settings)

    toys.assert_works_on_the_bundled_model(make)
