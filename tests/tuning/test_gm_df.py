"""GM-DF: experts, domain norm and losses by numpy, the distance against scipy, the meta step on a quadratic."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from clipworks.cli.main import main
from clipworks.encoders.layers import MLP
from clipworks.encoders.loading import save
from clipworks.errors import ClipworksError
from clipworks.tuning.domains import DomainNorm, ExpertAdapter, hidden_error, in_domains, patch_pixels
from clipworks.tuning.gm_df import GMDF, MetaRecipe
from clipworks.tuning.meta import bures, covariance, gaussian_distance, inner_step, with_parameters
from clipworks.tuning.shots import labelled
from clipworks.zeroshot.classifier import class_vectors

from .toys import NAMES, SHAPES, TEMPLATE, changed, clip_shaped, coloured, pixels, quick

both_shapes = pytest.mark.parametrize("shape", SHAPES)
PLACES = ["lab", "street"]


def gmdf(**settings):
    return quick(GMDF, **{"hidden": 8, "domain_size": 4, "lr": 1e-3, "domains": PLACES, **settings})


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stirred(module, seed=0):
    """All that begins at zero gets values."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn(p.shape, generator=draw, dtype=p.dtype)
    return module


@both_shapes
def test_at_the_beginning_the_tower_is_that_of_clip(shape):
    """Card: experts with zero last layer add nothing; without W_g and W_b the norm is the plain one, in all domains."""
    encoder = SHAPES[shape]()
    made = gmdf()._shaped(encoder)
    x = pixels(4)
    for domains in (None, torch.tensor([0, 1, 0, 1])):
        if domains is None:
            found = made.encode_image(x)
        else:
            with in_domains(made, domains):
                found = made.encode_image(x)
        torch.testing.assert_close(found, encoder.encode_image(x), atol=1e-6, rtol=0)
    assert made.visual.norm_post.current is None


def test_the_experts_are_weighed_by_attention_among_their_answers():
    torch.manual_seed(0)
    made = stirred(ExpertAdapter(MLP(6, 12, "gelu"), 3, 5).double())
    x = noise(2, 4, 6)
    answers = [e.down(F.gelu(e.up(x))).detach().numpy() for e in made.experts]
    together = np.concatenate(answers, -1)
    q, k = (made.router[name] for name in "qk")
    query = together @ q.weight.detach().numpy().T + q.bias.detach().numpy()
    logits = np.stack([(query * (a @ k.weight.detach().numpy().T + k.bias.detach().numpy())).sum(-1) for a in answers])
    weights = np.exp(logits / np.sqrt(5))
    weights /= weights.sum(0)
    expected = made.plain(x).detach().numpy() + sum(w[..., None] * a for w, a in zip(weights, answers, strict=True))
    np.testing.assert_allclose(made(x).detach().numpy(), expected, atol=1e-10)
    shares = made.weights(torch.stack([torch.from_numpy(a) for a in answers], -2))
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 4, dtype=torch.float64))
    for expert in made.experts:
        expert.load_state_dict(made.experts[0].state_dict())
    torch.testing.assert_close(made(x), made.plain(x) + made.experts[0](x))  # equal experts: that one's answer


def test_the_norm_knows_the_domain():
    plain = stirred(nn.LayerNorm(6).double())
    made = stirred(DomainNorm(plain, 3, 4).double(), seed=1)
    x, domains = noise(2, 5, 6), torch.tensor([2, 0])
    made.current = domains
    a = x.numpy()
    scaled = (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + 1e-5)
    e = made.domain.table.detach().numpy()
    for rows, index in ((scaled, domains.tolist()), (scaled[:, 0], domains.tolist())):
        gain = plain.weight.detach().numpy() + e[index] @ made.domain.gain.weight.detach().numpy().T
        shift = plain.bias.detach().numpy() + e[index] @ made.domain.shift.weight.detach().numpy().T
        if rows.ndim == 3:
            gain, shift = gain[:, None], shift[:, None]
        given = x if rows.ndim == 3 else x[:, 0]
        np.testing.assert_allclose(made(given).detach().numpy(), rows * gain + shift, atol=1e-10)
    made.current = None  # of unknown origin: the mean of the embeddings
    mean = e.mean(0)
    gain = plain.weight.detach().numpy() + made.domain.gain.weight.detach().numpy() @ mean
    shift = plain.bias.detach().numpy() + made.domain.shift.weight.detach().numpy() @ mean
    np.testing.assert_allclose(made(x).detach().numpy(), scaled * gain + shift, atol=1e-10)


