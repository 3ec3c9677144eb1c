"""Images of a simple part, good and with a planted defect, and a toy encoder that sees them."""

import torch

from clipworks.encoders.toy import toy_encoder

SIDE = 24


def toy(**vision):
    return toy_encoder(3, **{"dim": 8, "image_size": SIDE, **vision})


def good(n=8, seed=0, side=SIDE):
    """Stripes with a little noise: pixels (n, 3, side, side)."""
    draw = torch.Generator().manual_seed(seed)
    stripes = torch.arange(side).div(4, rounding_mode="floor").remainder(2).float()
    return stripes.expand(n, 3, side, side) + 0.05 * torch.randn(n, 3, side, side, generator=draw)


def flawed(n=6, seed=1, side=SIDE, cells=2):
    """The same with a square of another texture, and masks (n, side, side) of where it is."""
    draw = torch.Generator().manual_seed(seed)
    images, masks = good(n, seed, side), torch.zeros(n, side, side, dtype=torch.bool)
    for image, mask in zip(images, masks, strict=True):
        y, x = (4 * torch.randint(0, side // 4 - cells + 1, (2,), generator=draw)).tolist()
        place = (slice(y, y + 4 * cells), slice(x, x + 4 * cells))
        image[(slice(None), *place)] = 2 * torch.randn(3, 4 * cells, 4 * cells, generator=draw)
        mask[place] = True
    return images, masks.numpy()
