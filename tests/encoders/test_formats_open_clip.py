"""open_clip's state dictionaries against plain towers with their names; what is not understood is refused."""

import json

import pytest
import torch
from plain_clip import (
    PlainCLIP,
    PlainResNet,
    PlainText,
    PlainTrunk,
    PlainViT,
    assert_same_features,
    randomise,
    token_rows,
)
from safetensors.torch import save_file

from clipworks.encoders.formats import open_clip
from clipworks.encoders.formats.build import blank
from clipworks.encoders.loading import load
from clipworks.encoders.published import ARCHITECTURES
from clipworks.errors import BadWeights, ClipworksError

DIM = 24


def clip_config(quick=False, vocab=300, **more):
    return {
        "embed_dim": DIM,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8, "mlp_ratio": 3.0},
        "text_cfg": {"context_length": 16, "vocab_size": vocab, "width": 32, "heads": 2, "layers": 2},
        **({"quick_gelu": True} if quick else {}),
        **more,
    }  # fmt: skip


def clip_model(act="gelu", custom=False, bias=None, vocab=300):
    return randomise(PlainCLIP(PlainViT(32, 8, 48, 2, 3, DIM, act, 144),
                               PlainText(vocab, 16, 32, 2, 2, DIM, act, 128), custom, bias))  # fmt: skip


def siglip(act, text_act, width=48, image=32, bias=-7.5):
    text = PlainText(40, 8, width, 2, 3, width, text_act, 4 * width, causal=False, pool="last", bias=True, eps=1e-6)
    return randomise(PlainCLIP(PlainTrunk(image, 16, width, 2, 3, 4 * width, act), text, True, bias))


def siglip_config(name="vit_base_patch16_siglip_224", width=48, image=32, **text):
    return {
        "embed_dim": width, "init_logit_bias": -10, "custom_text": True,
        "vision_cfg": {"image_size": image, "timm_model_name": name, "timm_model_pretrained": False,
                       "timm_pool": "map", "timm_proj": "none", "timm_model_kwargs": {"num_heads": 3}},
        "text_cfg": {"context_length": 8, "vocab_size": 40, "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
                     "tokenizer_kwargs": {"clean": "canonicalize"}, "width": width, "heads": 3, "layers": 2,
                     "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
                     **text},
    }  # fmt: skip


def folder(path, model, config=None, preprocess=None, file="open_clip_model.safetensors"):
    path.mkdir(exist_ok=True)
    state = {n: t.detach().clone() for n, t in model.state_dict().items()}
    if file.endswith(".safetensors"):
        save_file(state, path / file)
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{n}": t for n, t in state.items()}}, path / file)
    if config is not None:
        record = {"model_cfg": config, "preprocess_cfg": preprocess or {}}
        (path / "open_clip_config.json").write_text(json.dumps(record))
    return path


