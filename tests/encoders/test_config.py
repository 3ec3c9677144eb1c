"""Configurations: JSON round trip, and messages for what cannot be."""

import json

import pytest

from clipworks.encoders.config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from clipworks.errors import ClipworksError

RESNET = VisionConfig(
    kind="resnet", width=64, layers=(3, 4, 6, 3), heads=32, pool="attention", activation="relu"
)


@pytest.mark.parametrize(
    "config",
    [
        EncoderConfig(),
        EncoderConfig("rn50", 1024, RESNET),
        EncoderConfig("s", 768, VisionConfig(projection=False), logit_bias=-10.0, init_log_scale=2.3),
        EncoderConfig(
            text=TextConfig(pool="mean", norm_order="post"), preprocess=PreprocessConfig(resize="squash")
        ),
    ],
)
def test_json_round_trip(config):
    again = EncoderConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


def test_missing_keys_take_their_defaults():
    assert EncoderConfig.from_dict({"dim": 8, "vision": {"width": 96, "heads": 6}}) == EncoderConfig(
        dim=8, vision=VisionConfig(width=96, heads=6)
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dims": 8}, "no field 'dims'.*Did you mean 'dim'"),
        ({"vision": {"patch": 8}}, "VisionConfig has no field 'patch'.*patch_size"),
        ({"vision": {"activation": "gelu_tan"}}, "activation must be one of.*Did you mean 'gelu_tanh'"),
        ({"vision": {"heads": 5}}, "vision.heads must divide the width 768"),
        ({"vision": {"class_token": False}}, "pool 'class' needs"),
        ({"vision": {"layers": [1, 2, 3, 4]}}, "layers of a ViT must be one number"),
        ({"vision": {"kind": "resnet"}}, "four numbers"),
        ({"vision": {"projection": False}}, r"dim must equal vision.width \(768\)"),
        ({"vision": {"image_size": 16}}, "image_size must lie in"),
        ({"text": {"pool": "eos"}}, "text.pool must be one of"),
        ({"text": {"norm_order": "before"}}, "norm_order must be one of"),
        ({"text": {"projection": False, "width": 256}}, "text.width"),
        ({"preprocess": {"crop": "middle"}}, "preprocess.crop must be one of"),
        ({"preprocess": {"std": [0.5, 0.0, 0.5]}}, "preprocess.std must lie in"),
        ({"preprocess": {"size": 10**6}}, r"preprocess.size must lie in \[1, 4096\]"),
        ({"preprocess": {"mean": [0.5]}}, r"PreprocessConfig.mean must be tuple\[float, float, float\]. Got \(0.5,\)"),
        ({"dim": "8"}, "EncoderConfig.dim must be int. Got '8'"),
        ({"dim": True}, "EncoderConfig.dim must be int, .*Got True"),
        ({"vision": None}, "EncoderConfig.vision must be VisionConfig. Got None"),
        ({"vision": {"width": 10**30}}, "VisionConfig.width must be int, finite and below 2.31. Got 10"),
        ({"init_log_scale": float("nan")}, "EncoderConfig.init_log_scale must be float, finite.* Got nan"),
        ({"logit_bias": "x"}, r"EncoderConfig.logit_bias must be float \| None. Got 'x'"),
    ],
)
def test_messages(given, message):
    with pytest.raises(ClipworksError, match=message):
        EncoderConfig.from_dict(given)


def test_grid_and_depth():
    assert VisionConfig(image_size=384, patch_size=14).grid == (27, 27)
    assert VisionConfig().depth == 12
    assert RESNET.depth == 16
