"""Plain patch tokens are the model's own."""

import numpy as np
import plain_dense as plain
import torch

from clipworks.segment.patch_tokens import PatchTokens


@torch.no_grad()
def test_they_are_the_models_own_tokens_bit_for_bit():
    encoder = plain.toy()
    config = encoder.config.preprocess
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.mean, config.std))
    output = encoder.visual.run((plain.images() - mean) / std)
    features = PatchTokens().features(plain.hidden(encoder))
    assert torch.equal(features.flatten(1, 2), encoder.visual.project(output.patches))


@torch.no_grad()
def test_against_numpy():
    found = plain.hidden()
    q, k, _ = plain.projections(found)
    weights = plain.softmax(q @ k.swapaxes(-2, -1) / np.sqrt(q.shape[-1]))
    expected = plain.projected(found, plain.finished(found, plain.attended(found, weights)))
    np.testing.assert_allclose(PatchTokens().features(found), expected, atol=1e-10)


@torch.no_grad()
def test_cosines_with_the_words():
    found, words = plain.hidden(), torch.eye(8)[:3]
    features = PatchTokens().features(found).numpy()
    expected = features[..., :3] / np.linalg.norm(features, axis=-1, keepdims=True)
    np.testing.assert_allclose(PatchTokens().local(found, words), expected.transpose(0, 3, 1, 2), atol=1e-6)
