"""Random weights, carried across name by name: our towers against transformers' within 1e-5 in float32."""

import pytest
import torch

from clipworks.encoders.config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from clipworks.encoders.encoder import Encoder

transformers = pytest.importorskip("transformers")

BLOCK = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.q_proj": "attention.q", "mlp.fc1": "mlp.up",
         "self_attn.k_proj": "attention.k", "self_attn.v_proj": "attention.v", "self_attn.out_proj": "attention.out",
         "mlp.fc2": "mlp.down"}  # fmt: skip
CLIP = {
    "vision_model.embeddings.class_embedding": "visual.class_token",
    "vision_model.embeddings.patch_embedding": "visual.stem.projection",
    "vision_model.embeddings.position_embedding.weight": "visual.positions",
    "vision_model.pre_layrnorm": "visual.norm_pre", "vision_model.encoder.layers": "visual.blocks",
    "vision_model.post_layernorm": "visual.norm_post", "visual_projection": "visual.projection",
    "text_model.embeddings.token_embedding": "text.tokens", "text_projection": "text.projection",
    "text_model.embeddings.position_embedding.weight": "text.positions", "text_model.encoder.layers": "text.blocks",
    "text_model.final_layer_norm": "text.norm", "text_model.head": "text.projection", "logit_scale": "log_scale",
    "logit_bias": "bias", "vision_model.head.probe": "visual.pool.probe", "vision_model.head.mlp": "visual.pool.mlp",
    "vision_model.head.layernorm": "visual.pool.norm",
    "vision_model.head.attention.out_proj": "visual.pool.attention.out",
}  # fmt: skip


def carry(theirs, encoder, table):
    """Copy their state into ours; every tensor must find its place."""
    taken = {}
    for name, tensor in theirs.items():
        for old, new in {**table, **BLOCK, "fc1": "up", "fc2": "down"}.items():
            if name.startswith(old) or f".{old}." in name:
                name = name.replace(old, new, 1)
        if "in_proj" in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                taken[f"visual.pool.attention.{letter}.{name.rsplit('_', 1)[-1]}"] = part
        else:
            taken[name] = tensor
    ours = encoder.state_dict()
    encoder.load_state_dict({n: t.reshape(ours[n].shape) if n in ours else t for n, t in taken.items()})
    return encoder.eval()


def randomised(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim:
                p.copy_(torch.randn_like(p) * 0.1 + (1 if "norm" in name and name.endswith("weight") else 0))
    return model.eval()


def pair(activation, image, patch, width, layers, heads, context=20, eos=98, dim=24):
    their_name = {"gelu_tanh": "gelu_pytorch_tanh"}.get(activation, activation)
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(
            projection_dim=dim,
            vision_config=dict(
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=layers,
                image_size=image,
                num_attention_heads=heads,
                patch_size=patch,
                hidden_act=their_name,
            ),
            text_config=dict(
                vocab_size=99,
                hidden_size=width - 4 * heads,
                intermediate_size=3 * width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                max_position_embeddings=context,
                hidden_act=their_name,
                eos_token_id=eos,
                bos_token_id=97,
                pad_token_id=1,
            ),
        )
    )
    vision = VisionConfig(image_size=image, patch_size=patch, width=width, layers=layers, heads=heads,
                          mlp_width=2 * width, activation=activation)  # fmt: skip
    text = TextConfig(vocab_size=99, context_length=context, width=width - 4 * heads, layers=layers, heads=heads,
                      mlp_width=3 * width, activation=activation, eot_id=98, pad_id=1)  # fmt: skip
    ours = Encoder(EncoderConfig("pair", dim, vision, text, PreprocessConfig(size=image)), seed=None)
    return randomised(theirs), ours


def token_rows(n, length, eot=98, pad=1):
    draw = torch.Generator().manual_seed(1)
    rows = torch.full((n, length), pad)
    for i, row in enumerate(rows):
        end = length - 1 - 2 * i
        row[:end] = torch.randint(2, 97, (end,), generator=draw)
        row[end] = eot
    return rows