def test_only_hidden_patches_count_and_half_are_hidden():
    x = pixels(2)
    cells = patch_pixels(x, (4, 4))
    assert cells.shape == (2, 16, 48)
    np.testing.assert_array_equal(cells[1, 6].view(3, 4, 4), x[1, :, 4:8, 8:12])
    seen = torch.tensor([[0, 3, 5], [1, 2, 4]])
    found = torch.randn(2, 16, 48)
    other = found.clone()
    other[0, [0, 3, 5]] += 7.0
    other[1, [1, 2, 4]] -= 3.0
    assert torch.equal(hidden_error(found, cells, seen), hidden_error(other, cells, seen))
    hidden = [[i for i in range(16) if i not in row] for row in seen.tolist()]
    square = [((found[b, hidden[b]] - cells[b, hidden[b]]) ** 2).mean() for b in range(2)]
    torch.testing.assert_close(hidden_error(found, cells, seen), torch.stack(square).mean())
    _, recipe, batch = recipe_of(clip_shaped())
    assert batch["seen"].shape == (4, 8)
    assert all(len(set(row.tolist())) == 8 for row in batch["seen"])
    with pytest.raises(ClipworksError, match="images must divide"):
        patch_pixels(x, (3, 4))
    assert recipe.decoder(torch.randn(2, 8, 16)).shape == (2, 16, 48)


def test_the_distance_of_gaussians():
    """Card: against scipy, symmetric, 0 for equal statistics, |m - n|^2 for equal covariances, the diagonal form."""
    one, two = noise(9, 4), 1.5 * noise(12, 4, seed=1) + 0.3
    c, d = covariance(one), covariance(two)
    ridge = 1e-5 * np.eye(4)
    np.testing.assert_allclose(c.numpy(), np.cov(one.numpy().T, bias=True) + ridge, atol=1e-12)
    root = scipy.linalg.sqrtm(c.numpy() @ d.numpy()).real
    expected = np.trace(c.numpy() + d.numpy() - 2 * root)
    assert bures(c, d).item() == pytest.approx(expected, rel=1e-8)
    assert bures(d, c).item() == pytest.approx(expected, rel=1e-8)
    gap = ((one.mean(0) - two.mean(0)) ** 2).sum().item()
    assert gaussian_distance(one, two, diagonal=False).item() == pytest.approx(gap + expected, rel=1e-8)
    for diagonal in (True, False):
        assert gaussian_distance(one, one.flip(0), diagonal=diagonal).item() == pytest.approx(0, abs=1e-7)
        assert gaussian_distance(one, one + 2.0, diagonal=diagonal).item() == pytest.approx(16.0, rel=1e-6)
    spreads = [np.sqrt(rows.numpy().var(0) + 1e-5) for rows in (one, two)]
    by_hand = gap + ((spreads[0] - spreads[1]) ** 2).sum()
    assert gaussian_distance(one, two).item() == pytest.approx(by_hand, rel=1e-9)
    few = noise(3, 6, seed=2).requires_grad_()  # fewer rows than dimensions: the ridge keeps the derivative finite
    assert torch.isfinite(torch.autograd.grad(gaussian_distance(few, noise(3, 6), diagonal=False), few)[0]).all()


def test_the_meta_step_on_a_quadratic():
    """Card: second order gives (I - b H) g_B at the moved point, first order g_B alone."""
    h = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    target, theta, b = noise(2), noise(2, seed=1).requires_grad_(), 0.1
    for second in (True, False):
        moved = inner_step(0.5 * theta @ h @ theta, {"theta": theta}, b, second)["theta"]
        torch.testing.assert_close(moved, theta - b * h @ theta)
        (found,) = torch.autograd.grad((moved - target).square().sum(), theta)
        slope = 2 * (moved - target).detach()
        torch.testing.assert_close(found, (torch.eye(2, dtype=torch.float64) - b * h) @ slope if second else slope)


def test_a_module_keeps_its_parameters():
    layer = nn.Linear(2, 1, bias=False)
    before = layer.weight.clone()
    found = with_parameters(layer, {"weight": torch.ones(1, 2)}, lambda m, x: m(x), torch.tensor([[3.0, 4.0]]))
    assert found.item() == 7
    assert torch.equal(layer.weight, before)


