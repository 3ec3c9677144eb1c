"""Every seam of the text tower against the plain recomputation in numpy, which computes all positions."""

import numpy as np
import plain_towers as plain
import pytest
import tiny_towers as tiny
import torch

from clipworks.errors import ClipworksError

SHAPES = {"clip": {}, "siglip": tiny.SIGLIP_TEXT, "bert": tiny.BERT_TEXT,
          "first": {"causal": False, "pool": "first", "mask_padding": True}}  # fmt: skip


def make(shape):
    text = tiny.encoder(text=SHAPES[shape], dim=20 if shape == "bert" else 16).text
    return text, plain.weights_of(text), text.config


def words(shape, lengths=(5, 9, 12)):
    return tiny.tokens(lengths, pad=SHAPES[shape].get("pad_id", 0))


def prompt(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(output, expected, tolerance=1e-9):
    pooled, tokens, *_ = expected
    np.testing.assert_allclose(output.pooled.detach().numpy(), pooled, atol=tolerance, rtol=tolerance)
    seen = output.tokens.shape[1]  # what was cut away decides nothing and is not compared
    np.testing.assert_allclose(output.tokens.detach().numpy(), tokens[:, :seen], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lengths", [(5, 9, 12), (3, 6, 4), (2, 2, 2)])
def test_forward_equals_the_plain_tower_cut_or_not(shape, lengths):
    text, p, c = make(shape)
    tokens = words(shape, lengths)
    expected = plain.text(p, c, tokens.numpy())
    whole = text.run(tokens, cut=False)
    check(whole, expected)
    assert whole.tokens.shape[1] == 12
    cut = text.run(tokens)
    check(cut, expected)
    assert cut.tokens.shape[1] == (12 if shape == "siglip" else max(lengths))
    np.testing.assert_allclose(text(tokens).detach(), expected[0], atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_attention_of_any_layer(shape):
    text, p, c = make(shape)
    tokens = words(shape)
    output = text.run(tokens, output_layers=(0, -1), output_attention=(1,))
    expected = plain.text(p, c, tokens.numpy())
    np.testing.assert_allclose(output.layers[0].detach(), expected[2][0], atol=1e-9)
    assert torch.equal(output.layers[-1], output.tokens)
    np.testing.assert_allclose(output.attentions[1].detach(), expected[3][1], atol=1e-9)
    torch.testing.assert_close(output.pooled, text(tokens), atol=1e-12, rtol=0)
    joint = plain.norm(p, "norm", expected[2][0], c.norm_eps)
    joint = plain.linear(p, "projection", joint) if c.projection else joint
    np.testing.assert_allclose(text.project(output.layers[0]).detach(), joint, atol=1e-9)


def test_the_first_end_token_is_read():
    text, p, c = make("clip")
    tokens = words("clip")
    tokens[1, 3] = 49  # an end token inside a text ends it, as in OpenAI's release
    expected = plain.text(p, c, tokens.numpy())
    check(text.run(tokens), expected)
    tokens[1, 4:] = 7
    np.testing.assert_allclose(text(tokens).detach()[1], expected[0][1], atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layers", [{0: 3}, {1: 2}, {0: 2, 1: 2, 2: 2}, {0: 2, 2: 1}, {1: 1, 2: 3}])
def test_prompts_at_any_layer(shape, layers):
    text, p, c = make(shape)
    tokens = words(shape, (5, 8, 3))[:, :9]
    shared = {i: prompt(n, 20, seed=i + 5) for i, n in layers.items()}
    own = {i: prompt(3, n, 20, seed=i + 9) for i, n in layers.items()}
    for prompts in (shared, own):
        output = text.run(tokens, prompts=prompts)
        check(output, plain.text(p, c, tokens.numpy(), prompts={i: v.numpy() for i, v in prompts.items()}))
        assert output.prefix == 1 + list(layers.values())[-1]


@pytest.mark.parametrize("shape", ["clip", "siglip", "first"])
@pytest.mark.parametrize("seams", [{}, {"prompts": {0: 2}}, {"prompts": {0: 1, 2: 3}}, {"masked": True},
                                   {"prompts": {1: 2}, "masked": True}, {"attention": {2: "vv"}},
                                   {"attention": {0: "vv"}}])  # fmt: skip
def test_the_last_block_is_computed_where_the_vector_is_read_only(shape, seams):
    text, p, c = make(shape)
    tokens, mask = words(shape, (5, 8, 3))[:, :9], None
    prompts = {i: prompt(n, 20, seed=i) for i, n in seams.get("prompts", {}).items()}
    rules = seams.get("attention", {})
    if seams.get("masked"):
        mask = torch.ones(3, 9, dtype=torch.bool)
        mask[0, 2:4] = mask[1, 7] = mask[2, 0] = False  # 7 is the end token of the second row
    sizes, hook = [], text.blocks[2].mlp.register_forward_hook(lambda _, x, __: sizes.append(x[0].shape[1]))
    found = text(tokens, mask=mask, prompts=prompts, attention=rules)
    hook.remove()
    assert sizes == ([1] if 2 not in rules else [9 if shape == "siglip" else 8])
    want = plain.text(p, c, tokens.numpy(), prompts={i: v.numpy() for i, v in prompts.items()}, rules=dict(rules),
                      mask=None if mask is None else mask.numpy())  # fmt: skip
    np.testing.assert_allclose(found.detach(), want[0], atol=1e-9)
    found.square().sum().backward()
    lean = {n: q.grad for n, q in text.named_parameters()}
    text.zero_grad(set_to_none=True)
    text.run(tokens, mask=mask, prompts=prompts, attention=rules).pooled.square().sum().backward()
    for name, parameter in text.named_parameters():
        torch.testing.assert_close(lean[name], parameter.grad, atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.parametrize("shape", SHAPES)
def test_text_from_token_embeddings(shape):
    text, p, c = make(shape)
    tokens = words(shape)
    embeddings = text.tokens(tokens)
    mask = tokens != c.pad_id if c.mask_padding else None
    eot = torch.tensor([4, 8, 11]) if c.pool == "eot" else None
    same = text.run(embeddings=embeddings, eot=eot, mask=mask)
    check(same, plain.text(p, c, tokens.numpy()))
    assert torch.allclose(text.run(tokens, embeddings=embeddings, mask=mask).pooled, same.pooled, atol=1e-12)
    free = prompt(2, 7, 20)
    ends = torch.tensor([3, 6]) if c.pool == "eot" else None
    expected = plain.text(p, c, embeddings=free.numpy(), eot=[3, 6])
    check(text.run(embeddings=free, eot=ends), expected)
    both = plain.text(p, c, embeddings=free.numpy(), eot=[3, 6], prompts={0: prompt(2, 20).numpy()})
    check(text.run(embeddings=free, eot=ends, prompts={0: prompt(2, 20)}), both)


def test_context_words_as_prompts_equal_the_same_embeddings_spliced_by_hand():
    """The form of context optimisation: start token, learned words, class name, end token."""
    text, _, _ = make("clip")
    tokens, context = words("clip", (4, 6))[:, :6], prompt(3, 20)
    spliced = text.tokens(tokens)
    spliced = torch.cat([spliced[:, :1], context.expand(2, -1, -1), spliced[:, 1:]], 1)
    by_hand = text(embeddings=spliced, eot=torch.tensor([6, 8]))
    torch.testing.assert_close(text(tokens, prompts={0: context}), by_hand, atol=1e-10, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rule", "same"), [("vv", "vv"), ("identity", "identity"), ("qk", "qk"),
                                            ("mixed:0.25", [(0.75, "qk"), (0.25, "vv")])])  # fmt: skip
def test_attention_rules_respect_order_and_padding(shape, rule, same):
    text, p, c = make(shape)
    tokens = words(shape)
    output = text.run(tokens, attention={1: rule}, output_attention=(1,))
    expected = plain.text(p, c, tokens.numpy(), rules={1: same})
    check(output, expected)
    np.testing.assert_allclose(output.attentions[1].detach(), expected[3][1], atol=1e-9)


def test_a_given_affinity():
    text, p, c = make("clip")
    tokens, affinity = words("clip"), prompt(12, 12)
    check(text.run(tokens, attention={2: affinity}), plain.text(p, c, tokens.numpy(), rules={2: affinity.numpy()}))


@pytest.mark.parametrize("shape", SHAPES)
def test_masked_words_are_seen_by_none(shape):
    text, p, c = make(shape)
    tokens = words(shape, (7, 9, 12))
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[0, 2:4] = mask[1, 5] = mask[2, 0] = False
    check(text.run(tokens, mask=mask), plain.text(p, c, tokens.numpy(), mask=mask.numpy()))
    changed = tokens.clone()
    changed[0, 2], changed[0, 3] = 11, 12
    torch.testing.assert_close(text(changed, mask=mask)[0], text(tokens, mask=mask)[0], atol=1e-12, rtol=0)


def test_padding_changes_nothing_where_it_is_hidden():
    for shape in ("clip", "bert", "first"):
        text = make(shape)[0]
        short, long = words(shape, (5, 5))[:, :5], words(shape, (5, 5))
        torch.testing.assert_close(text(short), text(long, cut=False), atol=1e-10, rtol=0)


def test_positions_of_the_callers_choice():
    text, p, c = make("clip")
    table, tokens = prompt(30, 20), words("clip")
    check(text.run(tokens, positions=table), plain.text(p, c, tokens.numpy(), positions=table.numpy()))
    longer = tiny.tokens((20,), total=20)
    check(text.run(longer, positions=table), plain.text(p, c, longer.numpy(), positions=table.numpy()))


def test_gradients_flow_where_asked_and_nowhere_else():
    text = make("clip")[0].requires_grad_(False)
    given = {0: prompt(2, 20).requires_grad_(), 1: prompt(2, 20, seed=6)}
    text(words("clip", (4, 5)), prompts=given).sum().backward()
    assert given[0].grad.abs().sum() > 0
    assert given[1].grad is None
    assert all(p.grad is None for p in text.parameters())
    embeddings = prompt(1, 6, 20).requires_grad_()
    text(embeddings=embeddings, eot=torch.tensor([3])).sum().backward()
    assert (embeddings.grad[0, :4].abs().sum(1) > 0).all()
    assert (embeddings.grad[0, 4:] == 0).all()  # what stands behind the end token


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of tokens and embeddings"),
        ({"embeddings": torch.zeros(1, 4, 20)}, "embeddings need eot"),
        ({"tokens": torch.zeros(2, 4)}, "tokens must be integers"),
        ({"tokens": torch.zeros(2, 4, dtype=torch.long)}, "end token 49"),
        ({"tokens": tiny.tokens(), "prompts": {0: torch.zeros(3, 20)}}, "12 tokens, prompts included. Got 15"),
        ({"tokens": tiny.tokens(), "prompts": {0: torch.zeros(3, 19)}}, "prompts must have the shape"),
        ({"tokens": tiny.tokens(), "prompts": {3: torch.zeros(3, 20)}}, "prompts must name layers"),
        ({"tokens": tiny.tokens(), "mask": torch.ones(3, 4)}, r"mask must have the shape \(3, 12\)"),
    ],
)
def test_messages(arguments, message):
    with pytest.raises(ClipworksError, match=message):
        make("clip")[0].run(arguments.pop("tokens", None), **arguments)