SHAPES = {"B/32-like": ("quick_gelu", 64, 32, 64, 3, 4), "B/16-like": ("gelu", 48, 16, 48, 2, 3),
          "14-pixel patches": ("quick_gelu", 70, 14, 40, 4, 2), "tanh": ("gelu_tanh", 32, 8, 32, 2, 4)}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_clip(shape):
    image = SHAPES[shape][1]
    theirs, ours = pair(*SHAPES[shape])
    carry(theirs.state_dict(), ours, CLIP)
    pixels, tokens = torch.randn(4, 3, image, image), token_rows(4, 20)
    with torch.no_grad():
        want = theirs(input_ids=tokens, pixel_values=pixels)
        images, texts, scale = ours(pixels, tokens)
        torch.testing.assert_close(images, want.image_embeds, atol=1e-5, rtol=0)
        torch.testing.assert_close(texts, want.text_embeds, atol=1e-5, rtol=0)
        torch.testing.assert_close(scale * images @ texts.T, want.logits_per_image, atol=1e-5, rtol=0)
        hidden = theirs.vision_model(pixels, output_hidden_states=True).hidden_states
        run = ours.visual.run(pixels, output_layers=(0, -1))
        torch.testing.assert_close(run.layers[0], hidden[1], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(run.layers[-1], hidden[-1], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(ours.images(pixels), want.image_embeds, atol=1e-5, rtol=0)


def test_clip_at_another_image_size():
    theirs, ours = pair("quick_gelu", 64, 16, 48, 2, 3)
    carry(theirs.state_dict(), ours, CLIP)
    pixels = torch.randn(2, 3, 96, 48)
    with torch.no_grad():
        want = theirs.vision_model(pixels, interpolate_pos_encoding=True).pooler_output
        want = theirs.visual_projection(want)
        torch.testing.assert_close(ours.visual(pixels), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("image", "patch", "width", "layers", "heads"), [(64, 16, 64, 3, 4), (56, 14, 48, 2, 3),
                                                                         (50, 16, 32, 2, 2)])  # fmt: skip
def test_siglip(image, patch, width, layers, heads):
    shape = dict(
        hidden_size=width,
        intermediate_size=2 * width + 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    theirs = randomised(transformers.SiglipModel(transformers.SiglipConfig(
        vision_config=dict(**shape, image_size=image, patch_size=patch),
        text_config=dict(**shape, vocab_size=99, max_position_embeddings=16),
    )))  # fmt: skip
    common = dict(width=width, layers=layers, heads=heads, mlp_width=2 * width + 4, activation="gelu_tanh",
                  norm_eps=1e-6, )  # fmt: skip
    vision = VisionConfig(**common, image_size=image, patch_size=patch, pool="attention", class_token=False,
                          norm_pre=False, patch_bias=True, projection=False)  # fmt: skip
    text = TextConfig(**common, vocab_size=99, context_length=16, causal=False, pool="last", projection_bias=True,
                      eot_id=1, pad_id=1)  # fmt: skip
    config = EncoderConfig("s", width, vision, text, PreprocessConfig(size=image), 2.3026, logit_bias=-10.0)
    ours = carry(theirs.state_dict(), Encoder(config, seed=None), CLIP)
    pixels, tokens = torch.randn(3, 3, image, image), token_rows(3, 16)
    with torch.no_grad():
        want = theirs(input_ids=tokens, pixel_values=pixels)
        images, texts, scale = ours(pixels, tokens)
        torch.testing.assert_close(images, want.image_embeds, atol=1e-5, rtol=0)
        torch.testing.assert_close(texts, want.text_embeds, atol=1e-5, rtol=0)
        logits = scale * images @ texts.T + ours.bias
        torch.testing.assert_close(logits, want.logits_per_image, atol=1e-5, rtol=0)


def test_bert_with_mean_pooling():
    """The shape of the MiniLM sentence encoders; segment embeddings are folded into the positions."""
    theirs = randomised(transformers.BertModel(transformers.BertConfig(
        vocab_size=99, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80,
        max_position_embeddings=24, hidden_act="gelu", pad_token_id=0,
    ), add_pooling_layer=False))  # fmt: skip
    text = TextConfig(vocab_size=99, context_length=24, width=48, layers=3, heads=4, mlp_width=80, activation="gelu",
                      causal=False, pool="mean", norm_order="post", embedding_norm=True, norm_final=False,
                      projection=False, mask_padding=True, norm_eps=1e-12, eot_id=98, pad_id=0)  # fmt: skip
    vision = VisionConfig(image_size=32, patch_size=16, width=48, layers=1, heads=2, mlp_width=48)
    ours = Encoder(EncoderConfig("b", 48, vision, text, PreprocessConfig(size=32)), seed=None).eval()
    state = theirs.state_dict()
    parts = {
        "attention.self.query": "attention.q",
        "attention.self.key": "attention.k",
        "output.dense": "mlp.down",
        "attention.self.value": "attention.v",
        "attention.output.dense": "attention.out",
        "attention.output.LayerNorm": "norm1",
        "intermediate.dense": "mlp.up",
        "output.LayerNorm": "norm2",
    }
    taken = {
        "tokens.weight": state["embeddings.word_embeddings.weight"],
        "positions": state["embeddings.position_embeddings.weight"]
        + state["embeddings.token_type_embeddings.weight"][0],
    }
    for kind in ("weight", "bias"):
        taken[f"norm_embedding.{kind}"] = state[f"embeddings.LayerNorm.{kind}"]
        for i in range(3):
            taken |= {
                f"blocks.{i}.{new}.{kind}": state[f"encoder.layer.{i}.{old}.{kind}"]
                for old, new in parts.items()
            }
    ours.text.load_state_dict(taken)
    tokens = token_rows(4, 20, pad=0)
    mask = (tokens != 0).float()
    with torch.no_grad():
        hidden = theirs(input_ids=tokens, attention_mask=mask).last_hidden_state
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        unit = torch.nn.functional.normalize(mean, dim=-1)
        torch.testing.assert_close(ours.encode_text(tokens), unit, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.encode_text(tokens, normalize=False), mean, atol=1e-5, rtol=1e-5)


PUBLISHED = {
    "ViT-B/32": (EncoderConfig(), 151_277_313),
    "ViT-L/14": (
        EncoderConfig(
            dim=768,
            vision=VisionConfig(patch_size=14, width=1024, layers=24, heads=16, mlp_width=4096),
            text=TextConfig(width=768, heads=12, mlp_width=3072),
        ),
        427_616_513,
    ),
    "RN50": (
        EncoderConfig(
            dim=1024,
            vision=VisionConfig(
                kind="resnet",
                width=64,
                layers=(3, 4, 6, 3),
                heads=32,
                pool="attention",
                class_token=False,
                activation="relu",
            ),
        ),
        102_007_137,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_openai_shapes_have_the_published_number_of_weights(name):
    config, count = PUBLISHED[name]
    with torch.device("meta"):
        encoder = Encoder(config, seed=None)
    assert sum(p.numel() for p in encoder.parameters()) == count


def test_siglip_so400m_has_as_many_weights_as_theirs():
    shape = dict(width=1152, layers=27, heads=16, mlp_width=4304, activation="gelu_tanh", norm_eps=1e-6)
    vision = VisionConfig(
        **shape,
        image_size=384,
        patch_size=14,
        pool="attention",
        class_token=False,
        norm_pre=False,
        patch_bias=True,
        projection=False,
    )
    text = TextConfig(
        **shape, vocab_size=32000, context_length=64, causal=False, pool="last", projection_bias=True
    )
    their = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16)
    with torch.device("meta"):
        ours = Encoder(EncoderConfig("so", 1152, vision, text, logit_bias=-10.0), seed=None)
        theirs = transformers.SiglipModel(
            transformers.SiglipConfig(
                vision_config={**their, "image_size": 384, "patch_size": 14}, text_config=their
            )
        )
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
