"""The layers of both towers: attention with rules, feed-forward, block, and the loop that runs blocks with seams.

Tensors are batch first and contiguous, (B, N, width). Query, key, value and output are four plain linears, so
low-rank, singular-value or expert versions are module swaps (`swap`). Attention is the fused kernel; explicit
weights are computed only where a rule or an attention map asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ClipworksError, check_choice, check_range
from .positions import resize_positions, rotary, stretch_positions

__all__ = ["MLP", "Attention", "Block", "QuickGELU", "TowerOutput", "activation", "check_mask", "dot_product",
           "layer_index", "masked_mean", "put_prompts", "resize_positions", "rotary", "run_blocks",
           "stretch_positions", "swap", "wide"]  # fmt: skip

Rule: TypeAlias = "str | torch.Tensor | Callable[..., torch.Tensor]"
SHORT = 128  # keys; see `dot_product`
RULES = ("qk", "vv", "kk", "qq", "identity")


@dataclass
class TowerOutput:
    """What a tower's `run` returns.

    Attributes
    ----------
    pooled : (B, dim), in the joint space, not normalised
    tokens : (B, N, width), the last block's output: class token, prompts, then patches or words
    layers : asked layer -> its output (B, N, width); for a ResNet the stage's map (B, channels, h, w)
    attentions : asked layer -> attention weights (B, heads, N, N); "pool" -> those of an attention pool,
        (B, heads, 1, N)
    prefix : number of tokens before the patches or words (class or start token and prompts) in `tokens`
    grid : rows and columns of the patches, None for texts and after dropping patches
    class_token : whether the first token is a class token
    stem : asked size of cells in pixels -> the stem's map (B, channels, h, w)
    """

    pooled: torch.Tensor
    tokens: torch.Tensor
    layers: dict[int, torch.Tensor] = field(default_factory=dict)
    attentions: dict[int | str, torch.Tensor] = field(default_factory=dict)
    prefix: int = 0
    grid: tuple[int, int] | None = None
    class_token: bool = False
    stem: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def patches(self) -> torch.Tensor:
        """`tokens` without class token and prompts."""
        return self.tokens[:, self.prefix :]

    def class_attention(self, layer: int | str) -> torch.Tensor:
        """What the class token, or the query of the "pool", looks at in a layer asked for: (B, heads, patches)."""
        check_choice("layer", layer, self.attentions)
        if layer != "pool" and not self.class_token:
            raise ClipworksError(f"this tower has no class token; ask for output_attention=('pool',). Got {layer!r}.")
        return self.attentions[layer][:, :, 0, -self.patches.shape[1] :]


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation that OpenAI's models were trained with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return x * torch.sigmoid(1.702 * x)
        return torch.sigmoid_(1.702 * x).mul_(x)  # the same numbers with one new tensor in place of three


def activation(name: str) -> nn.Module:
    """The module of an activation's name."""
    table: dict[str, Callable[[], nn.Module]] = {
        "quick_gelu": QuickGELU,
        "gelu": nn.GELU,
        "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
        "relu": nn.ReLU,
    }
    return table[check_choice("activation", name, table)]()


class MLP(nn.Module):
    """Feed-forward part: up, activation, down."""

    def __init__(self, width: int, hidden: int, act: str):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, hidden), activation(act), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


class Attention(nn.Module):
    """Multi-head attention with separate linears and an exchangeable rule.

    Parameters
    ----------
    width, heads : channels of a token, and into how many heads they are split
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.v, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, width) to (B, heads, N, width / heads)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        causal: bool = False,
        rule: Rule | None = None,
        need_map: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend from `x` (B, N, width) to `context` (default: itself).

        Parameters
        ----------
        mask : bool, broadcastable to (B, heads, N, M); False hides a key from a query
        causal : hide the keys behind the query as well
        rule : see `attention_weights`; None is "qk"
        need_map : also return the weights; the features are the same either way

        Returns
        -------
        (B, N, width), and the weights (B, heads, N, M) or None
        """
        context = x if context is None else context
        q, k, v = self.split(self.q(x)), self.split(self.k(context)), self.split(self.v(context))
        rule = "qk" if rule is None else rule
        usual = isinstance(rule, str) and rule == "qk"
        visible = mask
        if causal:
            visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            if mask is not None:  # a token always sees itself, so that no row is empty
                visible = (visible & mask) | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        weights = attention_weights(rule, q, k, v, visible) if need_map or not usual else None
        if usual or weights is None:
            fused = causal and mask is None  # the kernel then needs no mask
            y = dot_product(q, k, v, None if fused else visible, fused)
        else:
            y = weights.to(v.dtype) @ v
        return self.out(y.transpose(1, 2).flatten(2)), weights if need_map else None


def dot_product(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, causal: bool = False
) -> torch.Tensor:
    """Scaled dot-product attention: torch's fused kernel, except for short rows on a CPU without gradients, where two
    plain products are two to seven times as fast (12 to 101 tokens, torch 2.13)."""
    if q.device.type != "cpu" or k.shape[-2] > SHORT or torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return logits.softmax(-1) @ v


