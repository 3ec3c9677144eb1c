"""A tiny encoder with words, and folders of small pictures, for the tests of collections."""

import numpy as np
from PIL import Image

from clipworks.encoders.config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from clipworks.encoders.encoder import Encoder
from clipworks.encoders.tokenizers.bpe import CLIPTokenizer

DIM = 16


def encoder(seed=0, **vision):
    shape = {"image_size": 16, "patch_size": 8, "width": 24, "layers": 2, "heads": 3, "mlp_width": 48, **vision}
    text = TextConfig(width=24, layers=2, heads=3, mlp_width=48)
    preprocess = PreprocessConfig(size=shape["image_size"])
    config = EncoderConfig("tiny", dim=DIM, vision=VisionConfig(**shape), text=text, preprocess=preprocess)
    return Encoder(config, CLIPTokenizer(), seed=seed).eval()


def picture(seed, size=(20, 24)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def folder(path, count=12, captions=True, start=0):
    """Pictures `a/000.png` ... with captions beside them."""
    (path / "a").mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        picture(i).save(path / "a" / f"{i:03}.png")
        if captions:
            (path / "a" / f"{i:03}.txt").write_text(f"picture {i}")
    return path


def same(one, two):
    """Whether two open collections hold the same rows to the bit, times and sources apart."""
    names = ("key", "digest", "label", "caption")
    return all(one.column(n) == two.column(n) for n in names) and one.vectors.tobytes() == two.vectors.tobytes()
