"""Encoders for the tests of explanations: a toy in float64, and one that looks at a single place."""

import torch

from clipworks.encoders.toy import toy_encoder


def toy(**vision):
    encoder = toy_encoder(5, **{"dim": 8, "image_size": 16, **vision}).double()
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in encoder.visual.parameters():
            p += 0.2 * torch.randn(p.shape, generator=draw, dtype=torch.float64)
    return encoder


def pair(n=2, side=16):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, side, side, generator=draw), torch.randn(n, 8, generator=draw)


class Spot:
    """Its vector turns towards (1, 0) with the red at one place, and sees nothing else."""

    dim, device = 2, "cpu"

    def __init__(self, y, x, side=8):
        self.place = (slice(y, y + side), slice(x, x + side))

    def encode_image(self, pixels):
        red = pixels[:, 0][:, self.place[0], self.place[1]].mean((1, 2))
        return torch.nn.functional.normalize(torch.stack([red, torch.ones_like(red)], 1), dim=1)
