"""Roll-out against products of matrices written out, for each way of pooling."""

import numpy as np
import pytest
import torch
from seen import pair, toy

from clipworks.analysis.explain_attention_rollout import attention_rollout
from clipworks.encoders.config import TextConfig, VisionConfig
from clipworks.errors import ClipworksError

POOLS = [{}, {"class_token": False, "pool": "mean"}, {"class_token": False, "pool": "attention"}]


@pytest.mark.parametrize("vision", POOLS, ids=["class", "mean", "attention"])
def test_rollout_by_hand(vision):
    encoder, (pixels, words) = toy(layers=3, **vision), pair()
    asked = [0, 1, 2, *(["pool"] if encoder.visual.pool is not None else [])]
    output = encoder.visual.run(pixels.double(), output_attention=asked)
    found = attention_rollout(encoder, pixels, words)
    for b in range(2):
        total = np.eye(output.tokens.shape[1])
        for layer in range(3):
            a = output.attentions[layer][b].detach().numpy().mean(0)
            a = 0.5 * a + 0.5 * np.eye(len(a))
            total = (a / a.sum(1, keepdims=True)) @ total
        np.testing.assert_allclose(total.sum(1), 1, atol=1e-9)
        if "pool" in asked:
            row = output.attentions["pool"][b].detach().numpy().mean(0)[0] @ total
        else:
            row = total[0, 1:] if encoder.visual.head else total.mean(0)
        np.testing.assert_allclose(found[b].flatten(), row, atol=1e-5)


def test_the_text_has_no_say():
    encoder, (pixels, words) = toy(), pair()
    torch.testing.assert_close(attention_rollout(encoder, pixels, words), attention_rollout(encoder, pixels, -words))


def test_mistakes_are_named():
    encoder, (pixels, words) = toy(), pair()
    with pytest.raises(ClipworksError, match=r"one vector per image, \(2, 8\)"):
        attention_rollout(encoder, pixels, words[:1])
    with pytest.raises(ClipworksError, match="pixels must have the shape"):
        attention_rollout(encoder, pixels[0], words)


def test_a_resnet_is_refused():
    from clipworks.encoders.config import EncoderConfig
    from clipworks.encoders.encoder import Encoder

    vision = VisionConfig(kind="resnet", image_size=32, width=4, layers=(1, 1, 1, 1), heads=8, activation="relu",
                          pool="attention", class_token=False)  # fmt: skip
    text = TextConfig(vocab_size=9, width=8, layers=1, heads=2, mlp_width=8, eot_id=8)
    encoder = Encoder(EncoderConfig("resnet", 8, vision, text)).eval()
    with pytest.raises(ClipworksError, match="use 'occlusion'"):
        attention_rollout(encoder, torch.zeros(1, 3, 32, 32), torch.ones(1, 8))