def recipe_of(encoder, weights=(0.5, 0.3, 0.1), inner=1e-2, second=True, double=False):
    made = gmdf()._shaped(encoder)
    x, y = pixels(8), np.array([0, 1, 2, 0, 1, 2, 0, 1])
    made, x = (made.double(), x.double()) if double else (made, x)
    shots = labelled(list(x), y, NAMES)
    vectors = class_vectors(NAMES, made, templates=TEMPLATE).to(made.log_scale.dtype)
    recipe = MetaRecipe(shots, np.arange(8) % 2, vectors, ("a", "face showing forgery clues"), mask_ratio=0.5,
                        weights=weights, diagonal=True, inner_lr=inner, second_order=second)  # fmt: skip
    recipe.bind(made, None)
    return made, recipe, recipe.batch(shots.items[:4], 0, np.random.default_rng(0))


def test_a_batch_is_half_of_one_domain_and_half_of_another():
    _, recipe, batch = recipe_of(clip_shaped())
    domains = batch["domains"].tolist()
    assert sorted({*domains[:2]} | {*domains[2:]}) == [0, 1]
    assert len({*domains[:2]}) == len({*domains[2:]}) == 1
    recipe.codes = np.zeros(8, int)
    alone = recipe.batch(recipe.shots.items[:4], 0, np.random.default_rng(0))
    assert alone["domains"].tolist() == [0] * 4
    assert len(alone["pixels"].flatten(1).unique(dim=0)) == 4  # two halves without a common image


def test_the_losses_are_the_formula():
    encoder, recipe, batch = recipe_of(clip_shaped(), inner=0.0, double=True)
    stirred(encoder.visual.norm_post.domain, seed=3)
    found = recipe.forward(encoder, batch)
    table = encoder.visual.norm_post.domain.table.detach().numpy()
    with in_domains(encoder, batch["domains"]):
        u = encoder.encode_image(batch["pixels"]).detach().numpy()
    expected = {"classes": 0.0, "sentences": 0.0}
    words = []
    for c in range(3):
        for d in range(2):
            row = encoder.tokenize("a * * face showing forgery clues")
            vectors = encoder.text.tokens(row).detach().clone()
            vectors[0, 2], vectors[0, 3] = recipe.domain_tokens[d].detach(), recipe.class_tokens[c].detach()
            words.append(encoder.encode_text(embeddings=vectors, eot=encoder.text.end(row))[0].detach().numpy())
    heat = 0.07 + 0.01 * np.linalg.norm(table[batch["domains"]], axis=1, keepdims=True)
    for half in (slice(0, 2), slice(2, 4)):
        for name, logits, right in (
            ("classes", encoder.logit_scale * u @ recipe.head.weight.detach().numpy().T, batch["labels"]),
            ("sentences", u @ np.stack(words).T / heat, batch["labels"] * 2 + batch["domains"]),
        ):
            chance = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            expected[name] -= chance[half][np.arange(2), right[half].numpy()].mean()
    assert found["classes"].item() == pytest.approx(expected["classes"], rel=1e-6)
    assert found["sentences"].item() == pytest.approx(0.3 * expected["sentences"], rel=1e-6)
    apart = gaussian_distance(torch.from_numpy(u[:2]), torch.from_numpy(u[2:]))
    assert found["alignment"].item() == pytest.approx(0.1 * apart.item(), rel=1e-6)


def test_without_an_inner_step_it_is_joint_training_and_with_one_the_second_domain_sees_moved_experts():
    grads = {}
    for inner, second in ((0.0, True), (1e-12, True), (0.5, True), (0.5, False)):
        encoder, recipe, batch = recipe_of(clip_shaped(), weights=(0.0, 0.0, 0.0), inner=inner, second=second,
                                           double=True)  # fmt: skip
        stirred(encoder.visual.blocks[0].mlp, seed=2)
        experts = {n: p for n, p in encoder.named_parameters() if ".experts." in n or ".router." in n}
        loss = sum(recipe.forward(encoder, batch).values())
        found = torch.autograd.grad(loss, list(experts.values()))
        grads[inner, second] = torch.cat([g.flatten() for g in found])
        if not inner:
            parts = [{k: v[s] for k, v in batch.items()} for s in (slice(2), slice(2, 4))]
            joint = sum(recipe.judge(encoder, part)[1]["classes"] for part in parts)
            plain = torch.autograd.grad(joint, list(experts.values()))
            torch.testing.assert_close(grads[inner, second], torch.cat([g.flatten() for g in plain]))
            own = recipe.judge(encoder, parts[0])[1]["classes"]
            slopes = torch.autograd.grad(own, list(experts.values()))
            moved = {n: p - 0.5 * g for (n, p), g in zip(experts.items(), slopes, strict=True)}
            apart = torch.func.functional_call(_Loss(encoder, recipe), {f"encoder.{n}": p for n, p in moved.items()},
                                               (parts[1],))  # fmt: skip
            first_order = torch.autograd.grad(own_again := recipe.judge(encoder, parts[0])[1]["classes"],
                                              list(experts.values()))  # fmt: skip
            after = torch.autograd.grad(apart, list(moved.values()), allow_unused=True)
            expected = torch.cat([(a + b).flatten() for a, b in zip(first_order, after, strict=True)])
            assert own_again.item() == own.item()
    torch.testing.assert_close(grads[1e-12, True], grads[0.0, True])
    torch.testing.assert_close(grads[0.5, False], expected)
    assert not torch.allclose(grads[0.5, True], grads[0.5, False])


