"""What the tests of this room share: tiny encoders of both shapes, pixels with labels, quick settings of any method."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

from clipworks.encoders.config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from clipworks.encoders.encoder import Encoder
from clipworks.encoders.formats.build import blank
from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.toy import toy_encoder
from clipworks.zeroshot.classifier import class_vectors

NAMES = ["cat", "dog", "old oak"]
TEMPLATE = "a photo of a {}."


def clip_shaped(seed: int = 0) -> Encoder:
    """Class token, causal text with its end token, norms before the parts."""
    return toy_encoder(seed, tokenizer=CLIPTokenizer())


def bert_shaped(seed: int = 0) -> Encoder:
    """Text with norms behind the sums and mean pooling, as in the bundled model; image tower without class token."""
    shape: dict[str, Any] = {"width": 16, "layers": 2, "heads": 2, "mlp_width": 32, "activation": "gelu"}
    vision = VisionConfig(image_size=16, patch_size=4, class_token=False, pool="mean", **shape)
    text = TextConfig(causal=False, pool="mean", norm_order="post", embedding_norm=True, norm_final=False,
                      mask_padding=True, **shape)  # fmt: skip
    config = EncoderConfig("toy-bert", 8, vision, text, PreprocessConfig(16))
    return Encoder(config, CLIPTokenizer(), seed=seed).eval()


SHAPES = {"clip": clip_shaped, "bert": bert_shaped}


def pixels(count: int = 6, side: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def coloured(count: int = 12, seed: int = 0, side: int = 16) -> tuple[torch.Tensor, np.ndarray]:
    """Pixels whose channel 0, 1 or 2 is bright: three classes that can be learned."""
    x, y = 0.3 * pixels(count, side, seed), np.arange(count) % 3
    x[torch.arange(count), torch.from_numpy(y)] += 2.0
    return x, y


def zero_shot(encoder: Encoder, x: Any, names: list[str] = NAMES, template: str = TEMPLATE) -> np.ndarray:
    """Logits of plain CLIP."""
    return (encoder.logit_scale * encoder.images(x) @ class_vectors(names, encoder, templates=template).T).numpy()


def quick(kind: type, **settings: Any) -> Any:
    """The method with settings that train for a step or two."""
    short = {
        "names": NAMES,
        "templates": TEMPLATE,
        "steps_per_shot": 0.5,
        "steps": 1,
        "epochs": 1,
        "probe_epochs": 1,
        "batch_size": 6,
        "augment": "none",
    }
    known = inspect.signature(kind).parameters
    return kind(**{**{k: v for k, v in short.items() if k in known}, **settings})


def vit_b16() -> Encoder:
    """The shapes of ViT-B/16, without memory behind them."""
    return blank(EncoderConfig("ViT-B-16", vision=VisionConfig(patch_size=16)))


def changed(before: Encoder, after: Encoder) -> set[str]:
    """Names of the weights that differ, of two encoders with the same modules."""
    one, two = before.state_dict(), after.state_dict()
    assert set(one) == set(two)
    return {name for name, value in one.items() if not torch.equal(value, two[name])}
