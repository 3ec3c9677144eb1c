"""What has been published: architectures (for state dictionaries that come without their configuration) and the
repositories of trained weights, by the names that people use."""

from __future__ import annotations

from typing import Any


def _clip(dim: int, image: int, vision: dict[str, Any], text: int, text_layers: int = 12) -> dict[str, Any]:
    """A model description in open_clip's terms, with CLIP's text tower of width `text` (heads of 64 channels)."""
    words = {"context_length": 77, "vocab_size": 49408, "width": text, "heads": text // 64, "layers": text_layers}
    return {"embed_dim": dim, "vision_cfg": {"image_size": image, **vision}, "text_cfg": words}


def _vit(patch: int, width: int, layers: int, head_width: int = 64, mlp_ratio: float = 4.0) -> dict[str, Any]:
    return {"patch_size": patch, "width": width, "layers": layers, "head_width": head_width, "mlp_ratio": mlp_ratio}


def _resnet(width: int, *layers: int) -> dict[str, Any]:
    return {"width": width, "layers": list(layers)}


def _siglip(version: int, timm: str, width: int, layers: int, heads: int, mlp_ratio: float = 4.0) -> dict[str, Any]:
    """SigLIP (1 or 2) with an image tower of timm; its text tower has the same width, depth and heads."""
    text: dict[str, Any] = {
        "context_length": 64, "vocab_size": 32000 if version == 1 else 256000,
        "hf_tokenizer_name": "tokenizer.json", "tokenizer_kwargs": {"clean": "canonicalize"},
        "width": width, "heads": heads, "layers": layers,
        "mlp_ratio": mlp_ratio, "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    }  # fmt: skip
    if version == 2:
        text["act_kwargs"] = {"approximate": "tanh"}
    size = int(timm.rsplit("_", 1)[1])
    vision = {"image_size": size, "timm_model_name": timm, "timm_pool": "map", "timm_proj": "none"}
    return {"embed_dim": width, "init_logit_bias": -10, "custom_text": True, "vision_cfg": vision, "text_cfg": text}


_B32, _B16, _L14 = _vit(32, 768, 12), _vit(16, 768, 12), _vit(14, 1024, 24)
_H14 = _vit(14, 1280, 32, 80)
_GELU = {
    "RN50": _clip(1024, 224, _resnet(64, 3, 4, 6, 3), 512),
    "RN101": _clip(512, 224, _resnet(64, 3, 4, 23, 3), 512),
    "RN50x4": _clip(640, 288, _resnet(80, 4, 6, 10, 6), 640),
    "RN50x16": _clip(768, 384, _resnet(96, 6, 8, 18, 8), 768),
    "RN50x64": _clip(1024, 448, _resnet(128, 3, 15, 36, 10), 1024),
    "ViT-B-32": _clip(512, 224, _B32, 512),
    "ViT-B-32-256": _clip(512, 256, _B32, 512),
    "ViT-B-16": _clip(512, 224, _B16, 512),
    "ViT-L-14": _clip(768, 224, _L14, 768),
    "ViT-L-14-336": _clip(768, 336, _L14, 768),
    "ViT-H-14": _clip(1024, 224, _H14, 1024, 24),
    "ViT-H-14-378": _clip(1024, 378, _H14, 1024, 24),
    "ViT-g-14": _clip(1024, 224, _vit(14, 1408, 40, 88, 4.3637), 1024, 24),
    "ViT-bigG-14": _clip(1280, 224, _vit(14, 1664, 48, 104, 4.9231), 1280, 32),
}
_BASE, _LARGE, _SO400M = (768, 12, 12), (1024, 24, 16), (1152, 27, 16, 3.7362)
_SIGLIP = {
    "ViT-B-16-SigLIP": _siglip(1, "vit_base_patch16_siglip_224", *_BASE),
    "ViT-B-16-SigLIP-256": _siglip(1, "vit_base_patch16_siglip_256", *_BASE),
    "ViT-B-16-SigLIP-384": _siglip(1, "vit_base_patch16_siglip_384", *_BASE),
    "ViT-B-16-SigLIP-512": _siglip(1, "vit_base_patch16_siglip_512", *_BASE),
    "ViT-L-16-SigLIP-256": _siglip(1, "vit_large_patch16_siglip_256", *_LARGE),
    "ViT-L-16-SigLIP-384": _siglip(1, "vit_large_patch16_siglip_384", *_LARGE),
    "ViT-SO400M-14-SigLIP": _siglip(1, "vit_so400m_patch14_siglip_224", *_SO400M),
    "ViT-SO400M-14-SigLIP-384": _siglip(1, "vit_so400m_patch14_siglip_384", *_SO400M),
    "ViT-B-32-SigLIP2-256": _siglip(2, "vit_base_patch32_siglip_256", *_BASE),
    "ViT-B-16-SigLIP2": _siglip(2, "vit_base_patch16_siglip_224", *_BASE),
    "ViT-L-16-SigLIP2-256": _siglip(2, "vit_large_patch16_siglip_256", *_LARGE),
    "ViT-SO400M-16-SigLIP2-384": _siglip(2, "vit_so400m_patch16_siglip_384", *_SO400M),
}
# name -> description in open_clip's terms; a name without "-quickgelu" has the exact gelu (LAION), as there
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **_GELU, **{f"{name}-quickgelu": {**model, "quick_gelu": True} for name, model in _GELU.items()}, **_SIGLIP,
}  # fmt: skip

# name -> (repository on the Hugging Face hub, dim, image size, what it is)
HUB: dict[str, tuple[str, int, int, str]] = {
    "ViT-B-32/openai": ("openai/clip-vit-base-patch32", 512, 224, "OpenAI, 400M pairs"),
    "ViT-B-16/openai": ("openai/clip-vit-base-patch16", 512, 224, "OpenAI, 400M pairs"),
    "ViT-L-14/openai": ("openai/clip-vit-large-patch14", 768, 224, "OpenAI, 400M pairs"),
    "ViT-L-14-336/openai": ("openai/clip-vit-large-patch14-336", 768, 336, "OpenAI, 400M pairs"),
    "ViT-B-32/laion2b": ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", 512, 224, "LAION-2B"),
    "ViT-B-16/laion2b": ("laion/CLIP-ViT-B-16-laion2B-s34B-b88K", 512, 224, "LAION-2B"),
    "ViT-L-14/laion2b": ("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", 768, 224, "LAION-2B"),
    "ViT-H-14/laion2b": ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", 1024, 224, "LAION-2B"),
    "ViT-bigG-14/laion2b": ("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", 1280, 224, "LAION-2B"),
    "ViT-B-32/metaclip": ("facebook/metaclip-b32-fullcc2.5b", 512, 224, "MetaCLIP, 2.5B pairs"),
    "ViT-B-16/metaclip": ("facebook/metaclip-b16-fullcc2.5b", 512, 224, "MetaCLIP, 2.5B pairs"),
    "ViT-L-14/metaclip": ("facebook/metaclip-l14-fullcc2.5b", 768, 224, "MetaCLIP, 2.5B pairs"),
    "ViT-H-14/metaclip": ("facebook/metaclip-h14-fullcc2.5b", 1024, 224, "MetaCLIP, 2.5B pairs"),
    "ViT-B-16/dfn2b": ("apple/DFN2B-CLIP-ViT-B-16", 512, 224, "Apple, filtered 2B"),
    "ViT-L-14/dfn2b": ("apple/DFN2B-CLIP-ViT-L-14", 768, 224, "Apple, filtered 2B"),
    "ViT-H-14/dfn5b": ("apple/DFN5B-CLIP-ViT-H-14", 1024, 224, "Apple, filtered 5B"),
    "ViT-H-14-378/dfn5b": ("apple/DFN5B-CLIP-ViT-H-14-378", 1024, 378, "Apple, filtered 5B"),
    "ViT-B-16-SigLIP/webli": ("google/siglip-base-patch16-224", 768, 224, "SigLIP"),
    "ViT-B-16-SigLIP-256/webli": ("google/siglip-base-patch16-256", 768, 256, "SigLIP"),
    "ViT-B-16-SigLIP-384/webli": ("google/siglip-base-patch16-384", 768, 384, "SigLIP"),
    "ViT-L-16-SigLIP-256/webli": ("google/siglip-large-patch16-256", 1024, 256, "SigLIP"),
    "ViT-SO400M-14-SigLIP-384/webli": ("google/siglip-so400m-patch14-384", 1152, 384, "SigLIP"),
    "ViT-B-32-SigLIP2-256/webli": ("google/siglip2-base-patch32-256", 768, 256, "SigLIP 2, multilingual"),
    "ViT-B-16-SigLIP2/webli": ("google/siglip2-base-patch16-224", 768, 224, "SigLIP 2, multilingual"),
    "ViT-L-16-SigLIP2-256/webli": ("google/siglip2-large-patch16-256", 1024, 256, "SigLIP 2, multilingual"),
    "ViT-SO400M-14-SigLIP2-384/webli": ("google/siglip2-so400m-patch14-384", 1152, 384, "SigLIP 2, multilingual"),
}