class _Loss(nn.Module):
    def __init__(self, encoder, recipe):
        super().__init__()
        self.encoder, self.judge = encoder, recipe.judge

    def forward(self, part):
        return self.judge(self.encoder, part)[1]["classes"]


def test_only_what_is_new_learns(tmp_path):
    encoder, (x, y) = clip_shaped(), coloured()
    method = gmdf(encoder=encoder, inner_lr=1e-2).fit(x, y, domains=[PLACES[i % 2] for i in range(12)])
    start = method._shaped(encoder)
    moved = changed(start, method.encoder_)
    assert {n for n in moved if ".experts." in n}
    assert "visual.norm_post.domain.gain.weight" in moved
    assert all(".experts." in n or ".router." in n or ".domain." in n for n in moved)
    again = GMDF.load(method.save(tmp_path / "a.safetensors"), encoder=encoder)
    np.testing.assert_array_equal(again.logits(x), method.logits(x))
    for settings, told, says in (
        ({}, ["lab"] * 3, "domains must name a source for every image"),
        ({}, ["lba"] * 12, "Did you mean 'lab'"),
        ({"sentence": "a face"}, None, "sentence must be the words before and behind"),
        ({"mask_ratio": 1.0}, None, "mask_ratio must lie"),
    ):
        with pytest.raises(ClipworksError, match=says):
            gmdf(encoder=encoder, **settings).fit(x, y, domains=told)


def test_a_table_tells_the_domains_from_a_shell(tmp_path, capsys):
    rng, lines = np.random.default_rng(0), ["path,label,domain"]
    for i in range(16):
        name, place = ("red", "blue")[i % 2], PLACES[i // 2 % 2]
        colour = np.array((220, 30, 30) if name == "red" else (40, 70, 230)) + rng.integers(-25, 25, (20, 20, 3))
        Image.fromarray(np.clip(colour, 0, 255).astype(np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,{name},{place}")
    (tmp_path / "set.csv").write_text("\n".join(lines))
    model, out = save(clip_shaped(), tmp_path / "toy.safetensors"), str(tmp_path / "a.safetensors")
    words = ["tune", str(tmp_path / "set.csv"), "--method", "gm-df", "--out", out, "--model", str(model)]
    assert main([*words, "--shots", "4", "--epochs", "1", "--hidden", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["domains"] == PLACES
    assert found["held_out"] == 8
    assert GMDF.load(out, encoder=str(model)).encoder_.visual.norm_post.domain.table.shape == (2, 64)


def source(count, shortcut, style, seed):
    """Noise with a weak cue in one channel that all sources share, and in another a cue and a tint of its own."""
    rng = np.random.default_rng(seed)
    y = np.arange(count) % 2
    x, side = rng.normal(0, 1, (count, 3, 16, 16)), (2 * y - 1)[:, None, None]
    x[:, 2] += 0.25 * side
    x[:, 0] += shortcut * side + style
    return torch.from_numpy(x.astype(np.float32)), y


def test_what_two_sources_share_is_found_in_a_third():
    """The sources' own cues say the opposite of each other, and the third has none."""
    (a, ya), (b, yb), (held, answers) = source(48, 0.5, 1.0, 0), source(48, -0.5, -1.0, 1), source(200, 0.0, 0.0, 2)
    settings = {"names": ["real", "fake"], "encoder": clip_shaped(), "batch_size": 32, "inner_lr": 1e-2,
                "pixel_weight": 0.0, "second_order": False}  # fmt: skip
    told = ["lab"] * 48 + ["street"] * 48
    start, learned = (gmdf(lr=lr, epochs=n, **settings).fit(torch.cat([a, b]), np.concatenate([ya, yb]), domains=told)
                      for lr, n in ((0.0, 1), (5e-3, 25)))  # fmt: skip
    assert learned.score(held, answers) > start.score(held, answers) + 0.1
