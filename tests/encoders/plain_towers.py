"""The towers once more in plain numpy float64, token by token where it matters: the oracle of the seam tests."""

import math

import numpy as np

ERF = np.vectorize(math.erf)
ACT = {
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu": lambda x: 0.5 * x * (1 + ERF(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


def weights_of(module):
    return {k: v.detach().double().numpy() for k, v in module.state_dict().items()}


def linear(p, name, x):
    return x @ p[name + ".weight"].T + p.get(name + ".bias", 0.0)


def norm(p, name, x, eps):
    if name + ".weight" not in p:
        return x
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * p[name + ".weight"] + p[name + ".bias"]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attend(p, name, x, heads, rule="qk", visible=None, context=None):
    """visible: bool (B, N, M). rule: a name, an array (N, N) or (B, N, N), or a list of (share, name)."""
    context = x if context is None else context
    part = {letter: linear(p, f"{name}.{letter}", x if letter == "q" else context) for letter in "qkv"}
    b, n, width = x.shape
    m, d = context.shape[1], width // heads
    weights, y = np.zeros((b, heads, n, m)), np.zeros((b, n, width))
    for i in range(b):
        for h in range(heads):
            piece = {letter: part[letter][i][:, h * d : (h + 1) * d] for letter in "qkv"}
            if isinstance(rule, np.ndarray):
                a = rule if rule.ndim == 2 else rule[i]
            else:
                a = np.zeros((n, m))
                for share, pair in rule if isinstance(rule, list) else [(1.0, rule)]:
                    if pair == "identity":
                        a = a + share * np.eye(n)
                        continue
                    logits = piece[pair[0]] @ piece[pair[1]].T / math.sqrt(d)
                    if visible is not None:
                        logits = np.where(visible[i], logits, -np.inf)
                    a = a + share * softmax(logits)
            weights[i, h] = a
            y[i][:, h * d : (h + 1) * d] = a @ piece["v"]
    return linear(p, f"{name}.out", y), weights


def mlp(p, name, x, act):
    return linear(p, f"{name}.down", ACT[act](linear(p, f"{name}.up", x)))


def run_blocks(p, c, x, head, n_prompts, prompts, rules, seen, causal, depth):
    layers, maps = {}, {}
    for i in range(depth):
        if i in prompts:
            new = np.broadcast_to(prompts[i], (len(x), *prompts[i].shape[-2:]))
            x = np.concatenate([x[:, :head], new, x[:, head + n_prompts :]], 1)
            if seen is not None:
                ones = np.ones((len(x), new.shape[1]), bool)
                seen = np.concatenate([seen[:, :head], ones, seen[:, head + n_prompts :]], 1)
            n_prompts = new.shape[1]
        n = x.shape[1]
        visible = np.ones((len(x), n, n), bool) if seen is None else np.repeat(seen[:, None, :], n, 1)
        if causal:
            visible = (visible & np.tril(np.ones((n, n), bool))) | np.eye(n, dtype=bool)
        name = f"blocks.{i}"
        if getattr(c, "norm_order", "pre") == "post":
            y, maps[i] = attend(p, f"{name}.attention", x, c.heads, rules.get(i, "qk"), visible)
            x = norm(p, f"{name}.norm1", x + y, c.norm_eps)
            x = norm(p, f"{name}.norm2", x + mlp(p, f"{name}.mlp", x, c.activation), c.norm_eps)
        else:
            y, maps[i] = attend(p, f"{name}.attention", norm(p, f"{name}.norm1", x, c.norm_eps), c.heads,
                                rules.get(i, "qk"), visible)  # fmt: skip
            x = x + y
            x = x + mlp(p, f"{name}.mlp", norm(p, f"{name}.norm2", x, c.norm_eps), c.activation)
        layers[i] = x
    return x, layers, maps, n_prompts, seen


def vision(p, c, pixels, *, prompts=(), rules=(), keep=None, mask=None, positions=None):
    """The image tower; returns pooled, tokens, layers, maps."""
    b, _, height, width_px = pixels.shape
    s = c.patch_size
    h, w = height // s, width_px // s
    cells = pixels[:, :, : h * s, : w * s].reshape(b, 3, h, s, w, s).transpose(0, 2, 4, 1, 3, 5).reshape(b, h * w, -1)
    kernel = p["stem.projection.weight"]
    x = cells @ kernel.reshape(len(kernel), -1).T + p.get("stem.projection.bias", 0.0)
    table = p["positions"] if positions is None else positions
    head = int(c.class_token)
    x = x + table[head:]
    if keep is not None:
        x = np.stack([row[k] for row, k in zip(x, keep, strict=True)])
        mask = None if mask is None else np.stack([row[k] for row, k in zip(mask, keep, strict=True)])
    if head:
        x = np.concatenate([np.tile(p["class_token"] + table[0], (b, 1, 1)), x], 1)
    seen = None if mask is None else np.concatenate([np.ones((b, head), bool), mask], 1)
    x = norm(p, "norm_pre", x, c.norm_eps)
    x, layers, maps, n_prompts, seen = run_blocks(p, c, x, head, 0, dict(prompts), dict(rules), seen, False, c.layers)
    y = norm(p, "norm_post", x, c.norm_eps)
    if c.pool == "class":
        pooled = y[:, 0]
    elif c.pool == "mean":
        y, kept = y[:, head + n_prompts :], None if seen is None else seen[:, head + n_prompts :]
        pooled = y.mean(1) if kept is None else np.stack([row[k].mean(0) for row, k in zip(y, kept, strict=True)])
    else:
        query = np.tile(p["pool.probe"], (b, 1, 1))
        visible = None if seen is None else seen[:, None, :]
        z, maps["pool"] = attend(p, "pool.attention", query, c.heads, "qk", visible, context=y)
        pooled = (z + mlp(p, "pool.mlp", norm(p, "pool.norm", z, c.norm_eps), c.activation))[:, 0]
    if "projection.weight" in p:
        pooled = linear(p, "projection", pooled)
    return pooled, x, layers, maps


def text(p, c, tokens=None, *, embeddings=None, eot=None, prompts=(), rules=(), mask=None, positions=None):
    """The text tower over all positions given, nothing cut; returns pooled, tokens, layers, maps."""
    prompts = dict(prompts)
    x = p["tokens.weight"][tokens] if embeddings is None else embeddings
    if tokens is not None:
        eot = [list(row).index(c.eot_id) for row in tokens] if c.pool == "eot" else None
        if c.mask_padding and mask is None:
            mask = tokens != c.pad_id
    n_prompts, b = 0, len(x)
    if 0 in prompts:
        new = np.broadcast_to(prompts[0], (b, *prompts[0].shape[-2:]))
        n_prompts = new.shape[1]
        x = np.concatenate([x[:, :1], new, x[:, 1:]], 1)
        if mask is not None:
            mask = np.concatenate([mask[:, :1], np.ones((b, n_prompts), bool), mask[:, 1:]], 1)
        del prompts[0]
    table = p["positions"] if positions is None else positions
    x = norm(p, "norm_embedding", x + table[: x.shape[1]], c.norm_eps)
    x, layers, maps, n_prompts, mask = run_blocks(
        p, c, x, 1, n_prompts, prompts, dict(rules), mask, c.causal, c.layers
    )
    y = norm(p, "norm", x, c.norm_eps)
    if c.pool == "eot":
        pooled = np.stack([row[e + n_prompts] for row, e in zip(y, eot, strict=True)])
    elif c.pool == "mean":
        pooled = y.mean(1) if mask is None else np.stack([row[m].mean(0) for row, m in zip(y, mask, strict=True)])
    else:
        pooled = y[:, -1 if c.pool == "last" else 0]
    if "projection.weight" in p:
        pooled = linear(p, "projection", pooled)
    return pooled, x, layers, maps
