"""CLIP as its releases lay it out, written with torch's stock modules: the oracle of the format tests.

Parameter names are those of OpenAI's archives and open_clip's state dictionaries (`PlainCLIP`), and of timm's SigLIP
tower inside open_clip (`PlainTrunk`). Only what the tests need; sequence-first, fused query-key-value.
"""

import torch
import torch.nn.functional as F
from torch import nn


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


ACT = {"quick_gelu": QuickGELU, "gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU(approximate="tanh")}


class Block(nn.Module):
    def __init__(self, width, heads, hidden, act, eps=1e-5):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, hidden))
        self.mlp.add_module("act", ACT[act]())
        self.mlp.add_module("c_proj", nn.Linear(hidden, width))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Stack(nn.Module):
    def __init__(self, layers, *shape, **options):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(*shape, **options) for _ in range(layers))

    def forward(self, x, mask=None):
        x = x.permute(1, 0, 2)
        for block in self.resblocks:
            x = block(x, mask)
        return x.permute(1, 0, 2)


class PlainViT(nn.Module):
    def __init__(self, image, patch, width, layers, heads, dim, act, hidden):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((image // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Stack(layers, width, heads, hidden, act)
        self.proj = nn.Parameter(torch.randn(width, dim))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class Bottleneck(nn.Module):
    def __init__(self, inner, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = None
        if stride > 1 or inner != 4 * width:
            self.downsample = nn.Sequential()
            self.downsample.add_module("-1", nn.AvgPool2d(stride))
            self.downsample.add_module("0", nn.Conv2d(inner, 4 * width, 1, bias=False))
            self.downsample.add_module("1", nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.pool(F.relu(self.bn2(self.conv2(y))))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class AttentionPool(nn.Module):
    def __init__(self, cells, width, heads, dim):
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(cells + 1, width))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj, self.heads = nn.Linear(width, dim), heads

    def forward(self, x):
        x = x.flatten(2).permute(0, 2, 1)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding
        q, k, v = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        return self.c_proj((weights @ v).transpose(1, 2).flatten(2))[:, 0]


class PlainResNet(nn.Module):
    def __init__(self, image, width, layers, heads, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(n) for n in (width // 2, width // 2, width))
        inner = width
        for stage, count in enumerate(layers):
            blocks = []
            for j in range(count):
                blocks.append(Bottleneck(inner, width * 2**stage, 2 if stage and not j else 1))
                inner = 4 * width * 2**stage
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool((image // 32) ** 2, inner, heads, dim)

    def forward(self, x):
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)))
        x = F.avg_pool2d(x, 2)
        return self.attnpool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))


class PlainText(nn.Module):
    def __init__(self, vocab, context, width, layers, heads, dim, act, hidden, *, causal=True, pool="eot", bias=False,
                 eps=1e-5):  # fmt: skip
        super().__init__()
        self.token_embedding = nn.Embedding(vocab, width)
        self.positional_embedding = nn.Parameter(torch.randn(context, width))
        self.transformer = Stack(layers, width, heads, hidden, act, eps=eps)
        self.ln_final = nn.LayerNorm(width, eps)
        self.text_projection = nn.Linear(width, dim) if bias else nn.Parameter(torch.randn(width, dim))
        self.causal, self.pool, self.linear = causal, pool, bias

    def forward(self, tokens):
        length = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:length]
        mask = torch.full((length, length), -torch.inf).triu(1) if self.causal else None
        x = self.ln_final(self.transformer(x, mask))
        x = x[torch.arange(len(x)), tokens.argmax(1)] if self.pool == "eot" else x[:, -1]
        return self.text_projection(x) if self.linear else x @ self.text_projection


class PlainCLIP(nn.Module):
    """The text tower's parameters stand at the top (`custom` puts them under "text.")."""

    def __init__(self, visual, text, custom=False, bias=None):
        super().__init__()
        self.visual = visual
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        if bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor(float(bias)))
        if custom:
            self.text = text
        else:
            for name, child in text.named_children():
                self.add_module(name, child)
            for name, parameter in text.named_parameters(recurse=False):
                self.register_parameter(name, parameter)
        self.words = [text]  # in a list, so that it is not registered a second time

    def forward(self, pixels, tokens):
        return F.normalize(self.visual(pixels), dim=1), F.normalize(self.words[0](tokens), dim=1)


class TimmBlock(nn.Module):
    def __init__(self, width, heads, hidden, act):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.attn, self.mlp, self.heads = nn.Module(), nn.Module(), heads
        self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.act = ACT[act]()

    def forward(self, x):
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp.fc2(self.act(self.mlp.fc1(self.norm2(x))))


class PlainTrunk(nn.Module):
    """timm's SigLIP tower under "trunk."."""

    def __init__(self, image, patch, width, layers, heads, hidden, act):
        super().__init__()
        t = self.trunk = nn.Module()
        t.patch_embed = nn.Module()
        t.patch_embed.proj = nn.Conv2d(3, width, patch, stride=patch)
        t.pos_embed = nn.Parameter(torch.randn(1, (image // patch) ** 2, width))
        t.blocks = nn.ModuleList(TimmBlock(width, heads, hidden, act) for _ in range(layers))
        t.norm = nn.LayerNorm(width, 1e-6)
        p = t.attn_pool = nn.Module()
        p.latent = nn.Parameter(torch.randn(1, 1, width))
        p.q, p.kv, p.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        p.norm, p.mlp = nn.LayerNorm(width, 1e-6), nn.Module()
        p.mlp.fc1, p.mlp.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.heads, self.act = heads, ACT[act]()

    def forward(self, pixels):
        t, p = self.trunk, self.trunk.attn_pool
        x = t.patch_embed.proj(pixels).flatten(2).transpose(1, 2) + t.pos_embed
        for block in t.blocks:
            x = block(x)
        x = t.norm(x)
        q = p.q(p.latent.expand(len(x), -1, -1)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = p.kv(x).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1) @ v
        y = p.proj(y.transpose(1, 2).flatten(2))
        return (y + p.mlp.fc2(self.act(p.mlp.fc1(p.norm(y)))))[:, 0]


def randomise(model, seed=0):
    """Random values in every parameter and statistic, so that none can be mixed up unnoticed."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim:
                gain = name.endswith("weight") and p.ndim == 1
                p.copy_((1 if gain else 0) + 0.1 * torch.randn(p.shape, generator=draw))
        for name, b in model.named_buffers():
            if b.is_floating_point():
                b.copy_((0.5 if name.endswith("var") else 0) + torch.rand(b.shape, generator=draw))
    return model.eval()


def token_rows(count, length, low, high, end, pad=0, seed=1):
    """Ids between `low` and `high`, with the end token at another place in every row."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.full((count, length), pad)
    for i in range(count):
        stop = length - 1 - i
        rows[i, :stop] = torch.randint(low, high, (stop,), generator=draw)
        rows[i, stop] = end
    return rows


def assert_same_features(encoder, model, tokens, image, atol=1e-5):
    """Image and text features of both are equal, and so are the logits."""
    pixels = torch.randn(3, 3, image, image, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        images, texts, scale = encoder(pixels, tokens)
        want_images, want_texts = model(pixels, tokens)
        torch.testing.assert_close(images, want_images, atol=atol, rtol=0)
        torch.testing.assert_close(texts, want_texts, atol=atol, rtol=0)
        want = model.logit_scale.exp() * want_images @ want_texts.T + getattr(model, "logit_bias", 0.0)
        got = scale * images @ texts.T + (0.0 if encoder.bias is None else encoder.bias)
        torch.testing.assert_close(got, want, atol=10 * atol, rtol=0)
