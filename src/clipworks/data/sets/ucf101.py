"""UCF101: 101 actions, each video by its middle frame, as CoOp uses it (Soomro et al. 2012).

Layout: UCF-101-midframes/Apply_Eye_Makeup/v_ApplyEyeMakeup_g01_c01.jpg ...; for the split, split_zhou_UCF101.json
(CoOp's) or ucfTrainTestlist/trainlist01.txt and testlist01.txt ("ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1" a line;
the set's own). Without either it is not split.
From: https://www.crcv.ucf.edu/data/UCF101.php; frames and split: https://github.com/KaiyangZhou/CoOp
"""

from __future__ import annotations

import re
from pathlib import Path

from ..labelled import LabelledSet, Row, in_words
from ._read import coop, find, found, lines, listed, per_class

TEMPLATE = "a photo of a person doing {}."


def read(folder: Path) -> LabelledSet:
    images = find(folder, "UCF-101-midframes")
    split = coop("ucf101", folder, images, TEMPLATE)
    if split is not None:
        return split
    if not found(folder, "ucfTrainTestlist/trainlist01.txt"):
        return per_class("ucf101", images, templates=TEMPLATE)
    rows = []
    for part in ("train", "test"):
        videos = [line.split()[0] for line in lines(find(folder, f"ucfTrainTestlist/{part}list01.txt"))]
        names = [frame(video) for video in videos]
        rows += [Row(item, in_words(name.split("/")[0]), part) for item, name in
                 zip(listed(images, names), names, strict=True)]  # fmt: skip
    return LabelledSet.of("ucf101", rows, templates=TEMPLATE)


def frame(video: str) -> str:
    """Path of a video's middle frame: the action's words are joined by underscores there."""
    action, name = video.split("/")
    return f"{'_'.join(re.findall('[A-Z][^A-Z]*', action))}/{name.removesuffix('.avi')}.jpg"
