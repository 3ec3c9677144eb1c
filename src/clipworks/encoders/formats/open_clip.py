"""open_clip's models: a state dictionary with `open_clip_config.json` beside it, or an architecture named by the user.

ViT and ResNet towers have OpenAI's names (`openai`); with `custom_text` the text tower stands under "text."; SigLIP's
image tower is timm's ("visual.trunk."). What decides numbers without showing in the tensors, above all the activation,
is read from the configuration and never guessed: a configuration with a part that is not understood is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ...errors import BadWeights, ClipworksError, closest
from ..config import CLIP_MEAN, CLIP_STD, EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from ..encoder import Encoder
from ..published import ARCHITECTURES
from . import openai
from .build import build, check_depth
from .files import Tensors, read_json
from .keymap import Pair, both, fused, one, take
from .tokens import CLIP_VOCABULARY, clip_tokenizer, special_id, tokenizer_beside

CONFIG = "open_clip_config.json"
# keys that change nothing when a trained model is run on one image and one text at a time
SILENT = {"patch_dropout", "output_tokens", "timm_model_pretrained", "timm_drop", "timm_drop_path", "timm_proj_bias",
          "hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "pos_embed_type", "image_seq_len",
          "attn_pooler_queries", "attn_pooler_heads", "text_arch", "block_type", "variable_text"}  # fmt: skip
VISION = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "no_ln_pre", "pool_type",
          "act_kwargs", "norm_kwargs", "timm_model_name", "timm_pool", "timm_proj", "timm_model_kwargs"}  # fmt: skip
TEXT = {"context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_kwargs", "width", "heads", "layers",
        "mlp_ratio", "pad_id", "eos_id", "no_causal_mask", "pool_type", "proj_type", "proj_bias", "act_kwargs",
        "norm_kwargs"}  # fmt: skip
MODEL = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_bias", "init_logit_scale"}
# SigLIP towers of timm: heads by size; tanh-gelu in those that came with SigLIP 2, else the exact gelu
TIMM = re.compile(r"vit_(?P<size>base|large|so400m|giantopt)_patch(?P<patch>\d+)_siglip_\d+")
TIMM_HEADS = {"base": 12, "large": 16, "so400m": 16, "giantopt": 16}
TIMM_TANH = re.compile(r"vit_(base_patch32_siglip|large_patch16_siglip_512|so400m_patch16_siglip|giantopt_)")


def matches(tensors: Tensors) -> bool:
    """Whether the names are those of open_clip's models."""
    names = tensors.values
    text = "token_embedding.weight" in names or "text.token_embedding.weight" in names
    return text and any(n in names for n in ("visual.conv1.weight", "visual.trunk.patch_embed.proj.weight"))


