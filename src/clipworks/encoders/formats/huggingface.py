"""Hugging Face folders of CLIPModel and SiglipModel: config.json, preprocessor_config.json, tokenizer.json, weights.

Also MetaCLIP, DFN and LAION releases in that form, and SigLIP 2 of fixed resolution (whose model type is "siglip").
What config.json leaves out has the defaults of the two classes, since files of that library leave defaults out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import BadWeights, ClipworksError
from ..config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from ..encoder import Encoder
from .build import build, check_depth
from .files import Tensors, read_json
from .keymap import Pair, both, fused, one, take
from .tokens import CLIP_VOCABULARY, clip_tokenizer, special_id, tokenizer_beside

ACTIVATION = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
RESAMPLE = {2: "bilinear", 3: "bicubic"}
# defaults of CLIPTextConfig, CLIPVisionConfig, SiglipTextConfig and SiglipVisionConfig (transformers 4 and 5)
_CLIP = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_hidden_layers": 12}
_SIGLIP = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_hidden_layers": 12,
           "num_attention_heads": 12, "hidden_size": 768, "intermediate_size": 3072}  # fmt: skip
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "clip": {
        "text": {**_CLIP, "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
                 "max_position_embeddings": 77, "eos_token_id": 49407},
        "vision": {**_CLIP, "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
                   "image_size": 224, "patch_size": 32},
    },
    "siglip": {
        "text": {**_SIGLIP, "vocab_size": 32000, "max_position_embeddings": 64, "pad_token_id": 1},
        "vision": {**_SIGLIP, "image_size": 224, "patch_size": 16},
    },
}  # fmt: skip


def matches(tensors: Tensors) -> bool:
    """Whether the names are those of CLIPModel or SiglipModel."""
    return any(n.startswith("vision_model.") for n in tensors.values) and any(
        n.startswith("text_model.") for n in tensors.values
    )


def load(tensors: Tensors) -> Encoder:
    """The encoder of a folder; `tensors` are those of its weights file or shards."""
    folder = tensors.path.parent
    if not (folder / "config.json").is_file():
        raise BadWeights(
            f"these are weights of a Hugging Face model, whose config.json must lie beside them; {folder} has none. "
            f"Found {tensors.describe()}."
        )
    record = read_json(folder / "config.json")
    try:
        config = configure(record, folder, _preprocess(folder))
    except BadWeights:
        raise
    except (ClipworksError, TypeError, KeyError, ValueError) as error:
        raise BadWeights(f"{folder / 'config.json'}: {error}") from error
    check_depth(config, len(tensors.values), str(tensors.path))
    ours = take(pairs(config), tensors.values, tensors.describe())
    return build(config, ours, _tokenizer(folder, record, config.text), str(tensors.path))


def configure(record: dict[str, Any], folder: Path, preprocess: PreprocessConfig) -> EncoderConfig:
    """The configuration that config.json describes."""
    kind = record.get("model_type")
    if kind not in DEFAULTS:
        raise BadWeights(
            f"{folder / 'config.json'}: model_type must be 'clip' or 'siglip'. Got {kind!r}"
            f" ({', '.join(map(str, record.get('architectures') or ['no architectures named']))})."
        )
    text, vision = (_section(record, part, DEFAULTS[kind][part]) for part in ("text", "vision"))
    size, patch = _side(vision["image_size"], "image_size"), _side(vision["patch_size"], "patch_size")
    siglip = kind == "siglip"
    if siglip and vision.get("vision_use_head") is False:
        raise BadWeights(f"{folder / 'config.json'}: a SigLIP model without its pooling head is not an encoder.")
    dim = _dim(record, text, vision, siglip)
    vision_config = VisionConfig(
        image_size=size, patch_size=patch, **_tower(vision), pool="attention" if siglip else "class",
        class_token=not siglip, norm_pre=not siglip, patch_bias=siglip, projection=not siglip,
    )  # fmt: skip
    end, pad = text.get("eos_token_id"), 0
    if siglip:
        # the ids of config.json are not those of the tokenizer (transformers#24773); the tokenizer's own count
        end = _first(special_id(folder, "eos"), 1)
        pad = _first(special_id(folder, "pad"), text.get("pad_token_id"), 1)
    elif not isinstance(end, int) or end == 2:  # 2 stands in old files, where the largest id is meant
        end = text["vocab_size"] - 1
    text_config = TextConfig(
        vocab_size=text["vocab_size"], context_length=text["max_position_embeddings"], **_tower(text),
        causal=not siglip, pool="last" if siglip else "eot", projection_bias=siglip, eot_id=int(end), pad_id=pad,
        tokenizer="clip-bpe" if text["vocab_size"] == CLIP_VOCABULARY and not siglip else "tokenizer.json",
    )  # fmt: skip
    start: dict[str, Any] = {"init_log_scale": 2.302585, "logit_bias": -10.0} if siglip else {}
    name = str(record.get("_name_or_path") or "") or folder.name
    return EncoderConfig(name, dim, vision_config, text_config, preprocess, **start)


def _section(record: dict[str, Any], part: str, defaults: dict[str, Any]) -> dict[str, Any]:
    given = record.get(f"{part}_config") or {}
    older = record.get(f"{part}_config_dict")  # where it stands it counts, its own defaults included
    return {**defaults, **given, **(defaults if older else {}), **(older or {})}


def _tower(section: dict[str, Any]) -> dict[str, Any]:
    activation = section["hidden_act"]
    if activation not in ACTIVATION:
        raise BadWeights(f"config.json: hidden_act must be one of {', '.join(ACTIVATION)}. Got {activation!r}.")
    return {"width": section["hidden_size"], "layers": section["num_hidden_layers"],
            "heads": section["num_attention_heads"], "mlp_width": section["intermediate_size"],
            "activation": ACTIVATION[activation], "norm_eps": section["layer_norm_eps"]}  # fmt: skip


def _dim(record: dict[str, Any], text: dict[str, Any], vision: dict[str, Any], siglip: bool) -> int:
    if siglip:
        return text.get("projection_size") or vision["hidden_size"]
    return record.get("projection_dim") or 512


def _side(value: Any, what: str) -> int:
    sides = value if isinstance(value, list) else [value]
    if len(set(sides)) != 1 or not isinstance(sides[0], int):
        raise BadWeights(f"config.json: {what} must be one number (square images). Got {value!r}.")
    return sides[0]


def _first(*candidates: Any) -> Any:
    return next(c for c in candidates if c is not None)


# -- preprocessing and tokenizer ---------------------------------------------------------------------------------


def _preprocess(folder: Path) -> PreprocessConfig:
    """What preprocessor_config.json (or processor_config.json) says; an error if there is none, since pixels
    normalised in another way give plausible, wrong vectors."""
    for file in ("preprocessor_config.json", "processor_config.json"):
        if (folder / file).is_file():
            record = read_json(folder / file)
            record = record.get("image_processor", record)
            if "image_mean" in record or "size" in record:
                return preprocessing(record, str(folder / file))
    raise BadWeights(f"{folder} has no preprocessor_config.json, which says how this model's images are prepared.")


def preprocessing(record: dict[str, Any], where: str) -> PreprocessConfig:
    """The preprocessing that an image processor's file describes, where we can do the same.

    Raises
    ------
    BadWeights
        If a step is switched off or has a value that cannot be followed.
    """
    if not all(record.get(step, True) for step in ("do_resize", "do_rescale", "do_normalize")):
        raise BadWeights(f"{where}: do_resize, do_rescale and do_normalize must be on.")
    if abs(record.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6:
        raise BadWeights(f"{where}: rescale_factor must be 1/255. Got {record['rescale_factor']!r}.")
    size, crop = record.get("size", 224), record.get("crop_size")
    resample = record.get("resample", 3)
    if resample not in RESAMPLE:
        raise BadWeights(f"{where}: resample must be 2 (bilinear) or 3 (bicubic). Got {resample!r}.")
    shortest = size.get("shortest_edge") if isinstance(size, dict) else size
    try:
        if shortest is not None and record.get("do_center_crop", True):
            side = _square(crop if crop is not None else shortest)
            if side != shortest:
                raise BadWeights(f"{where}: crop_size {side} and size {shortest} must be the same.")
            how = {"resize": "shortest", "crop": "center"}
        else:
            side, how = _square(size), {"resize": "squash", "crop": "none"}
        mean, std = tuple(record["image_mean"]), tuple(record["image_std"])
        return PreprocessConfig(side, mean, std, RESAMPLE[resample], **how)  # type: ignore[arg-type]
    except BadWeights:
        raise
    except (ClipworksError, KeyError, TypeError) as error:
        raise BadWeights(f"{where}: {error!r:.200}") from error


def _square(size: Any) -> int:
    if isinstance(size, dict):
        if set(size) != {"height", "width"} or size["height"] != size["width"]:
            raise BadWeights(f"images must be made square. Got size {size!r}.")
        return int(size["height"])
    return int(size)


def _tokenizer(folder: Path, record: dict[str, Any], text: TextConfig) -> Any:
    if text.tokenizer == "clip-bpe":
        return clip_tokenizer(text)
    clean = "none"
    if record["model_type"] == "siglip":
        file = folder / "tokenizer_config.json"
        name = str(read_json(file).get("tokenizer_class", "")) if file.is_file() else ""
        # SigLIP's class cleans before its file's rules; SigLIP 2 (Gemma's vocabulary) was trained on lower case
        clean = "siglip" if name.startswith("SiglipTokenizer") or not name else "lowercase"
    return tokenizer_beside(folder, text, clean)


# -- names ---------------------------------------------------------------------------------------------------------


def pairs(config: EncoderConfig) -> Iterator[Pair]:
    """Our names and theirs."""
    vision, patch = "vision_model.", "vision_model.embeddings."
    if config.vision.class_token:
        yield one("visual.class_token", f"{patch}class_embedding")
    yield one("visual.positions", f"{patch}position_embedding.weight")
    yield one("visual.stem.projection.weight", f"{patch}patch_embedding.weight")
    if config.vision.patch_bias:
        yield one("visual.stem.projection.bias", f"{patch}patch_embedding.bias")
    if config.vision.norm_pre:
        yield from both("visual.norm_pre", f"{vision}pre_layrnorm")  # their spelling
    yield from _blocks("visual.blocks", f"{vision}encoder.layers", config.vision.depth)
    yield from both("visual.norm_post", f"{vision}post_layernorm")
    if config.vision.pool == "attention":
        head, pool = f"{vision}head", "visual.pool"
        yield one(f"{pool}.probe", f"{head}.probe", lead=2)
        yield from fused(f"{pool}.attention", "qkv", f"{head}.attention.in_proj")
        yield from both(f"{pool}.attention.out", f"{head}.attention.out_proj")
        yield from both(f"{pool}.norm", f"{head}.layernorm")
        yield from both(f"{pool}.mlp.up", f"{head}.mlp.fc1")
        yield from both(f"{pool}.mlp.down", f"{head}.mlp.fc2")
    else:
        yield one("visual.projection.weight", "visual_projection.weight")
    yield one("text.tokens.weight", "text_model.embeddings.token_embedding.weight")
    yield one("text.positions", "text_model.embeddings.position_embedding.weight")
    yield from _blocks("text.blocks", "text_model.encoder.layers", config.text.layers)
    yield from both("text.norm", "text_model.final_layer_norm")
    if config.text.projection_bias:
        yield from both("text.projection", "text_model.head")
    else:
        yield one("text.projection.weight", "text_projection.weight")
    if config.logit_bias is None:
        yield one("log_scale", "logit_scale")
    else:
        yield Pair(("log_scale",), "logit_scale", lead=1)
        yield Pair(("bias",), "logit_bias", lead=1)


def _blocks(ours: str, theirs: str, count: int) -> Iterator[Pair]:
    for i in range(count):
        a, b = f"{ours}.{i}", f"{theirs}.{i}"
        for letter in "qkv":
            yield from both(f"{a}.attention.{letter}", f"{b}.self_attn.{letter}_proj")
        yield from both(f"{a}.attention.out", f"{b}.self_attn.out_proj")
        yield from both(f"{a}.norm1", f"{b}.layer_norm1")
        yield from both(f"{a}.norm2", f"{b}.layer_norm2")
        yield from both(f"{a}.mlp.up", f"{b}.mlp.fc1")
        yield from both(f"{a}.mlp.down", f"{b}.mlp.fc2")
