"""OpenAI's archives: a TorchScript zip whose tensors, and nothing else, are read.

The archive says nothing of its configuration, but its release has one rule for all models, so the shapes of the
tensors give everything: heads are width / 64, the activation is quick-gelu, weights are float16. The names are also
those of open_clip's models, whose configuration comes from a file instead (`open_clip`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from ...errors import BadWeights, ClipworksError
from ..config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from ..encoder import Encoder
from .build import build, check_depth
from .files import Tensors
from .keymap import Pair, both, depth, fused, one, take
from .tokens import clip_tokenizer

HEAD_WIDTH = 64


def matches(tensors: Tensors) -> bool:
    """Whether this is a TorchScript archive of OpenAI's models."""
    names = tensors.values
    return tensors.kind == "torchscript" and "text_projection" in names and "visual.conv1.weight" in names


def load(tensors: Tensors) -> Encoder:
    """The encoder in an archive."""
    values = {n: t.float() if t.dtype == torch.float16 else t for n, t in tensors.values.items()}
    try:
        config = infer(values, tensors.path.stem)
    except (KeyError, IndexError, ValueError) as error:
        if isinstance(error, ClipworksError) and not isinstance(error, BadWeights):
            raise BadWeights(f"{tensors.path}: {error}") from error
        raise BadWeights(f"not a model of OpenAI's release ({error}): {tensors.describe()}.") from error
    check_depth(config, len(tensors.values), str(tensors.path))
    ours = take(pairs(config), values, tensors.describe())
    return build(config, ours, clip_tokenizer(config.text), str(tensors.path))


def infer(values: Mapping[str, torch.Tensor], name: str) -> EncoderConfig:
    """The configuration that tensors of this layout have by the rules of the release."""
    length, width = values["positional_embedding"].shape
    vocab = values["token_embedding.weight"].shape[0]
    text = TextConfig(vocab_size=vocab, context_length=length, width=width, heads=_heads(width), eot_id=vocab - 1,
                      layers=depth(values, "transformer.resblocks."), mlp_width=_mlp(values, ""))  # fmt: skip
    vision = infer_vision(values)
    return EncoderConfig(name, values["text_projection"].shape[1], vision, text, PreprocessConfig(vision.image_size))


def infer_vision(values: Mapping[str, torch.Tensor]) -> VisionConfig:
    """Shape of the image tower, a ViT if it has a projection, else a ResNet."""
    if "visual.proj" in values:
        width, _, patch, _ = values["visual.conv1.weight"].shape
        side = math.isqrt(values["visual.positional_embedding"].shape[0] - 1)
        return VisionConfig(image_size=side * patch, patch_size=patch, width=width, heads=_heads(width),
                            layers=depth(values, "visual.transformer.resblocks."),
                            mlp_width=_mlp(values, "visual."))  # fmt: skip
    width = values["visual.layer1.0.conv1.weight"].shape[0]
    side = math.isqrt(values["visual.attnpool.positional_embedding"].shape[0] - 1)
    return VisionConfig(kind="resnet", image_size=32 * side, width=width, heads=_heads(32 * width), activation="relu",
                        layers=tuple(depth(values, f"visual.layer{i}.") for i in range(1, 5)), pool="attention",
                        class_token=False, norm_pre=False, norm_post=False, projection=False)  # fmt: skip


def _heads(width: int) -> int:
    return max(1, width // HEAD_WIDTH)


def _mlp(values: Mapping[str, torch.Tensor], tower: str) -> int:
    return values[f"{tower}transformer.resblocks.0.mlp.c_fc.weight"].shape[0]


# -- names ---------------------------------------------------------------------------------------------------------


def pairs(config: EncoderConfig, text: str = "") -> Iterator[Pair]:
    """Our names and theirs for a configuration; `text` is the prefix of the text tower ("text." in open_clip's
    models with `custom_text`)."""
    yield from vision_pairs(config.vision)
    yield from text_pairs(config.text, text)
    yield one("log_scale", "logit_scale")
    if config.logit_bias is not None:
        yield one("bias", "logit_bias")


def vision_pairs(config: VisionConfig) -> Iterator[Pair]:
    """The image tower."""
    if config.kind == "resnet":
        yield from resnet_pairs(config)
        return
    yield one("visual.class_token", "visual.class_embedding")
    yield one("visual.positions", "visual.positional_embedding")
    yield one("visual.stem.projection.weight", "visual.conv1.weight")
    if config.norm_pre:
        yield from both("visual.norm_pre", "visual.ln_pre")
    yield from block_pairs("visual.blocks", "visual.transformer.resblocks", config.depth)
    yield from both("visual.norm_post", "visual.ln_post")
    yield one("visual.projection.weight", "visual.proj", transpose=True)


def text_pairs(config: TextConfig, prefix: str = "") -> Iterator[Pair]:
    """The text tower."""
    yield one("text.tokens.weight", f"{prefix}token_embedding.weight")
    yield one("text.positions", f"{prefix}positional_embedding")
    yield from block_pairs("text.blocks", f"{prefix}transformer.resblocks", config.layers)
    yield from both("text.norm", f"{prefix}ln_final")
    if config.projection_bias:
        yield from both("text.projection", f"{prefix}text_projection")
    elif config.projection:
        yield one("text.projection.weight", f"{prefix}text_projection", transpose=True)


def block_pairs(ours: str, theirs: str, count: int) -> Iterator[Pair]:
    """Transformer blocks; query, key and value are one matrix in their files."""
    for i in range(count):
        a, b = f"{ours}.{i}", f"{theirs}.{i}"
        yield from fused(f"{a}.attention", "qkv", f"{b}.attn.in_proj")
        yield from both(f"{a}.attention.out", f"{b}.attn.out_proj")
        yield from both(f"{a}.norm1", f"{b}.ln_1")
        yield from both(f"{a}.norm2", f"{b}.ln_2")
        yield from both(f"{a}.mlp.up", f"{b}.mlp.c_fc")
        yield from both(f"{a}.mlp.down", f"{b}.mlp.c_proj")


def resnet_pairs(config: VisionConfig) -> Iterator[Pair]:
    """The modified ResNet."""
    stages = config.layers if not isinstance(config.layers, int) else (config.layers,)
    for i in (1, 2, 3):
        yield from _conv_norm(f"visual.conv{i}", f"visual.bn{i}", f"visual.conv{i}", f"visual.bn{i}")
    for stage, count in enumerate(stages):
        for j in range(count):
            a, b = f"visual.layers.{stage}.{j}", f"visual.layer{stage + 1}.{j}"
            for i in (1, 2, 3):
                yield from _conv_norm(f"{a}.conv{i}", f"{a}.bn{i}", f"{b}.conv{i}", f"{b}.bn{i}")
            if j == 0:
                yield from _conv_norm(f"{a}.downsample.conv", f"{a}.downsample.bn",
                                      f"{b}.downsample.0", f"{b}.downsample.1")  # fmt: skip
    yield one("visual.pool.positions", "visual.attnpool.positional_embedding")
    for a, b in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "c_proj")):
        yield from both(f"visual.pool.{a}", f"visual.attnpool.{b}")


def _conv_norm(conv: str, norm: str, their_conv: str, their_norm: str) -> Iterator[Pair]:
    yield one(f"{conv}.weight", f"{their_conv}.weight")
    yield from both(norm, their_norm)
    for statistic in ("running_mean", "running_var", "num_batches_tracked"):
        yield one(f"{norm}.{statistic}", f"{their_norm}.{statistic}")
