"""Every seam of the image tower against the plain recomputation in numpy."""

import numpy as np
import plain_towers as plain
import pytest
import tiny_towers as tiny
import torch
from torch import nn

from clipworks.encoders.layers import rotary, swap
from clipworks.errors import ClipworksError

SHAPES = {
    "clip": {},
    "laion": {"activation": "gelu"},
    "mean": {"pool": "mean"},
    "siglip": dict(tiny.SIGLIP_VISION),
    "bare": {"class_token": False, "pool": "mean", "norm_post": False, "norm_pre": False, "patch_bias": True},
}


def make(shape):
    dim = 24 if shape == "siglip" else 16
    visual = tiny.encoder(SHAPES[shape], dim=dim).visual
    return visual, plain.weights_of(visual), visual.config


def check(output, expected, tolerance=1e-9):
    pooled, tokens, *_ = expected
    np.testing.assert_allclose(output.pooled.detach().numpy(), pooled, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(output.tokens.detach().numpy(), tokens, atol=tolerance, rtol=tolerance)


def prompt(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_the_plain_tower(shape):
    visual, p, c = make(shape)
    x = tiny.pixels()
    output = visual.run(x, output_layers=(0, 1, -1), output_attention=(0, 2))
    expected = plain.vision(p, c, x.numpy())
    check(output, expected)
    np.testing.assert_allclose(visual(x).detach(), expected[0], atol=1e-9)
    assert list(output.layers) == [0, 1, -1]
    assert list(output.attentions) == [0, 2]
    for asked, layer in ((0, 0), (1, 1), (-1, 2)):
        np.testing.assert_allclose(output.layers[asked].detach(), expected[2][layer], atol=1e-9)
    for layer in (0, 2):
        # weights are kept in float32
        np.testing.assert_allclose(output.attentions[layer].detach(), expected[3][layer], atol=1e-6)
    assert output.grid == (4, 4)
    assert output.patches.shape == (2, 16, 24)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layers", [{}, {0: 2}, {0: 1, 2: 3}])
def test_the_last_block_is_computed_for_the_class_token_only(layers, masked):
    visual, p, c = make("clip")
    x, mask = tiny.pixels(3), None
    prompts = {i: prompt(n, 24, seed=i) for i, n in layers.items()}
    if masked:
        mask = torch.rand(3, 16, generator=torch.Generator().manual_seed(5)) > 0.4
    sizes, hook = [], visual.blocks[2].mlp.register_forward_hook(lambda _, x, __: sizes.append(x[0].shape[1]))
    found = visual(x, prompts=prompts, mask=mask)
    for seams in ({"output_layers": (-1,)}, {"output_attention": (2,)}, {"attention": {2: "kk"}}, {"whole": True}):
        visual(x, prompts=prompts, mask=mask, **seams)
    visual(x[:1], prompts=prompts)  # one image: in the kernels of many
    hook.remove()
    tokens = 17 + (list(layers.values()) or [0])[-1]
    assert sizes == [1] + [tokens] * 5
    want = plain.vision(p, c, x.numpy(), prompts={i: v.numpy() for i, v in prompts.items()},
                        mask=None if mask is None else mask.numpy())  # fmt: skip
    np.testing.assert_allclose(found.detach(), want[0], atol=1e-9)
    found.square().sum().backward()
    lean = {n: q.grad for n, q in visual.named_parameters()}
    visual.zero_grad(set_to_none=True)
    visual.run(x, prompts=prompts, mask=mask).pooled.square().sum().backward()
    for name, parameter in visual.named_parameters():
        torch.testing.assert_close(lean[name], parameter.grad, atol=1e-9, rtol=1e-9, msg=name)


def test_a_vector_does_not_know_its_batch():
    encoder = tiny.encoder().float()
    x = tiny.pixels(5).float()
    together = encoder.images(x, batch_size=5)
    for size in (1, 2, 3):
        torch.testing.assert_close(encoder.images(x, batch_size=size), together, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layers", [{0: 2}, {1: 3}, {0: 2, 1: 2, 2: 2}, {0: 2, 2: 4}, {-1: 1}])
def test_prompts_at_any_layer(shape, layers):
    visual, p, c = make(shape)
    x = tiny.pixels()
    shared = {i: prompt(n, 24, seed=i + 5) for i, n in layers.items()}
    own = {i: prompt(2, n, 24, seed=i + 9) for i, n in layers.items()}
    for prompts in (shared, own):
        output = visual.run(x, prompts=prompts)
        check(output, plain.vision(p, c, x.numpy(), prompts={i % 3: v.numpy() for i, v in prompts.items()}))
        assert output.prefix == int(c.class_token) + list(layers.values())[-1]
        assert output.patches.shape == (2, 16, 24)


RULES = {
    "qk": "qk", "vv": "vv", "kk": "kk", "qq": "qq", "identity": "identity", "mixed:0.3": [(0.7, "qk"), (0.3, "vv")],
    "mixed:0": "qk", "mixed:1": "vv", "qq+kk": [(1.0, "qq"), (1.0, "kk")],
}  # fmt: skip


@pytest.mark.parametrize("shape", ["clip", "siglip"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layer", [0, 2])
def test_attention_rules(shape, rule, layer):
    visual, p, c = make(shape)
    x = tiny.pixels()
    output = visual.run(x, attention={layer: rule}, output_attention=(layer,))
    expected = plain.vision(p, c, x.numpy(), rules={layer: RULES[rule]})
    check(output, expected, 2e-6)
    np.testing.assert_allclose(output.attentions[layer].detach(), expected[3][layer], atol=2e-6)


def test_several_rules_at_once_and_rules_with_prompts_and_mask():
    visual, p, c = make("clip")
    x = tiny.pixels()
    mask = torch.rand(2, 16, generator=torch.Generator().manual_seed(1)) > 0.4
    prompts = {1: prompt(3, 24)}
    output = visual.run(x, attention={0: "kk", 2: "vv"}, prompts=prompts, mask=mask)
    given = {"rules": {0: "kk", 2: "vv"}, "prompts": {1: prompts[1].numpy()}, "mask": mask.numpy()}
    expected = plain.vision(p, c, x.numpy(), **given)
    check(output, expected, 2e-6)


@pytest.mark.parametrize("batched", [False, True])
def test_a_given_affinity_is_used_as_it_is(batched):
    visual, p, c = make("clip")
    x = tiny.pixels()
    affinity = prompt(2, 17, 17).softmax(-1) if batched else prompt(17, 17)
    check(visual.run(x, attention={2: affinity}), plain.vision(p, c, x.numpy(), rules={2: affinity.numpy()}), 1e-5)


def test_a_function_as_rule():
    visual, p, c = make("clip")
    x = tiny.pixels()

    def kk(q, k, v, mask):
        return (k @ k.transpose(-2, -1) * k.shape[-1] ** -0.5).softmax(-1)

    check(visual.run(x, attention={1: kk}), plain.vision(p, c, x.numpy(), rules={1: "kk"}), 2e-6)


def test_the_usual_rule_returns_the_same_bits_with_and_without_maps():
    visual = make("clip")[0].float()
    x = tiny.pixels().float()
    usual = visual.run(x)
    for seams in ({"attention": {2: "qk"}}, {"output_attention": (0, 1, 2)}, {"output_layers": (0, 1, 2)}):
        other = visual.run(x, **seams)
        assert torch.equal(other.tokens, usual.tokens)
        assert torch.equal(other.pooled, usual.pooled)


def test_identity_attention_keeps_patches_apart():
    visual = make("clip")[0]
    x = tiny.pixels(1)
    changed = x.clone()
    changed[:, :, 8:16, 16:24] += 1  # patch in row 1, column 2: number 6
    rules = {i: "identity" for i in range(3)}
    a, b = (visual.run(y, attention=rules).patches[0] for y in (x, changed))
    moved = (a - b).abs().amax(1) > 1e-9
    assert moved.nonzero().flatten().tolist() == [6]
    a, b = (visual.run(y, attention={i: "qq" for i in range(3)}).patches[0] for y in (x, changed))
    assert ((a - b).abs().amax(1) > 1e-9).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_kept_patches_carry_their_own_positions(shape):
    visual, p, c = make(shape)
    x = tiny.pixels()
    keep = torch.stack([torch.tensor([3, 0, 7, 15, 9]), torch.tensor([1, 2, 5, 6, 14])])
    output = visual.run(x, keep=keep)
    check(output, plain.vision(p, c, x.numpy(), keep=keep.numpy()))
    assert output.grid is None
    assert output.patches.shape[1] == 5


@pytest.mark.parametrize("shape", SHAPES)
def test_keeping_all_patches_is_the_identity(shape):
    visual = make(shape)[0]
    x = tiny.pixels()
    everything = torch.arange(16).expand(2, -1)
    assert torch.equal(visual.run(x, keep=everything).pooled, visual.run(x).pooled)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).expand(2, -1)
    torch.testing.assert_close(visual.run(x, keep=order).pooled, visual.run(x).pooled, atol=1e-9, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_masked_patches_are_seen_by_none(shape):
    visual, p, c = make(shape)
    x = tiny.pixels()
    mask = torch.rand(2, 16, generator=torch.Generator().manual_seed(2)) > 0.5
    output = visual.run(x, mask=mask)
    check(output, plain.vision(p, c, x.numpy(), mask=mask.numpy()))
    nothing_hidden = visual.run(x, mask=torch.ones(2, 16)).pooled
    torch.testing.assert_close(nothing_hidden, visual.run(x).pooled, atol=1e-9, rtol=0)


def test_masking_and_dropping_give_the_same_vector():
    visual = make("clip")[0]
    x = tiny.pixels()
    keep = torch.tensor([[1, 4, 9, 12], [0, 2, 7, 15]])
    mask = torch.zeros(2, 16, dtype=torch.bool).scatter(1, keep, True)
    torch.testing.assert_close(visual(x, keep=keep), visual(x, mask=mask), atol=1e-9, rtol=0)
    torch.testing.assert_close(visual(x, keep=keep, mask=mask), visual(x, mask=mask), atol=1e-9, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_patch_tokens_of_any_layer_in_the_joint_space(shape):
    visual, p, c = make(shape)
    output = visual.run(tiny.pixels(), output_layers=(1,))
    projected = visual.project(output.layers[1])
    y = plain.norm(p, "norm_post", output.layers[1].detach().numpy(), c.norm_eps)
    if c.pool == "attention":  # a token pooled alone: its value, then the feed-forward part
        z = plain.linear(p, "pool.attention.out", plain.linear(p, "pool.attention.v", y))
        y = z + plain.mlp(p, "pool.mlp", plain.norm(p, "pool.norm", z, c.norm_eps), c.activation)
    expected = plain.linear(p, "projection", y) if c.projection else y
    np.testing.assert_allclose(projected.detach(), expected, atol=1e-9)
    if c.pool == "class":
        torch.testing.assert_close(visual.project(output.tokens)[:, 0], output.pooled)
    if c.pool == "mean":
        torch.testing.assert_close(visual.project(output.patches).mean(1), output.pooled)


def test_class_attention():
    visual, p, c = make("clip")
    x = tiny.pixels()
    output = visual.run(x, output_attention=(-1,), prompts={0: prompt(2, 24)})
    expected = plain.vision(p, c, x.numpy(), prompts={0: prompt(2, 24).numpy()})[3][2]
    np.testing.assert_allclose(output.class_attention(-1).detach(), expected[:, :, 0, 3:], atol=1e-6)
    with pytest.raises(ClipworksError, match="layer must be one of -1"):
        output.class_attention(1)


def test_attention_of_the_pool():
    visual, p, c = make("siglip")
    x = tiny.pixels()
    output = visual.run(x, output_attention=("pool", 1))
    expected = plain.vision(p, c, x.numpy())[3]
    np.testing.assert_allclose(output.class_attention("pool").detach(), expected["pool"][:, :, 0], atol=1e-6)
    with pytest.raises(ClipworksError, match="no class token"):
        output.class_attention(1)
    with pytest.raises(ClipworksError, match="attention pool"):
        make("clip")[0].run(x, output_attention=("pool",))


@pytest.mark.parametrize("shape", ["clip", "siglip"])
def test_images_of_other_sizes_interpolate_the_positions(shape):
    visual, p, c = make(shape)
    x = tiny.pixels(2, 48, wide=24)
    head = int(c.class_token)
    table = torch.as_tensor(p["positions"])
    grid = torch.nn.functional.interpolate(
        table[head:].T.reshape(1, 24, 4, 4), (6, 3), mode="bicubic", align_corners=False
    )
    positions = torch.cat([table[:head], grid.reshape(24, 18).T]).numpy()
    output = visual.run(x)
    check(output, plain.vision(p, c, x.numpy(), positions=positions))
    assert output.grid == (6, 3)
    # the same table handed in
    check(visual.run(x, positions=torch.as_tensor(positions)), plain.vision(p, c, x.numpy(), positions=positions))


def test_positions_of_the_callers_choice():
    visual, p, c = make("clip")
    x, table = tiny.pixels(), prompt(17, 24)
    check(visual.run(x, positions=table), plain.vision(p, c, x.numpy(), positions=table.numpy()))


def test_module_swaps():
    visual, p, c = make("clip")
    x = tiny.pixels()
    before = visual(x)

    class LowRank(nn.Module):
        def __init__(self, base, down, up):
            super().__init__()
            self.base, self.down, self.up = base, down, up

        def forward(self, x):
            return self.base(x) + x @ self.down.T @ self.up.T

    down, up = prompt(2, 24), prompt(24, 2, seed=4)
    for path in ("blocks.1.attention.v", "blocks.2.attention.q"):
        old = swap(visual, path, LowRank(visual.get_submodule(path), down, up))
        expected = plain.vision({**p, path + ".weight": p[path + ".weight"] + (up @ down).numpy()}, c, x.numpy())
        check(visual.run(x), expected)
        assert isinstance(swap(visual, path, old), LowRank)
        assert torch.equal(visual(x), before)
    swap(visual, "blocks.0.mlp", nn.Identity())
    assert not torch.allclose(visual(x), before)
    with pytest.raises(ClipworksError, match="path must be one of"):
        swap(visual, "blocks.9.mlp", nn.Identity())


def embedded(visual, p, x):
    """Class token and patches with their positions, before the first norm."""
    patches = visual.stem(x).detach().numpy().reshape(len(x), 24, -1).transpose(0, 2, 1)
    tokens = np.concatenate([np.tile(p["class_token"], (len(x), 1, 1)), patches], 1)
    return tokens + p["positions"]


def test_rotary_positions_as_a_rule():
    visual, p, c = make("clip")
    x = tiny.pixels()
    seen = {}

    def watch(q, k, v, mask):
        seen["weights"] = rotary((4, 4), prefix=1)(q, k, v, mask)
        return seen["weights"]

    output = visual.run(x, attention={0: watch}, output_attention=(0,))
    assert torch.equal(output.attentions[0], seen["weights"])
    assert not torch.allclose(output.pooled, visual(x))
    # by hand, with complex numbers: channels in pairs, the first half of them turned by the row
    h = plain.norm(p, "norm_pre", embedded(visual, p, x), c.norm_eps)
    y = plain.norm(p, "blocks.0.norm1", h, c.norm_eps)
    q, k = (plain.linear(p, f"blocks.0.attention.{n}", y)[..., :8] for n in "qk")  # the first head
    speed = 100.0 ** (-np.arange(2) / 2)
    rows, columns = np.divmod(np.arange(16), 4)
    angle = np.concatenate([np.zeros((1, 4)), np.concatenate([np.outer(rows, speed), np.outer(columns, speed)], 1)])
    turned = [(z[..., 0::2] + 1j * z[..., 1::2]) * np.exp(1j * angle) for z in (q, k)]
    logits = np.einsum("bnc,bmc->bnm", turned[0], turned[1].conj()).real / np.sqrt(8)
    np.testing.assert_allclose(output.attentions[0][:, 0].detach(), plain.softmax(logits), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_the_stem_gave_stands_for_the_pixels(shape):
    visual, *_ = make(shape)
    x, prompts = tiny.pixels(), {0: prompt(2, 24), 2: prompt(1, 24)}
    kept = visual.stem(x)
    assert torch.equal(visual(embeddings=kept), visual(x))
    assert torch.equal(visual(embeddings=kept, prompts=prompts), visual(x, prompts=prompts))
    for given in ({}, {"pixels": x, "embeddings": kept}):
        with pytest.raises(ClipworksError, match="one of pixels and embeddings"):
            visual.run(**given)


@pytest.mark.parametrize("shape", SHAPES)
def test_stopping_before_a_block_gives_its_input(shape):
    visual, *_ = make(shape)
    x, wide = tiny.pixels(), {0: prompt(2, 24)}
    whole = visual.run(x, prompts=wide, output_layers=(0, 1))
    for stop, layer in ((1, 0), (2, 1), (-1, 1)):
        early = visual.run(x, prompts=wide, stop=stop)
        assert torch.equal(early.tokens, whole.layers[layer])
        assert (early.prefix, early.grid) == (whole.prefix, whole.grid)
    assert torch.equal(visual.blocks[-1](early.tokens)[0], whole.tokens)
    first = visual.run(x, stop=0).tokens
    assert torch.equal(visual.blocks[0](first)[0], visual.run(x, output_layers=(0,)).layers[0])


def test_a_tower_without_blocks_pools_what_the_stem_gave():
    visual = tiny.encoder({**SHAPES["bare"], "layers": 0}, dim=16).visual
    x = tiny.pixels()
    tokens = visual.stem(x).flatten(2).transpose(1, 2) + visual.positions
    torch.testing.assert_close(visual(x), visual.projection(tokens.mean(1)))


def test_gradients_flow_where_asked_and_nowhere_else():
    visual = make("clip")[0].requires_grad_(False)
    given = {0: prompt(2, 24).requires_grad_(), 2: prompt(2, 24, seed=8)}
    affinity = prompt(19, 19).requires_grad_()
    visual.run(tiny.pixels(), prompts=given, attention={1: affinity}).pooled.sum().backward()
    assert given[0].grad.abs().sum() > 0
    assert affinity.grad.abs().sum() > 0
    assert given[2].grad is None
    assert all(p.grad is None for p in visual.parameters())
    visual.blocks[1].attention.v.requires_grad_(True)
    visual.run(tiny.pixels()).pooled.sum().backward()
    assert [n for n, p in visual.named_parameters() if p.grad is not None] == [
        "blocks.1.attention.v.weight", "blocks.1.attention.v.bias",
    ]  # fmt: skip
    pixels = tiny.pixels().requires_grad_()
    visual(pixels).sum().backward()
    assert pixels.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("seams", "message"),
    [
        ({"prompts": {3: torch.zeros(1, 24)}}, "prompts must name layers from 0 to 2"),
        ({"prompts": {0: torch.zeros(1, 23)}}, r"prompts must have the shape \(n, 24\)"),
        ({"prompts": {0: torch.zeros(5, 1, 24)}}, r"\(2, n, 24\)"),
        ({"attention": {0: "vw"}}, "attention must be one of"),
        ({"attention": {0: "mixed:2"}}, "must lie in"),
        ({"attention": {0: "mixed:x"}}, "needs a number"),
        ({"attention": {0: torch.zeros(16, 16)}}, "17 tokens"),
        ({"output_layers": (7,)}, "output_layers must name layers"),
        ({"output_attention": ("pol",)}, "output_attention must name layers"),
        ({"mask": torch.ones(2, 17)}, r"mask must have the shape \(2, 16\)"),
        ({"mask": torch.zeros(2, 16)}, "hides every token"),
        ({"keep": torch.zeros(3, 2, dtype=torch.long)}, "keep must have the shape"),
        ({"keep": torch.full((2, 2), 16)}, "keep must hold patch numbers"),
        ({"positions": torch.zeros(10, 24)}, "positions"),
        ({"stop": 3}, "stop must name layers from 0 to 2"),
        ({"stop": 1, "attention": {-1: "vv"}}, "stop 1 leaves out layer 2"),
    ],
)
def test_messages(seams, message):
    with pytest.raises(ClipworksError, match=message):
        make("clip")[0].run(tiny.pixels(), **seams)
