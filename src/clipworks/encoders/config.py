"""What an encoder is made of, as frozen dataclasses that travel with the weights as JSON.

Every configuration has `to_dict` and `from_dict`; an unknown key is an error that names the closest match, so a
configuration written by another version is never half understood.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ..errors import ClipworksError, check_choice, check_range, closest

ACTIVATIONS = ("quick_gelu", "gelu", "gelu_tanh", "relu")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LARGEST = 4096  # side of a prepared image in pixels, of which 200 MB are a tensor
MOST = 2**31  # what no size of a model reaches
C = TypeVar("C", bound="_Config")


class _Config:
    """JSON round trip and the check of types shared by all configurations."""

    def __post_init__(self) -> None:
        """Refuse a value of another type than the field's: it may come from anyone's file."""
        for name, kind in _kinds(type(self)).items():
            value = getattr(self, name)
            if not _is(value, kind):
                shown = str(kind) if get_args(kind) else kind.__name__
                shown += ", finite and below 2^31" if isinstance(value, numbers.Real) else ""
                raise ClipworksError(f"{type(self).__name__}.{name} must be {shown}. Got {value!r:.60}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists, numbers and strings, ready for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls: type[C], given: Mapping[str, Any]) -> C:
        """Build from what `to_dict` gave; missing keys take their defaults.

        Raises
        ------
        ClipworksError
            For an unknown key, a missing key without default, or a value that is not allowed.
        """
        names = [f.name for f in fields(cls)]  # type: ignore[arg-type]
        for key in given:
            if key not in names:
                raise ClipworksError(
                    f"{cls.__name__} has no field {key!r}; its fields are {', '.join(names)}.{closest(key, names)}"
                )
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        try:
            return cls(**values)
        except TypeError as error:
            raise ClipworksError(f"{cls.__name__}: {error}") from error


@dataclass(frozen=True)
class VisionConfig(_Config):
    """The image tower. The defaults are ViT-B/32.

    Parameters
    ----------
    kind : "vit" or "resnet" (OpenAI's modified ResNet)
    image_size : side of the square training image, in pixels
    patch_size : side of a patch, that is pixels per token in each direction (32 for every ResNet)
    width : channels of a token (ResNet: of the stem)
    layers : number of blocks (ResNet: four numbers, blocks per stage)
    heads : attention heads (ResNet: of the attention pool)
    mlp_width : hidden channels of the feed-forward part (not used by ResNet)
    activation : "quick_gelu" (OpenAI, DFN), "gelu" (LAION), "gelu_tanh" (SigLIP), "relu" (ResNet)
    pool : "class" token, "attention" (SigLIP's learned query; every ResNet) or "mean" of the patches
    class_token : whether a learned token stands before the patches
    norm_pre, norm_post : layer norms before the first and after the last block
    stem : how pixels become tokens, a name known to `stems.build_stem`
    patch_bias : whether the patch projection has a bias
    norm_eps : epsilon of the layer norms
    projection : whether a linear map without bias leads into the joint space
    memory : pairs of a table that the whole image looks up besides (0: no table), see `vit.Memory`; ViT only
    """

    kind: str = "vit"
    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    layers: int | tuple[int, ...] = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "quick_gelu"
    pool: str = "class"
    class_token: bool = True
    norm_pre: bool = True
    norm_post: bool = True
    stem: str = "patch"
    patch_bias: bool = False
    norm_eps: float = 1e-5
    projection: bool = True
    memory: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("vision.memory", self.memory, 0)
        check_choice("vision.kind", self.kind, ("vit", "resnet"))
        check_choice("vision.activation", self.activation, ACTIVATIONS)
        check_choice("vision.pool", self.pool, ("class", "attention", "mean"))
        check_range("vision.image_size", self.image_size, self.patch_size)
        check_range("vision.patch_size", self.patch_size, 1)
        check_range("vision.norm_eps", self.norm_eps, 0, 1)
        if self.kind == "resnet":
            if isinstance(self.layers, int) or len(self.layers) != 4:
                raise ClipworksError(f"vision.layers of a ResNet must be four numbers. Got {self.layers!r}.")
        elif not isinstance(self.layers, int):
            raise ClipworksError(f"vision.layers of a ViT must be one number. Got {self.layers!r}.")
        if self.kind == "vit" and self.pool == "class" and not self.class_token:
            raise ClipworksError("vision.pool 'class' needs vision.class_token true. Got false.")
        _check_heads("vision", self.width * (32 if self.kind == "resnet" else 1), self.heads)

    @property
    def depth(self) -> int:
        """Number of blocks, over all stages."""
        return self.layers if isinstance(self.layers, int) else sum(self.layers)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens at `image_size`."""
        side = self.image_size // self.patch_size
        return side, side


@dataclass(frozen=True)
class TextConfig(_Config):
    """The text tower. The defaults are the text tower of ViT-B/32.

    Parameters
    ----------
    vocab_size : number of token ids
    context_length : most tokens of a text, start and end included
    width, layers, heads, mlp_width, activation : as in `VisionConfig`
    causal : whether a token sees only those before it
    pool : where the text's vector is read: "eot" (first end token), "last" position (SigLIP), "mean" of the
        tokens that are not padding, or "first"
    norm_order : "pre" (norm inside the residual branch) or "post" (after the sum, BERT)
    embedding_norm : whether a layer norm follows the sum of token and position embeddings (BERT)
    norm_final : whether a layer norm follows the last block
    projection, projection_bias : the linear map into the joint space and its bias
    tokenizer : "clip-bpe", or the name of a tokenizer file in the package or beside the weights
    eot_id, pad_id : ids of the end token and of padding
    mask_padding : whether padding is hidden from the attention (BERT; CLIP and SigLIP do not)
    norm_eps : epsilon of the layer norms
    """

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 512
    layers: int = 12
    heads: int = 8
    mlp_width: int = 2048
    activation: str = "quick_gelu"
    causal: bool = True
    pool: str = "eot"
    norm_order: str = "pre"
    embedding_norm: bool = False
    norm_final: bool = True
    projection: bool = True
    projection_bias: bool = False
    tokenizer: str = "clip-bpe"
    eot_id: int = 49407
    pad_id: int = 0
    mask_padding: bool = False
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("text.activation", self.activation, ACTIVATIONS)
        check_choice("text.pool", self.pool, ("eot", "last", "mean", "first"))
        check_choice("text.norm_order", self.norm_order, ("pre", "post"))
        check_range("text.context_length", self.context_length, 1)
        check_range("text.norm_eps", self.norm_eps, 0, 1)
        _check_heads("text", self.width, self.heads)


@dataclass(frozen=True)
class PreprocessConfig(_Config):
    """From an image to the pixels that the tower was trained on. The defaults are OpenAI's.

    Parameters
    ----------
    size : side of the square result, in pixels
    mean, std : per channel, in units of [0, 1]
    interpolation : "bicubic" or "bilinear"
    resize : "shortest" side to `size` (aspect kept) or "squash" both sides
    crop : "center" or "none"
    """

    size: int = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    interpolation: str = "bicubic"
    resize: str = "shortest"
    crop: str = "center"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("preprocess.size", self.size, 1, LARGEST)
        for deviation in self.std:
            check_range("preprocess.std", deviation, 1e-6)
        check_choice("preprocess.interpolation", self.interpolation, ("bicubic", "bilinear"))
        check_choice("preprocess.resize", self.resize, ("shortest", "squash"))
        check_choice("preprocess.crop", self.crop, ("center", "none"))


@dataclass(frozen=True)
class EncoderConfig(_Config):
    """Both towers, what stands before them and how their similarities are scaled.

    Parameters
    ----------
    name : what the model is called
    dim : dimensions of the joint space
    vision, text, preprocess : the parts
    init_log_scale : start of the learned logarithm of the similarity's factor (default log(1/0.07), OpenAI;
        SigLIP log 10)
    logit_bias : start of the learned bias of SigLIP's similarities (-10), None for models without

    Examples
    --------
    >>> config = EncoderConfig(name="tiny", dim=8)
    >>> EncoderConfig.from_dict(config.to_dict()) == config
    True
    """

    name: str = "ViT-B-32"
    dim: int = 512
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    init_log_scale: float = math.log(1 / 0.07)
    logit_bias: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("dim", self.dim, 1)
        if self.vision.kind == "vit" and not self.vision.projection and self.vision.width != self.dim:
            raise ClipworksError(
                f"without vision.projection dim must equal vision.width ({self.vision.width}). Got {self.dim}."
            )
        if not self.text.projection and self.text.width != self.dim:
            raise ClipworksError(
                f"without text.projection dim must equal text.width ({self.text.width}). Got {self.dim}."
            )

    def to_dict(self) -> dict[str, Any]:
        parts = {"vision": self.vision, "text": self.text, "preprocess": self.preprocess}
        return super().to_dict() | {name: part.to_dict() for name, part in parts.items()}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> EncoderConfig:
        """As for the parts, which may be given as dictionaries."""
        kinds: dict[str, type[_Config]] = {"vision": VisionConfig, "text": TextConfig, "preprocess": PreprocessConfig}
        values = {
            key: kinds[key].from_dict(value) if key in kinds and isinstance(value, Mapping) else value
            for key, value in given.items()
        }
        return super().from_dict(values)


def _check_heads(where: str, width: int, heads: int) -> None:
    check_range(f"{where}.heads", heads, 1)
    if width % heads:
        raise ClipworksError(f"{where}.heads must divide the width {width}. Got {heads}.")


_kinds: Callable[[type], dict[str, Any]] = cache(get_type_hints)


def _is(value: Any, kind: Any) -> bool:
    """Whether a value has the type of a field; whole numbers do for real ones, which must be finite."""
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        inner = inner[:1] * len(value) if inner[-1] is Ellipsis and isinstance(value, tuple) else inner
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(_is, value, inner))
    if get_args(kind):  # one of several
        return any(_is(value, one) for one in get_args(kind))
    if kind in (int, float):
        right = isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
        return right and abs(value) < MOST
    return isinstance(value, kind)
