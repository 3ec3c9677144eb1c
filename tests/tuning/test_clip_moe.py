"""CLIP-MoE: the mixture against loops, its neutral points, the balance, clusters and their batches, what each stage
learns; the checkable facts of the card."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from clipworks.cli.main import main
from clipworks.data.item import Item
from clipworks.encoders.config import EncoderConfig, TextConfig, VisionConfig
from clipworks.encoders.experts import Experts, balance, one_expert, parameter_counts, parts, recorded
from clipworks.encoders.formats.build import blank
from clipworks.encoders.layers import MLP
from clipworks.encoders.loading import save
from clipworks.errors import ClipworksError
from clipworks.training.clusters import ClusterOrder, batches_from
from clipworks.training.finetune import SentenceRecipe
from clipworks.tuning.clip_moe import CLIPMoE, ClusterRecipe, pseudo_labels
from clipworks.tuning.common import learning, only, run

from .toys import NAMES, SHAPES, clip_shaped, coloured, quick

TEXTS = ["a photo of a cat.", "an old oak beside a red barn", "two dogs"]
CAPTIONS = [f"a photo of a {NAMES[i % 3]}. It is number {i}." for i in range(12)]


def mixture(count=4, top_k=2, seed=0, alike=False):
    """Experts of width 6 in float64, different from one another."""
    torch.manual_seed(seed)
    made = Experts(MLP(6, 10, "gelu"), count, top_k).double().eval()
    if not alike:
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(torch.randn_like(parameter))
    return made


def tokens(seed=1):
    return torch.randn(3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("count", "top_k"), [(4, 1), (4, 2), (4, 4), (3, 2), (1, 1)])
def test_the_mixture_is_the_weighted_sum_of_the_likeliest(count, top_k):
    made, x = mixture(count, top_k), tokens()
    rows = x.reshape(-1, 6)
    outputs = np.stack([expert(rows).detach().numpy() for expert in made.experts], 1)
    logits = rows.numpy() @ made.router.weight.detach().numpy().T
    expected = np.zeros((15, 6))
    for i in range(15):
        p = np.exp(logits[i]) / np.exp(logits[i]).sum()
        best = np.argsort(-p)[:top_k]
        for e in best:
            expected[i] += p[e] / p[best].sum() * outputs[i, e]
    np.testing.assert_allclose(made(x).detach().reshape(-1, 6), expected, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_identical_experts_are_the_dense_part_whatever_the_router_says(top_k):
    made, x = mixture(4, top_k, alike=True), tokens()
    for seed in range(3):
        torch.manual_seed(seed)
        torch.nn.init.normal_(made.router.weight, std=3.0)
        torch.testing.assert_close(made(x), made.experts[0](x))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("settings", [{}, {"experts": 1, "top_k": 1}, {"experts": 3, "top_k": 3}, {"towers": "text"}])
def test_a_mixture_of_copies_is_the_encoder(shape, settings):
    encoder, (x, _) = SHAPES[shape](), coloured()
    made = CLIPMoE(**settings, seed=5)._shaped(encoder)
    towers = 1 if "towers" in settings else 2
    assert len(parts(made)) == sum(len(t.blocks) for t in (made.text, made.visual)[:towers])
    torch.testing.assert_close(made.images(x), encoder.images(x), atol=1e-5, rtol=0)
    torch.testing.assert_close(made.texts(TEXTS), encoder.texts(TEXTS), atol=1e-5, rtol=0)


def test_a_router_does_not_see_the_order_of_the_tokens():
    made, x = mixture(), tokens()
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(made(x[:, order]), made(x)[:, order])


def test_the_gate_is_computed_in_float32_and_dropout_is_for_training():
    made, x = mixture().to(torch.bfloat16), tokens().to(torch.bfloat16)
    with recorded(made) as routes:
        assert made(x).dtype == torch.bfloat16
    assert routes[0][0].dtype == torch.float32
    torch.testing.assert_close(routes[0][0].sum(1), torch.ones(15))
    soft = mixture()
    soft.dropout = 0.5
    assert torch.equal(soft(tokens()), soft(tokens()))
    soft.train()
    assert not torch.equal(soft(tokens()), soft(tokens()))


# -- balance -----------------------------------------------------------------------------------------------------------


def test_routers_that_know_nothing_give_k_and_a_collapse_gives_the_number_of_experts():
    for top_k in (1, 2, 3):
        made = mixture(4, top_k)
        torch.nn.init.zeros_(made.router.weight)
        with recorded(made) as routes:
            made(tokens())
        assert balance(routes).item() == pytest.approx(top_k)
    sure = torch.tensor([[0.5, 0.0, 0.5, 0.0]]).expand(7, -1)
    assert balance([(sure, torch.tensor([[2, 0]]).expand(7, -1))]).item() == pytest.approx(4)


def test_the_balance_is_the_sum_over_choices_and_experts():
    routes, rng = [], np.random.default_rng(0)
    for _ in range(2):  # two layers count together
        p = torch.from_numpy(rng.dirichlet(np.ones(4), 9))
        routes.append((p, p.topk(2).indices))
    p, chosen = (torch.cat(side).numpy() for side in zip(*routes, strict=True))
    expected = sum(4 * np.mean(chosen[:, r] == e) * p[:, e].mean() for r in range(2) for e in range(4))
    assert balance(routes).item() == pytest.approx(expected)


def test_what_is_recorded_does_not_stay():
    made = mixture()
    with recorded(made) as routes:
        made(tokens())
        made(tokens(2))
    made(tokens())
    assert len(routes) == 2
    assert made.routes is None
    copy.deepcopy(made)


# -- clusters ----------------------------------------------------------------------------------------------------------


def test_batches_come_from_one_cluster_and_no_sample_twice():
    ids = np.random.default_rng(0).integers(0, 9**2, 400) % 13
    groups = batches_from(ids, 8)
    order = ClusterOrder(400, 8, 3, tuple(groups))
    sizes = np.bincount(ids)
    assert order.steps_per_epoch == (sizes // 8).sum()
    seen = []
    for epoch in range(2):
        rows = [order.rows(epoch * order.steps_per_epoch + i) for i in range(order.steps_per_epoch)]
        assert all(len(set(ids[r])) == 1 and len(r) == 8 for r in rows)
        assert len(set(np.concatenate(rows))) == 8 * order.steps_per_epoch
        assert [ids[r[0]] for r in rows[:5]] == [ids[g[0]] for g in groups[:5]], "the clusters take turns"
        seen.append(rows)
    assert not np.array_equal(*[np.concatenate(rows) for rows in seen])
    assert np.array_equal(order.rows(3), ClusterOrder(400, 8, 3, tuple(groups)).rows(3))


def test_small_clusters_are_left_out_or_pooled_with_their_relatives():
    ids = np.array([0, 0, 0, 1, 1, 9, 9, 9, 10, 80])  # of 0..8, 9..17 and 72..80
    skipped = batches_from(ids, 3)
    assert [g.tolist() for g in skipped] == [[0, 1, 2], [5, 6, 7]]
    pooled = batches_from(ids, 2, branches=9)
    assert [g.tolist() for g in pooled] == [[0, 1, 2], [3, 4], [5, 6, 7], [8, 9]]
    pooled = batches_from(ids, 3, branches=9)
    assert [g.tolist() for g in pooled] == [[0, 1, 2], [5, 6, 7], [3, 4, 8, 9]]
    with pytest.raises(ClipworksError, match="largest cluster, 3 pairs"):
        batches_from(ids, 4)
    assert [len(g) for g in batches_from(ids, 10, branches=9)] == [10]


def test_labels_are_three_times_the_cluster_of_the_text_plus_that_of_the_image():
    x, y = coloured(30)
    items = [Item(str(i), x[i], caption=TEXTS[(i // 3) % 3]) for i in range(30)]
    found = pseudo_labels(clip_shaped(), items, 3, 0)
    assert found.dtype == np.int64
    assert set(found) <= set(range(9))
    by_text, by_image = found // 3, found % 3
    for given, truth in ((by_text, (np.arange(30) // 3) % 3), (by_image, y)):  # the same partition
        assert len({(a, b) for a, b in zip(given, truth, strict=True)}) == 3
    assert set(pseudo_labels(clip_shaped(), items[:2], 3, 0)) <= set(range(9))


# -- training ----------------------------------------------------------------------------------------------------------


def fitted(encoder=None, **settings):
    x, _ = coloured()
    method = quick(CLIPMoE, encoder=encoder or clip_shaped(), warmup=0, **{"lr": 1e-2, "router_lr": 1e-2, **settings})
    return method.fit(x, CAPTIONS)


def test_experts_differ_and_all_but_experts_and_routers_is_the_encoder():
    encoder = clip_shaped()
    made = fitted(encoder).encoder_
    dense = [one_expert(made, number) for number in range(4)]
    base = encoder.state_dict()
    assert all(torch.equal(value, base[name]) for name, value in dense[0].state_dict().items())
    for one in dense[1:]:
        moved = {name for name, value in one.state_dict().items() if not torch.equal(value, base[name])}
        assert moved
        assert all(".mlp.up." in name or ".mlp.down." in name for name in moved)
    for i in range(4):
        for j in range(i):
            assert not torch.equal(dense[i].images(coloured()[0]), dense[j].images(coloured()[0]))


def test_the_stages_learn_feed_forward_parts_and_then_routers():
    still = fitted(router_lr=0.0).encoder_.state_dict()
    both = fitted().encoder_.state_dict()
    assert {n for n, v in both.items() if not torch.equal(v, still[n])} == {n for n in both if "router" in n}
    dense = clip_shaped()
    assert set(learning(dense, only("*.blocks.*.mlp.*"))) == {n for n, _ in dense.named_parameters() if ".mlp." in n}


def test_an_expert_starts_from_the_base_or_from_the_one_before():
    chains = {begin: fitted(begin=begin, lr=1e-2).encoder_ for begin in ("base", "previous")}
    first, second = (
        [torch.equal(*(one_expert(c, n).text.blocks[0].mlp.up.weight for c in chains.values())) for n in range(4)][i]
        for i in (1, 2)
    )
    assert first
    assert not second


def test_the_losses_of_the_routers_in_numpy():
    """Contrast of all pairs, and the balance of what comes into the feed-forward parts, text half."""
    encoder, (x, _) = clip_shaped().double(), coloured()
    settings = {"lr": 0.0, "router_lr": 0.0, "dropout": 0.0, "batch_size": 12, "balance_weight": 0.5}
    method = quick(CLIPMoE, encoder=encoder, short_weight=0.3, **settings).fit(x.double(), CAPTIONS)
    start = method._shaped(encoder)
    short = [text.partition(". ")[0] + "." for text in CAPTIONS]

    def bal(tower, encode):
        inputs, handles = [], []
        for path, part in parts(tower):
            handles.append(part.register_forward_pre_hook(lambda m, a: inputs.append((m.router.weight, a[0]))))
            assert path.endswith("mlp")
        with torch.no_grad():
            rows = encode()
        for handle in handles:
            handle.remove()
        p = []
        for weight, seen in inputs:
            logits = seen.reshape(-1, 16).numpy() @ weight.detach().numpy().T
            p.append(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))
        p = np.concatenate(p)
        first, second = np.argsort(-p, 1)[:, :2].T
        share = np.bincount(first, minlength=4) / len(p) + np.bincount(second, minlength=4) / len(p)
        return rows.numpy(), 4 * (share * p.mean(0)).sum()

    image, total = bal(start.visual, lambda: start.encode_image(x.double()))
    for name, texts, weight in (("long", CAPTIONS, 1.0), ("short", short, 0.3)):
        text, share = bal(start.text, lambda texts=texts: start.encode_text(start.tokenize(texts)))
        total, logits = total + share / 2, encoder.logit_scale * image @ text.T
        contrast = 0.0
        for side in (logits, logits.T):
            contrast -= np.mean(np.diag(side) - np.log(np.exp(side).sum(1))) / 2
        assert method.losses_[name] == pytest.approx(weight * contrast, rel=1e-5)
    assert method.losses_["balance"] == pytest.approx(0.5 * total, rel=1e-5)


def test_the_share_of_pairs_that_a_stage_used_is_told():
    merged = fitted(batch_size=3, experts=3)
    assert len(merged.kept_) == 2
    assert all(0 < share <= 1 for share in merged.kept_)
    with pytest.raises(ClipworksError, match="batch_size must not exceed the largest cluster"):
        fitted(batch_size=12, small="skip")
    assert fitted(batch_size=12).kept_ == [1.0] * 3


def test_longer_texts_by_a_stretched_table():
    encoder = fitted(length=248).encoder_
    assert encoder.context_length == 248
    assert torch.equal(encoder.text.positions[:20], clip_shaped().text.positions[:20])


def test_parameters_of_vit_l_14():
    """Card: 24 + 12 mixtures; 4 experts of which 2 are active; a router is E x width without bias."""
    vision = VisionConfig(patch_size=14, width=1024, layers=24, heads=16, mlp_width=4096)
    dense = blank(EncoderConfig("ViT-L-14", 768, vision, TextConfig(width=768, heads=12, mlp_width=3072)))
    before = parameter_counts(dense)
    assert before["total"] == before["active"] == 427_616_513
    CLIPMoE()._shape(dense)
    assert len(parts(dense.visual)) == 24
    assert len(parts(dense.text)) == 12
    copies = 24 * (2 * 1024 * 4096 + 4096 + 1024) + 12 * (2 * 768 * 3072 + 3072 + 768)
    routers = 4 * (24 * 1024 + 12 * 768)
    assert parameter_counts(dense) == {
        "total": 427_616_513 + 3 * copies + routers,
        "active": 427_616_513 + copies + routers,
    }
    assert sum(p.numel() for p in learning(dense, only("*.mlp.router.weight")).values()) == routers


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"top_k": 5}, "top_k must lie in .1, 4."),
        ({"experts": 0}, "experts must lie in"),
        ({"small": "drop"}, "small must be one of 'merge', 'skip'"),
        ({"begin": "bass"}, "Did you mean 'base'"),
    ],
)
def test_what_cannot_be_used_is_named(settings, says):
    with pytest.raises(ClipworksError, match=says):
        fitted(**settings)


def test_a_mixture_is_not_mixed_again():
    with pytest.raises(ClipworksError, match="encoder must be dense"):
        quick(CLIPMoE, encoder=CLIPMoE()._shaped(clip_shaped())).fit(coloured()[0], CAPTIONS)


def test_from_a_shell(tmp_path, capsys):
    for name, value in (("cat", 30), ("dog", 200)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for k in range(3):
            Image.fromarray(np.full((20, 20, 3), value + k, np.uint8)).save(tmp_path / "data" / name / f"{k}.png")
    model, out = save(clip_shaped(), tmp_path / "toy.safetensors"), tmp_path / "out.safetensors"
    words = ["tune", str(tmp_path / "data"), "--method", "clip-moe", "--out", str(out), "--model", str(model)]
    assert main([*words, "--experts", "3", "--shots", "2", "--router-lr", "0.01", "--towers", "text", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["settings"]["experts"], found["images"], found["held_out"]) == (3, 4, 2)
    again = CLIPMoE.load(out, encoder=str(model))
    assert [len(part.experts) for _, part in parts(again.encoder_)] == [3]


# -- the claim ---------------------------------------------------------------------------------------------------------

COLOURS = {"red": 0, "green": 1, "blue": 2}
FORMS = ("bar", "pole", "dot")
AREAS = ((slice(0, 4), slice(0, 16)), (slice(0, 16), slice(0, 4)), (slice(8, 16), slice(8, 16)))


def scene(count, seed):
    """Bright forms in one of three channels: (pixels, colours, forms)."""
    rng = np.random.default_rng(seed)
    x = 0.2 * rng.normal(size=(count, 3, 16, 16))
    colour, form = np.arange(count) % 3, (np.arange(count) // 3) % 3
    for i in range(count):
        x[i, colour[i]][AREAS[form[i]]] += 3.0
    return torch.from_numpy(x).float(), colour, form


def caption(colour, form):
    return f"{list(COLOURS)[colour]} {FORMS[form]}"


def form_accuracy(encoder, x, colour, form):
    """Share of images that find their form among the captions of their own colour."""
    rows = encoder.images(x)
    return np.mean([
        int((rows[i] @ encoder.texts([caption(colour[i], f) for f in range(3)]).T).argmax()) == form[i]
        for i in range(len(x))
    ])  # fmt: skip


def test_a_model_taught_within_clusters_learns_what_the_base_ignores():
    """Card: the base sees colours alone; its clusters are colours, and the next expert has to see forms."""
    x, colour, form = scene(180, 0)
    options = {"batch_size": 18, "seed": 0, "progress": False, "warmup": 0}
    words = [Item(str(i), x[i], caption=list(COLOURS)[c]) for i, c in enumerate(colour)]
    base = run(clip_shaped(), words, SentenceRecipe(None, ["{}"], None), lr=2e-3, epochs=8, **options).encoder
    full = [Item(str(i), x[i], caption=caption(c, f)) for i, (c, f) in enumerate(zip(colour, form, strict=True))]
    ids = pseudo_labels(base, full, 3, 0)
    assert len({(a % 3, b) for a, b in zip(ids, colour, strict=True)}) == 3, "clusters of images are colours"
    recipe = ClusterRecipe(batches_from(ids, 18, 9), 0.1)
    expert = run(base, full, recipe, lr=1e-2, epochs=20, freeze=only("*.blocks.*.mlp.*"), **options).encoder
    held = SimpleNamespace(**dict(zip(("x", "colour", "form"), scene(90, 1), strict=True)))
    before, after = (form_accuracy(e, held.x, held.colour, held.form) for e in (base, expert))
    assert before < 0.45
    assert after > 0.8
