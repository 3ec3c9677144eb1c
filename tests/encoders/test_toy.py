"""The toy encoder: same seed, same weights; its shape can be changed."""

import torch

from clipworks.encoders.toy import toy_encoder


def test_a_seed_is_a_model():
    assert toy_encoder(1).fingerprint == toy_encoder(1).fingerprint != toy_encoder(2).fingerprint


def test_shape_and_seams():
    encoder = toy_encoder(dim=6, image_size=24, layers=3)
    output = encoder.visual.run(torch.zeros(2, 3, 24, 24), output_layers=(0, 2))
    assert output.pooled.shape == (2, 6)
    assert output.grid == (6, 6)
    assert output.layers[2].shape == (2, 37, 16)
    ids = torch.tensor([[1, 5, 63, 0]])
    assert encoder.encode_text(ids).shape == (1, 6)


def test_words_are_numbers():
    encoder = toy_encoder()
    ids = encoder.tokenize(["a red cat", "a cat"])
    assert ids.shape == (2, 5)
    assert (ids[1, 1], ids[1, 2], ids[1, 3:].tolist()) == (ids[0, 1], ids[0, 3], [63, 0])
    rows = encoder.texts(["a red cat", "a cat"])
    torch.testing.assert_close(encoder.texts("a cat")[0], rows[1])
    assert (rows[0] - rows[1]).abs().max() > 1e-3
