"""Images of one to four coloured squares in quarters, as the tests of region recipes need them: boxes with words."""

from __future__ import annotations

import numpy as np

from clipworks.data.item import Item
from training.toy import COLOURS


def scenes(count: int, seed: int = 0, least: int = 2, most: int = 4) -> list[Item]:
    """Items of 32 x 32 pixels; a square fills most of its quarter, the caption says nothing of colours."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        pixels = rng.integers(0, 40, (32, 32, 3)).astype(np.uint8)
        regions = []
        for quarter in rng.permutation(4)[: int(rng.integers(least, most + 1))]:
            name = str(rng.choice(list(COLOURS)))
            x, y = (int(v) for v in 16 * np.array([quarter % 2, quarter // 2]) + rng.integers(0, 4, 2))
            side = int(rng.integers(10, 13))
            pixels[y : y + side, x : x + side] = COLOURS[name]
            box = [x / 32, y / 32, (x + side) / 32, (y + side) / 32]
            regions.append({"box": box, "text": f"{name} square", "score": float(rng.random())})
        made.append(Item(f"s{number}", pixels, caption="a photo of a square", columns={"regions": regions}))
    return made


NAMES = [f"{colour} square" for colour in COLOURS]