def load(tensors: Tensors, architecture: str | None = None) -> Encoder:
    """The encoder of a state dictionary.

    Parameters
    ----------
    tensors : of the file
    architecture : a name of `published.ARCHITECTURES`; None reads `open_clip_config.json` beside the file
    """
    folder, where = tensors.path.parent, str(tensors.path)
    preprocess: dict[str, Any] = {}
    if architecture is not None:
        model = ARCHITECTURES[architecture]
    elif (folder / CONFIG).is_file():
        record = read_json(folder / CONFIG)
        model, preprocess = record.get("model_cfg", record), record.get("preprocess_cfg") or {}
        where = str(folder / CONFIG)
    else:
        raise BadWeights(_unnamed(tensors))
    try:
        config = configure(model, preprocess, tensors.values, architecture or tensors.path.stem, folder)
    except (ClipworksError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadWeights(f"{where}: {error if isinstance(error, ClipworksError) else repr(error)}") from error
    check_depth(config, len(tensors.values), str(tensors.path))
    ours = take(pairs(config, tensors.values), tensors.values, tensors.describe())
    return build(config, ours, _tokenizer(folder, model["text_cfg"], config.text), str(tensors.path))


def _unnamed(tensors: Tensors) -> str:
    """What to say where the activation is not known: which architectures the tensors would fit."""
    fitting = [name for name, model in ARCHITECTURES.items() if _fits(model, tensors.values)]
    which = " or ".join(f"'{n}:{tensors.path}'" for n in fitting[:4])
    return (
        f"the weights say nothing of their activation and preprocessing. Put the model's {CONFIG} beside "
        f"{tensors.path}" + (f", or name the architecture: load({which})" if fitting else "")
        + f". Found {tensors.describe()}."
    )  # fmt: skip


def _fits(model: Mapping[str, Any], values: Mapping[str, torch.Tensor]) -> bool:
    vision, text = model["vision_cfg"], model["text_cfg"]
    table = values.get(f"{_prefix(values)}positional_embedding")
    if "timm_model_name" in vision or table is None:
        return False
    try:
        found = openai.infer_vision(values)
    except (KeyError, ValueError):
        return False
    layers = tuple(vision["layers"]) if isinstance(vision["layers"], list) else vision["layers"]
    same = (found.image_size, found.width, found.layers) == (vision["image_size"], vision["width"], layers)
    return same and tuple(table.shape) == (text["context_length"], text["width"])


def _prefix(values: Mapping[str, torch.Tensor]) -> str:
    """ "text." where the text tower is a part of its own (`custom_text`)."""
    return "text." if "text.token_embedding.weight" in values else ""


def configure(
    model: Mapping[str, Any], preprocess: Mapping[str, Any], values: Mapping[str, torch.Tensor], name: str, folder: Path
) -> EncoderConfig:
    """The configuration that open_clip's JSON describes; sizes of a timm tower are read from its tensors."""
    _check_keys("model_cfg", model, MODEL)
    vision, text = model["vision_cfg"], model["text_cfg"]
    _check_keys("vision_cfg", vision, VISION)
    _check_keys("text_cfg", text, TEXT)
    quick = bool(model.get("quick_gelu", False))
    tower = _timm(vision, values) if vision.get("timm_model_name") else _vision(vision, quick)
    bias = model.get("init_logit_bias")
    if bias is None and "logit_bias" in values:
        bias = 0.0
    start = {} if model.get("init_logit_scale") is None else {"init_log_scale": float(model["init_logit_scale"])}
    return EncoderConfig(name, model["embed_dim"], tower, _text(text, quick, folder), _preprocess(preprocess, tower),
                         logit_bias=None if bias is None else float(bias), **start)  # fmt: skip


def _check_keys(where: str, given: Mapping[str, Any], known: set[str]) -> None:
    """Keys that are not understood may stand there with a value that switches them off, and with no other."""
    for key, value in given.items():
        if key not in known | SILENT and value not in (None, False, "", 0):
            raise BadWeights(f"{where} has {key}={value!r}, which this library cannot follow.{closest(key, known)}")
    if given.get("pos_embed_type", "learnable") not in ("learnable", "sin_cos_2d"):
        raise BadWeights(f"{where} has pos_embed_type={given['pos_embed_type']!r}, which this library cannot follow.")
    if given.get("text_arch", "clip") != "clip" or given.get("block_type") not in (None, "default"):
        raise BadWeights(f"{where} asks for other blocks (text_arch, block_type), which this library cannot follow.")


def _activation(section: Mapping[str, Any], quick: bool) -> str:
    asked = section.get("act_kwargs") or {}
    if not asked:
        return "quick_gelu" if quick else "gelu"
    if quick or asked != {"approximate": "tanh"}:
        raise BadWeights(f"act_kwargs must be {{'approximate': 'tanh'}}, without quick_gelu. Got {asked!r}.")
    return "gelu_tanh"


def _eps(section: Mapping[str, Any]) -> float:
    asked = section.get("norm_kwargs") or {}
    if set(asked) - {"eps"}:
        raise BadWeights(f"norm_kwargs may hold eps. Got {asked!r}.")
    return asked.get("eps", 1e-5)


def _vision(section: Mapping[str, Any], quick: bool) -> VisionConfig:
    size, width, layers = section.get("image_size", 224), section.get("width", 768), section.get("layers", 12)
    head_width = section.get("head_width", 64)
    if isinstance(layers, list):
        return VisionConfig(kind="resnet", image_size=size, width=width, layers=tuple(layers), activation="relu",
                            heads=width * 32 // head_width, pool="attention", class_token=False, norm_pre=False,
                            norm_post=False, projection=False)  # fmt: skip
    pool = {"tok": "class", "avg": "mean"}.get(section.get("pool_type", "tok"))
    if pool is None:
        raise BadWeights(f"vision_cfg.pool_type must be 'tok' or 'avg'. Got {section['pool_type']!r}.")
    return VisionConfig(
        image_size=size, patch_size=section.get("patch_size", 16), width=width, layers=layers,
        heads=width // head_width, mlp_width=int(width * section.get("mlp_ratio", 4.0)), pool=pool,
        activation=_activation(section, quick), norm_eps=_eps(section), norm_pre=not section.get("no_ln_pre", False),
    )  # fmt: skip


def _timm(section: Mapping[str, Any], values: Mapping[str, torch.Tensor]) -> VisionConfig:
    name = section["timm_model_name"]
    known = TIMM.fullmatch(name)
    extra = dict(section.get("timm_model_kwargs") or {})
    if known is None or section.get("timm_pool") != "map" or section.get("timm_proj") not in ("none", "", None):
        raise BadWeights(
            f"of timm's towers those of SigLIP are known (vit_<size>_patch<n>_siglip_<n>, pool 'map', no projection). "
            f"Got {name!r}, pool {section.get('timm_pool')!r}, projection {section.get('timm_proj')!r}."
        )
    heads = extra.pop("num_heads", TIMM_HEADS[known["size"]])
    activation = extra.pop("act_layer", "gelu_tanh" if TIMM_TANH.match(name) else "gelu")
    # the rest are sizes, which the tensors tell
    unknown = set(extra) - {"embed_dim", "depth", "mlp_ratio", "patch_size", "img_size"}
    if unknown:
        raise BadWeights(f"timm_model_kwargs may not hold {', '.join(sorted(unknown))}.")
    kernel = values["visual.trunk.patch_embed.proj.weight"]
    return VisionConfig(
        image_size=section.get("image_size", 224), patch_size=kernel.shape[-1], width=kernel.shape[0], heads=heads,
        layers=openai.depth(values, "visual.trunk.blocks."),
        mlp_width=values["visual.trunk.blocks.0.mlp.fc1.weight"].shape[0], activation=activation, pool="attention",
        class_token=False, norm_pre=False, patch_bias=True, norm_eps=1e-6, projection=False,
    )  # fmt: skip


def _text(section: Mapping[str, Any], quick: bool, folder: Path) -> TextConfig:
    width, vocab = section.get("width", 512), section.get("vocab_size", CLIP_VOCABULARY)
    named, pool = section.get("hf_tokenizer_name"), section.get("pool_type", "argmax")
    if pool not in ("argmax", "last", "first", "eos") or (pool == "argmax" and named):
        raise BadWeights(
            f"text_cfg.pool_type must be 'argmax' (with CLIP's own tokenizer), 'last', 'first' or 'eos'. Got {pool!r}"
            + (f" with hf_tokenizer_name {named!r}." if named else ".")
        )
    if section.get("proj_type", "linear") not in ("linear", "none"):
        raise BadWeights(f"text_cfg.proj_type must be 'linear' or 'none'. Got {section['proj_type']!r}.")
    end, pad = section.get("eos_id"), section.get("pad_id", 0)
    if named:
        end = special_id(folder, "eos") if end is None else end
        found = special_id(folder, "pad")
        pad = pad if found is None else found
    projection = section.get("proj_type", "linear") == "linear"
    return TextConfig(
        vocab_size=vocab, context_length=section.get("context_length", 77), width=width,
        layers=section.get("layers", 12), heads=section.get("heads", 8),
        mlp_width=int(width * section.get("mlp_ratio", 4.0)), activation=_activation(section, quick),
        norm_eps=_eps(section), causal=not section.get("no_causal_mask", False), projection=projection,
        pool={"argmax": "eot", "eos": "eot"}.get(pool, pool), pad_id=pad,
        projection_bias=projection and bool(section.get("proj_bias", False)),
        eot_id=end if end is not None else (1 if named else vocab - 1),
        tokenizer="tokenizer.json" if named else "clip-bpe",
    )  # fmt: skip


def _preprocess(section: Mapping[str, Any], tower: VisionConfig) -> PreprocessConfig:
    """What the file says, else the values that open_clip has for a model of this kind."""
    siglip = tower.pool == "attention" and tower.kind == "vit"
    mode = section.get("resize_mode") or ("squash" if siglip else "shortest")
    if mode not in ("shortest", "squash"):
        raise BadWeights(f"preprocess_cfg.resize_mode must be 'shortest' or 'squash'. Got {mode!r}.")
    size = section.get("size", tower.image_size)
    if size not in (tower.image_size, [tower.image_size] * 2):
        raise BadWeights(f"preprocess_cfg.size must be that of the tower, {tower.image_size}. Got {size!r}.")
    half = (0.5, 0.5, 0.5)
    return PreprocessConfig(
        tower.image_size, tuple(section.get("mean") or (half if siglip else CLIP_MEAN)),
        tuple(section.get("std") or (half if siglip else CLIP_STD)),
        section.get("interpolation") or "bicubic", mode, "none" if mode == "squash" else "center",
    )  # fmt: skip


def _tokenizer(folder: Path, section: Mapping[str, Any], text: TextConfig) -> Any:
    if text.tokenizer == "clip-bpe":
        return clip_tokenizer(text)
    options = dict(section.get("tokenizer_kwargs") or {})
    clean = options.pop("clean", "whitespace")
    if options:
        raise BadWeights(f"text_cfg.tokenizer_kwargs may hold clean. Got {', '.join(sorted(options))} as well.")
    return tokenizer_beside(folder, text, clean)


# -- names ---------------------------------------------------------------------------------------------------------


def pairs(config: EncoderConfig, values: Mapping[str, torch.Tensor]) -> Iterator[Pair]:
    """Our names and theirs; which of the two forms it is shows in the names of `values`."""
    prefix = _prefix(values)
    if "visual.trunk.pos_embed" not in values:
        yield from openai.pairs(config, prefix)
        return
    trunk, pool = "visual.trunk", "visual.trunk.attn_pool"
    yield one("visual.positions", f"{trunk}.pos_embed", lead=1)
    yield from both("visual.stem.projection", f"{trunk}.patch_embed.proj")
    for i in range(config.vision.depth):
        a, b = f"visual.blocks.{i}", f"{trunk}.blocks.{i}"
        yield from fused(f"{a}.attention", "qkv", f"{b}.attn.qkv", ".")
        yield from both(f"{a}.attention.out", f"{b}.attn.proj")
        yield from both(f"{a}.norm1", f"{b}.norm1")
        yield from both(f"{a}.norm2", f"{b}.norm2")
        yield from both(f"{a}.mlp.up", f"{b}.mlp.fc1")
        yield from both(f"{a}.mlp.down", f"{b}.mlp.fc2")
    yield from both("visual.norm_post", f"{trunk}.norm")
    yield one("visual.pool.probe", f"{pool}.latent", lead=2)
    yield from both("visual.pool.attention.q", f"{pool}.q")
    yield from fused("visual.pool.attention", "kv", f"{pool}.kv", ".")
    yield from both("visual.pool.attention.out", f"{pool}.proj")
    yield from both("visual.pool.norm", f"{pool}.norm")
    yield from both("visual.pool.mlp.up", f"{pool}.mlp.fc1")
    yield from both("visual.pool.mlp.down", f"{pool}.mlp.fc2")
    yield from openai.text_pairs(config.text, prefix)
    yield one("log_scale", "logit_scale")
    if config.logit_bias is not None:
        yield one("bias", "logit_bias")
