"""Ways to fine-tune, as data: which parts learn, how fast, for how long, and how much of the start stays."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One training run of a preset.

    Parameters
    ----------
    objective : "classify" (cross-entropy of a head that begins as the class words), or "contrast" (images against
        words, as in pre-training)
    learns : "all", or "head" for the last layers alone
    lr, weight_decay, epochs, warmup : see `train`
    """

    objective: str
    learns: str
    lr: float
    weight_decay: float
    epochs: int
    warmup: float = 0.1


@dataclass(frozen=True)
class Preset:
    """Stages in order, and the share of the fine-tuned weights in the result (`alpha` of WiSE-FT).

    Parameters
    ----------
    stages : what is trained, one after the other
    alpha : 1 keeps the fine-tuned weights as they are
    batch_size : pairs per step
    """

    stages: tuple[Stage, ...]
    alpha: float = 1.0
    batch_size: int = 128


_HEAD = Stage("classify", "head", lr=1e-3, weight_decay=0.0, epochs=10)
# 3e-5 at batch 512 in the WiSE-FT code, 1e-5 in FLYP's and for small sets; ten times more destroys CLIP
_FULL = Stage("classify", "all", lr=1e-5, weight_decay=0.1, epochs=10)

PRESETS = {
    "full": Preset((_FULL,)),
    "head": Preset((_HEAD,)),
    # LP-FT (Kumar et al. 2022): the head first, so that full fine-tuning does not distort the features to meet it
    "lp-ft": Preset((_HEAD, _FULL)),
    # FLYP (Goyal et al. 2023): fine-tune as it was pre-trained, contrasting images with sentences about their class
    "flyp": Preset((Stage("contrast", "all", lr=1e-5, weight_decay=0.2, epochs=10),)),
    # WiSE-FT (Wortsman et al. 2022): full fine-tuning, then the middle of the line to the start
    "wise-ft": Preset((_FULL,), alpha=0.5),
}