def word_tokenizer(path, pad="</s>"):
    """A tokenizer.json of 40 words that ends every text with </s>, and the files that name the special tokens."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    words = ["<unk>", "</s>", "a", "cat", "dog", *(f"w{i}" for i in range(35))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"pad_token": pad, "eos_token": {"content": "</s>"}, "tokenizer_class": "SiglipTokenizer"}
    (path / "tokenizer_config.json").write_text(json.dumps(names))


@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", "epoch_3.pt"])
@pytest.mark.parametrize("quick", [False, True])
def test_vit(tmp_path, quick, file):
    act = "quick_gelu" if quick else "gelu"
    model = clip_model(act)
    encoder = load(folder(tmp_path / "m", model, clip_config(quick), file=file))
    assert (encoder.config.vision.activation, encoder.config.text.activation) == (act, act)
    assert_same_features(encoder, model, token_rows(3, 16, 1, 290, 299), 32)


def test_the_flag_decides_the_numbers(tmp_path):
    """The same tensors under the other activation give other vectors: the flag is not decoration."""
    model = clip_model("gelu")
    wrong = load(folder(tmp_path / "m", model, clip_config(quick=True)))
    with pytest.raises(AssertionError):
        assert_same_features(wrong, model, token_rows(3, 16, 1, 290, 299), 32)


def test_custom_text_and_bias(tmp_path):
    model = clip_model("quick_gelu", custom=True, bias=-3.0)
    encoder = load(folder(tmp_path / "m", model, clip_config(True, custom_text=True, init_logit_bias=-10)))
    assert encoder.bias.item() == -3.0
    assert_same_features(encoder, model, token_rows(3, 16, 1, 290, 299), 32)


def test_resnet(tmp_path):
    model = randomise(PlainCLIP(PlainResNet(64, 16, (1, 2, 1, 1), 8, DIM),
                                PlainText(300, 16, 32, 2, 2, DIM, "gelu", 128)))  # fmt: skip
    config = clip_config(vision_cfg={"image_size": 64, "layers": [1, 2, 1, 1], "width": 16, "patch_size": None})
    assert_same_features(load(folder(tmp_path / "m", model, config)), model, token_rows(3, 16, 1, 290, 299), 64)


@pytest.mark.parametrize(("name", "act", "text", "text_act"), [
    ("vit_base_patch16_siglip_224", "gelu", {}, "gelu"),
    ("vit_base_patch16_siglip_224", "gelu", {"act_kwargs": {"approximate": "tanh"}}, "gelu_tanh"),
    ("vit_so400m_patch16_siglip_256", "gelu_tanh", {"act_kwargs": {"approximate": "tanh"}}, "gelu_tanh"),
])  # fmt: skip
def test_siglip(tmp_path, name, act, text, text_act):
    model = siglip(act, text_act)
    encoder = load(folder(tmp_path / "m", model, siglip_config(name, **text)))
    assert (encoder.config.vision.activation, encoder.config.text.activation) == (act, text_act)
    assert_same_features(encoder, model, token_rows(3, 8, 2, 40, 1, pad=1), 32)
    preprocess = encoder.config.preprocess
    assert (preprocess.mean, preprocess.resize, preprocess.crop) == ((0.5, 0.5, 0.5), "squash", "none")


def test_siglip_with_its_tokenizer(tmp_path):
    model = siglip("gelu", "gelu")
    path = folder(tmp_path / "m", model, siglip_config())
    with pytest.raises(ClipworksError, match=r"came without its tokenizer.*tokenizer.json"):
        load(path).texts("a cat")
    word_tokenizer(path)
    encoder = load(path)
    assert encoder.tokenize(["A cat!", "dog"]).tolist() == [[2, 3, 1, 1, 1, 1, 1, 1], [4, 1, 1, 1, 1, 1, 1, 1]]
    with torch.no_grad():
        want = torch.nn.functional.normalize(model.words[0](torch.tensor([[2, 3, *[1] * 6]])), dim=1)
    torch.testing.assert_close(encoder.texts("a cat"), want, atol=1e-5, rtol=0)


def test_preprocessing_comes_from_the_file(tmp_path):
    told = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "resize_mode": "squash"}
    config = load(folder(tmp_path / "m", clip_model(), clip_config(), told)).config.preprocess
    assert (config.mean, config.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (config.size, config.interpolation, config.resize, config.crop) == (32, "bilinear", "squash", "none")


def test_a_bare_model_configuration_is_enough(tmp_path):
    path = folder(tmp_path / "m", clip_model())
    (path / "open_clip_config.json").write_text(json.dumps(clip_config()))
    assert_same_features(load(path), clip_model(), token_rows(3, 16, 1, 290, 299), 32)


@pytest.fixture
def tiny_architectures(monkeypatch):
    for name, quick in (("ViT-tiny", False), ("ViT-tiny-quickgelu", True)):
        monkeypatch.setitem(ARCHITECTURES, name, clip_config(quick))


def test_without_configuration_the_architecture_must_be_named(tmp_path, tiny_architectures):
    model = clip_model("quick_gelu")
    path = folder(tmp_path / "m", model, file="tiny.pt") / "tiny.pt"
    with pytest.raises(BadWeights, match=r"say nothing of their activation.*'ViT-tiny:.*' or 'ViT-tiny-quickgelu:"):
        load(path)
    assert_same_features(load(f"ViT-tiny-quickgelu:{path}"), model, token_rows(3, 16, 1, 290, 299), 32)
    with pytest.raises(BadWeights, match=r"do not fit the configuration|shapes do not fit"):
        load(f"ViT-B-32:{path}")
    with pytest.raises(ClipworksError, match=r"no file 'nowhere.pt'"):
        load("ViT-tiny:nowhere.pt")
    with pytest.raises(ClipworksError, match=r"Did you mean 'ViT-tiny'"):
        load(f"ViT-tinny:{path}")


REFUSED = {
    "unknown part": (clip_config(multimodal_cfg={"width": 8}), "multimodal_cfg"),
    "layer scale": (clip_config(vision_cfg={**clip_config()["vision_cfg"], "ls_init_value": 0.1}), "ls_init_value"),
    "attentional pool": (clip_config(vision_cfg={**clip_config()["vision_cfg"], "attentional_pool": True}), "attentio"),
    "norm after pool": (clip_config(vision_cfg={**clip_config()["vision_cfg"], "final_ln_after_pool": True}), "final_"),
    "other activation": (clip_config(text_cfg={**clip_config()["text_cfg"], "act_kwargs": {"beta": 2}}), "act_kwargs"),
    "hf text tower": (clip_config(text_cfg={"hf_model_name": "roberta-base"}), "hf_model_name"),
    "other timm tower": (siglip_config("convnext_base"), "of timm's towers those of SigLIP are known"),
    "no text": ({"embed_dim": 8, "vision_cfg": {}}, "text_cfg"),
    "wrong type": ({"embed_dim": 8, "vision_cfg": 3, "text_cfg": []}, "open_clip_config.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_followed_is_refused(tmp_path, case):
    config, reason = REFUSED[case]
    with pytest.raises(BadWeights, match=reason) as caught:
        load(folder(tmp_path / "m", clip_model(), config))
    assert "open_clip_config.json" in str(caught.value)


def test_configuration_that_does_not_fit_the_tensors(tmp_path):
    config = clip_config()
    config["vision_cfg"]["layers"] = 3
    with pytest.raises(BadWeights, match=r"missing visual.transformer.resblocks.2.attn.in_proj_weight"):
        load(folder(tmp_path / "m", clip_model(), config))
    (tmp_path / "m" / "open_clip_config.json").write_text("{")
    with pytest.raises(BadWeights, match=r"open_clip_config.json is not JSON"):
        load(tmp_path / "m")


# millions of parameters, from open_clip's docs/model_profile.csv: the model, its image tower
PUBLISHED = {
    "RN50": (102.01, 38.32), "RN101": (119.69, 56.26), "RN50x4": (178.3, 87.14), "RN50x16": (290.98, 167.33),
    "RN50x64": (623.26, 420.38), "ViT-B-32": (151.28, 87.85), "ViT-B-32-256": (151.29, 87.86),
    "ViT-B-16": (149.62, 86.19), "ViT-L-14": (427.62, 303.97), "ViT-L-14-336": (427.94, 304.29),
    "ViT-H-14": (986.11, 632.08), "ViT-H-14-378": (986.71, 632.68), "ViT-g-14": (1366.68, 1012.65),
    "ViT-bigG-14": (2539.57, 1844.91), "ViT-B-16-SigLIP": (203.16, 92.88), "ViT-B-16-SigLIP-512": (203.79, 93.52),
    "ViT-L-16-SigLIP-384": (652.48, 316.28), "ViT-SO400M-14-SigLIP-384": (877.96, 428.23),
}  # fmt: skip
TRUNKS = {"B-16": (768, 16, 12, 3072), "L-16": (1024, 16, 24, 4096), "SO400M-14": (1152, 14, 27, 4304)}


def trunk_tensors(name):
    """What the shape of a timm tower is read from, without memory."""
    shape = next((s for n, s in TRUNKS.items() if f"-{n}-SigLIP" in name), None)
    if shape is None:
        return {}
    width, patch, depth, hidden = shape
    kernel, up = (torch.empty(shape, device="meta") for shape in ((width, 3, patch, patch), (hidden, width)))
    blocks = {f"visual.trunk.blocks.{i}.mlp.fc1.weight": up for i in range(depth)}
    return {"visual.trunk.patch_embed.proj.weight": kernel, **blocks}


@pytest.mark.parametrize("name", PUBLISHED)
def test_architectures_have_the_published_number_of_parameters(tmp_path, name):
    encoder = blank(open_clip.configure(ARCHITECTURES[name], {}, trunk_tensors(name), name, tmp_path))
    counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (encoder, encoder.visual)]
    assert counts == pytest.approx(PUBLISHED[name], abs=0.0051)


def test_quickgelu_names_differ_in_the_activation_alone(tmp_path):
    for name in (n for n in ARCHITECTURES if n.endswith("-quickgelu")):
        quick, plain = ARCHITECTURES[name], ARCHITECTURES[name.removesuffix("-quickgelu")]
        assert {k: v for k, v in quick.items() if k != "quick_gelu"} == plain
        assert open_clip.configure(quick, {}, {}, name, tmp_path).text.activation == "quick_gelu"
