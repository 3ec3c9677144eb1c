"""Small encoders, images and plain recomputations for the tests of this folder."""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import clipworks
from clipworks.encoders.config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from clipworks.encoders.encoder import Encoder
from clipworks.encoders.tokenizers.bpe import CLIPTokenizer

NAMES = ["cat", "golden_retriever", "fire engine"]
VISION = dict(image_size=32, patch_size=8, width=24, layers=3, heads=3, mlp_width=40)
TEXT = dict(width=20, layers=3, heads=2, mlp_width=36, context_length=40)
SHAPES = {
    "clip": {},
    "bert": dict(causal=False, pool="mean", norm_order="post", embedding_norm=True, norm_final=False,
                 mask_padding=True, activation="gelu"),
    "siglip": dict(causal=False, pool="last"),
}  # fmt: skip


@functools.cache
def encoder(shape="clip", seed=3):
    """A small encoder with weights large enough that its tokens matter."""
    config = EncoderConfig("toy", 16, VisionConfig(**VISION), TextConfig(**TEXT, **SHAPES[shape]), PreprocessConfig(32))
    made = Encoder(config, CLIPTokenizer(), seed=seed).eval()
    with torch.no_grad():
        made.text.tokens.weight.mul_(20)
    return made


@functools.cache
def vit_b16():
    """The shapes of ViT-B/16, without weights."""
    with torch.device("meta"):
        return Encoder(EncoderConfig(vision=VisionConfig(patch_size=16)), CLIPTokenizer(), seed=None)


def numbers(method):
    """How many numbers a method learns in ViT-B/16."""
    return sum(value.numel() for value in method.start(vit_b16()).values())


def pixels(n=6, seed=0, classes=3):
    """Noise around one picture per class, and the classes."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    means = torch.randn(classes, 3, 32, 32, generator=torch.Generator().manual_seed(99))
    return means[y] + 0.5 * torch.randn(n, 3, 32, 32, generator=draw), y.tolist()


def zero_shot(model, x, names=NAMES, template="a photo of a {}."):
    """Logits by the encoder's own methods."""
    words = model.texts([template.format(name.replace("_", " ")) for name in names])
    return (model.logit_scale * model.images(x) @ words.T).numpy()


def sentence(model, name, context, position="end", words=()):
    """Unit vector of one sentence, laid out by hand over the whole context length, no token shared or cut."""
    ids = model.tokenizer
    start, end = [ids.start_id], [ids.eot_id]
    bare = [i for word in ids.words(name.replace("_", " ")) for i in word]
    stop = [i for word in ids.words(".") for i in word]

    def spoken(tokens):
        return model.text.tokens(torch.tensor(tokens, dtype=torch.long))

    cut = {"end": len(context), "middle": len(context) // 2, "front": 0}[position]
    parts = [spoken(start), context[:cut], spoken(list(words)), spoken(bare), context[cut:], spoken(stop + end)]
    row = torch.cat([part.to(model.dtype) for part in parts])
    length, total = len(row), model.context_length
    row = torch.cat([row, spoken([model.config.text.pad_id] * (total - length))])[None]
    mask = torch.arange(total)[None] < length if model.config.text.mask_padding else None
    return model.encode_text(embeddings=row, eot=torch.tensor([length - 1]), mask=mask)[0]


def assert_only_the_learned_moves(method, x, y):
    """Fitting leaves the encoder bit for bit, gives it no gradient, and moves every learned tensor."""
    model = method.encoder
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = method.fit(x, y).start(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(q.grad is None and q.requires_grad for q in model.parameters())
    assert not any(module.training for module in model.modules())
    assert start.keys() == method.learned_.keys()
    assert not any(torch.equal(start[name], value) for name, value in method.learned_.items())


def assert_file_round_trip(method, x, path):
    """What was saved answers alike, and holds nothing of the encoder."""
    method.save(path)
    again = type(method).load(path, encoder=method.encoder)
    np.testing.assert_array_equal(again.logits(x), method.logits(x))
    assert again.names_ == method.names_
    assert path.stat().st_size < 2000 + sum(4 * v.numel() + 100 for v in method.learned_.values())


def drawings():
    """Eight pictures of two kinds, each a little different."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(8):
        canvas = np.full((96, 96, 3), 235, np.uint8)
        top, left = rng.integers(5, 40, 2)
        canvas[top : top + 50, left : left + 50] = ((200, 30, 30), (30, 60, 200))[number % 2]
        made.append(Image.fromarray(canvas))
    return made, [0, 1] * 4, ["red square", "blue square"]


def assert_works_on_the_bundled_model(make):
    """Learns on clipworks-small with pictures as they come; `make(names, encoder, **settings)`."""
    images, y, names = drawings()
    model = clipworks.load()
    method = make(names, encoder=model)
    assert_only_the_learned_moves(method, images, y)
    epoch = len(method.losses_) // method.epochs
    assert method.losses_[-epoch:].mean() < method.losses_[:epoch].mean()
    assert method.predict_proba(images).shape == (8, 2)
    return method


def unit(rows):
    return F.normalize(rows, dim=-1)
