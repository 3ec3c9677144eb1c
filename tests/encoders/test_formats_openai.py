"""OpenAI's archives: tensors out of a TorchScript zip, configuration from shapes; names checked on a plain CLIP."""

import pytest
import torch
from plain_clip import PlainCLIP, PlainResNet, PlainText, PlainViT, assert_same_features, randomise, token_rows
from torch import nn

from clipworks.encoders.formats import files, openai
from clipworks.encoders.loading import load
from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.errors import BadWeights, ClipworksError

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def vit(width=128, image=32, patch=8, dim=24, vocab=49408):
    text = PlainText(vocab, 16, 64, 2, 1, dim, "quick_gelu", 256)
    return randomise(PlainCLIP(PlainViT(image, patch, width, 3, width // 64, dim, "quick_gelu", 4 * width), text))


def resnet(dim=20):
    return randomise(PlainCLIP(PlainResNet(64, 16, (1, 2, 1, 1), 8, dim),
                               PlainText(200, 12, 128, 2, 2, dim, "quick_gelu", 512)))  # fmt: skip


class Holder(nn.Module):
    """The parameters of a model and, as in the release, three numbers; with code, so that it is an archive."""

    def __init__(self, model, **numbers):
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        for name, parameter in model.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, number in numbers.items():
            self.register_buffer(name, torch.tensor(number))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.logit_scale


def archive(model, path):
    """A TorchScript archive of the model's parameters (traced; what it computes does not matter)."""
    holder = Holder(model, input_resolution=32, context_length=16, vocab_size=1)
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(holder, torch.zeros(1)), str(path))
    return path


def test_vit(tmp_path):
    model = vit()
    path = archive(model, tmp_path / "ViT-tiny.pt")
    assert files.read(path).kind == "torchscript"
    encoder = load(path)
    assert_same_features(encoder, model, token_rows(3, 16, 1, 49000, 49407), 32)
    config = encoder.config
    assert (config.name, config.dim, config.vision.heads, config.text.heads) == ("ViT-tiny", 24, 2, 1)
    assert (config.vision.activation, config.text.activation) == ("quick_gelu", "quick_gelu")
    assert (config.preprocess.size, config.text.eot_id) == (32, 49407)
    assert isinstance(encoder.tokenizer, CLIPTokenizer)
    assert encoder.texts(["a cat", "a much longer text about dogs"]).shape == (2, 24)


def test_resnet(tmp_path):
    model = resnet()
    encoder = load(archive(model, tmp_path / "RN.pt"))
    assert_same_features(encoder, model, token_rows(3, 12, 1, 190, 199), 64)
    assert encoder.config.vision.layers == (1, 2, 1, 1)
    with pytest.raises(ClipworksError, match=r"CLIP's vocabulary has 49408 tokens, this model's 200"):
        encoder.texts("a cat")


def test_half_precision_becomes_float32(tmp_path):
    model = vit(vocab=300).half()
    encoder = load(archive(model, tmp_path / "half.pt"))
    assert encoder.dtype == torch.float32
    assert_same_features(encoder, model.float(), token_rows(3, 16, 1, 290, 299), 32)


def test_missing_and_foreign_tensors_are_named(tmp_path):
    good = files.read(archive(vit(vocab=300), tmp_path / "a.pt"))
    less = {n: t for n, t in good.values.items() if n != "ln_final.bias"}
    with pytest.raises(BadWeights, match=r"missing ln_final.bias, unexpected none.*a.pt"):
        openai.load(files.Tensors(less, good.path, good.kind))
    with pytest.raises(BadWeights, match=r"missing none, unexpected visual.adapter"):
        openai.load(files.Tensors({**good.values, "visual.adapter": torch.zeros(2)}, good.path, good.kind))
    wrong = {**good.values, "visual.ln_post.bias": torch.zeros(7)}
    with pytest.raises(BadWeights, match=r"visual.norm_post.bias is \(7,\), expected \(128,\)"):
        openai.load(files.Tensors(wrong, good.path, good.kind))


def test_an_archive_of_something_else_says_what_was_found(tmp_path):
    path = tmp_path / "other.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(3, 2), torch.zeros(1, 3)), str(path))
    with pytest.raises(BadWeights, match=r"unknown layout.*2 tensors.*torchscript.*weight \(2, 3\)"):
        load(path)
    half = {"visual.conv1.weight": torch.zeros(8, 3, 4, 4), "text_projection": torch.zeros(4, 4)}
    with pytest.raises(BadWeights, match=r"not a model of OpenAI's release.*positional_embedding"):
        openai.load(files.Tensors(half, tmp_path / "x.pt", "torchscript"))