def attention_weights(
    rule: Rule, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Weights of a rule, at least in float32.

    Parameters
    ----------
    rule : "qk" (the trained one), "vv", "kk", "qq" (softmax of a projection with itself), sums of these such as
        "qq+kk", "identity" (every token sees itself), "mixed:a" ((1 - a) qk + a vv, a in [0, 1]), an affinity
        tensor (N, N), (B, N, N) or (B, heads, N, N) used as it is, or a function of (q, k, v, mask) that returns
        the weights
    q, k, v : (B, heads, N, channels), not scaled
    mask : bool, broadcastable to (B, heads, N, N); False hides a key. Not applied to affinities and "identity".

    Returns
    -------
    (B, heads, N, N)
    """
    n = q.shape[-2]
    if isinstance(rule, torch.Tensor):
        weights = rule if rule.ndim in (2, 4) else rule[:, None]
        if rule.ndim not in (2, 3, 4) or weights.shape[-2:] != (n, k.shape[-2]):
            raise ClipworksError(
                f"attention must be an affinity of shape ({n}, {n}), (B, {n}, {n}) or (B, heads, {n}, {n}) for "
                f"{n} tokens, class token and prompts included. Got shape {tuple(rule.shape)}."
            )
        return wide(weights.to(q.device)).expand(*q.shape[:2], -1, -1)
    if callable(rule):
        return rule(q, k, v, mask)
    if rule.startswith("mixed:"):
        share = mixed_share(rule)
        return (1 - share) * attention_weights("qk", q, k, v, mask) + share * attention_weights("vv", q, k, v, mask)
    total: torch.Tensor | float = 0.0
    for name in rule.split("+"):
        check_choice("attention", name, RULES)
        if name == "identity":
            part = wide(torch.eye(n, dtype=q.dtype, device=q.device)).expand(*q.shape[:2], -1, -1)
        else:
            left, right = ({"q": q, "k": k, "v": v}[letter] for letter in name)
            logits = wide(left) @ wide(right).transpose(-2, -1) * q.shape[-1] ** -0.5
            part = (logits if mask is None else logits.masked_fill(~mask, -torch.inf)).softmax(-1)
        total = part + total
    return torch.as_tensor(total)


def mixed_share(rule: str) -> float:
    """The number in "mixed:a"."""
    try:
        share = float(rule.split(":", 1)[1])
    except ValueError:
        raise ClipworksError(f"attention 'mixed:a' needs a number a in [0, 1]. Got {rule!r}.") from None
    return check_range("attention 'mixed:a'", share, 0, 1)


class Block(nn.Module):
    """Attention and feed-forward with residual sums; norms inside the branches ("pre") or after the sums
    ("post")."""

    def __init__(self, width: int, heads: int, mlp_width: int, act: str, eps: float, order: str = "pre"):
        super().__init__()
        self.order = order
        self.norm1, self.attention = nn.LayerNorm(width, eps), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps), MLP(width, mlp_width, act)

    def forward(
        self,
        x: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        causal: bool = False,
        rule: Rule | None = None,
        need_map: bool = False,
        at: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, N, width) to the same shape, with the attention weights if asked for.

        `at`, int64 (B,), names the only token of each row whose output is wanted: all others serve as keys and values
        alone, and the result is (B, 1, width).
        """
        y = context = x if self.order == "post" else self.norm1(x)
        if at is not None:
            if causal:
                places, own = torch.arange(x.shape[1], device=x.device), at[:, None, None, None]
                seen = places <= own if mask is None else (places <= own) & mask | (places == own)  # itself always
                mask, causal = seen, False
            x, y = pick(x, at), pick(context, at)
        y, weights = self.attention(y, context, mask=mask, causal=causal, rule=rule, need_map=need_map)
        if self.order == "post":
            x = self.norm1(x + y)
            return self.norm2(x + self.mlp(x)), weights
        x = x + y
        return x + self.mlp(self.norm2(x)), weights


def pick(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """One token of every row, (B, N, width) to (B, 1, width); `at` is int64 (B,)."""
    return x[torch.arange(x.shape[0], device=x.device), at][:, None]


def wide(x: torch.Tensor) -> torch.Tensor:
    """Half precision becomes float32, the rest stays: for sums, softmax and norms."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def masked_mean(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over the tokens of (B, N, width) that `mask` (B, N) does not hide."""
    if mask is None:
        return wide(x).mean(1).to(x.dtype)
    total = wide(x).masked_fill(~mask[:, :, None], 0).sum(1)
    return (total / mask.sum(1, keepdim=True)).to(x.dtype)


def layer_index(argument: str, layer: int | str, depth: int) -> int:
    """A layer's number counted from the front; negative ones count from the end."""
    if not isinstance(layer, int) or not -depth <= layer < depth:
        raise ClipworksError(f"{argument} must name layers from 0 to {depth - 1} (or -{depth} to -1). Got {layer!r}.")
    return layer % depth


def check_mask(mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`mask` as bool, after checking that it fits `x` (B, N, width) and leaves a token in every row."""
    if tuple(mask.shape) != tuple(x.shape[:2]):
        raise ClipworksError(f"mask must have the shape {tuple(x.shape[:2])} (batch, tokens). Got {tuple(mask.shape)}.")
    mask = mask.bool()
    if not torch.compiler.is_exporting() and not bool(mask.any(1).all()):
        raise ClipworksError("mask hides every token of at least one row; leave at least one.")
    return mask


def put_prompts(x: torch.Tensor, prompts: torch.Tensor, head: int, old: int) -> torch.Tensor:
    """Put prompts (n, width) or (B, n, width) behind the first `head` tokens in place of `old` earlier ones."""
    if prompts.ndim not in (2, 3) or prompts.shape[-1] != x.shape[-1] or (prompts.ndim == 3 and len(prompts) != len(x)):
        raise ClipworksError(
            f"prompts must have the shape (n, {x.shape[-1]}) or ({len(x)}, n, {x.shape[-1]}). "
            f"Got {tuple(prompts.shape)}."
        )
    prompts = prompts.to(x.dtype).expand(len(x), -1, -1)
    return torch.cat([x[:, :head], prompts, x[:, head + old :]], dim=1)


def run_blocks(
    blocks: Iterable[nn.Module],
    x: torch.Tensor,
    *,
    head: int,
    n_prompts: int = 0,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    prompts: Mapping[int, torch.Tensor] | None = None,
    attention: Mapping[int, Rule] | None = None,
    output_layers: Sequence[int] = (),
    output_attention: Sequence[int | str] = (),
    at: Callable[[int], torch.Tensor] | None = None,
    stop: int | None = None,
) -> tuple[torch.Tensor, dict[int, torch.Tensor], dict[int | str, torch.Tensor], int]:
    """Run the blocks with the seams that both towers share.

    Parameters
    ----------
    x : (B, N, width) with `n_prompts` prompts behind the first `head` tokens
    mask : bool (B, N), True for tokens that others may see
    prompts : layer -> prompts that this block sees instead of those before it
    attention : layer -> rule (see `attention_weights`)
    output_layers, output_attention : layers whose output or weights are kept, under the numbers given here
    at : from the number of prompts to the only token of every row, int64 (B,), whose last output is wanted; where
        the last block has its usual rule and nothing else of it is kept, the others are then not computed
    stop : run only the blocks before this one; the last output is then its input

    Returns
    -------
    last output ((B, 1, width) with `at`), kept outputs, kept weights, number of prompts in the last output
    """
    depth = len(blocks := list(blocks))
    prompts = {layer_index("prompts", i, depth): p for i, p in (prompts or {}).items()}
    rules = {layer_index("attention", i, depth): r for i, r in (attention or {}).items()}
    kept = [(layer_index("output_layers", i, depth), i) for i in output_layers]
    mapped = [(layer_index("output_attention", i, depth), i) for i in output_attention if i != "pool"]
    layers: dict[int, torch.Tensor] = {}
    maps: dict[int | str, torch.Tensor] = {}
    # a single row stays whole: products of one row take another kernel, and a vector would know its batch's size
    whole = {*rules, *dict(kept), *dict(mapped)}
    lean = x.shape[0] > 1 and isinstance(next(reversed(blocks), None), Block) and depth - 1 not in whole
    if stop is not None:
        stop, lean = layer_index("stop", stop, depth), False
        late = [number for number in (*prompts, *rules, *dict(kept), *dict(mapped)) if number >= stop]
        if late:
            raise ClipworksError(f"stop {stop} leaves out layer {min(late)}, for which something was asked.")
    for number, block in enumerate(blocks[:stop]):
        if number in prompts:
            before, x = x.shape[1], put_prompts(x, prompts[number], head, n_prompts)
            fresh = n_prompts + x.shape[1] - before
            if mask is not None:
                seen = mask.new_ones(len(mask), fresh)
                mask = torch.cat([mask[:, :head], seen, mask[:, head + n_prompts :]], dim=1)
            n_prompts = fresh
        names = [name for i, name in mapped if i == number]
        keys = None if mask is None else mask[:, None, None, :]
        how = {"mask": keys, "causal": causal, "rule": rules.get(number), "need_map": bool(names)}
        if at is not None and lean and number == depth - 1:
            how["at"] = at(n_prompts)
        x, weights = block(x, **how)
        maps.update((name, weights) for name in names)
        layers.update((name, x) for i, name in kept if i == number)
    if at is not None and not lean:
        x = pick(x, at(n_prompts))
    return x, layers, maps, n_prompts


def swap(module: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """Replace the submodule at a dotted path, e.g. `swap(encoder.visual, "blocks.3.attention.q", LowRank(...))`.

    Returns
    -------
    the old submodule, so that a second swap undoes the first

    Raises
    ------
    ClipworksError
        If there is no submodule of that name.
    """
    names = [name for name, _ in module.named_modules() if name]
    check_choice("path", path, names)
    parent, _, name = path.rpartition(".")
    old = module.get_submodule(path)
    setattr(module.get_submodule(parent), name, new)
    return old
