"""PACS: seven kinds of things as photos, art paintings, cartoons and sketches (Li et al. 2017).

Layout: photo/dog/056_0001.jpg ..., art_painting/, cartoon/, sketch/ (all may lie in PACS/, kfold/ or images/). It is
not split; the domains are its point (`--protocol domains` leaves out one at a time).
From: https://huggingface.co/datasets/flwrlabs/pacs (research)
"""

from __future__ import annotations

from pathlib import Path

from ..labelled import LabelledSet, Row, file_item, in_words
from ._read import class_folders, find

DOMAINS = ("photo", "art_painting", "cartoon", "sketch")


def read(folder: Path) -> LabelledSet:
    root = find(folder, "photo", "PACS/photo", "kfold/photo", "images/photo").parent
    rows = [Row(file_item(root, path), in_words(label), domain=domain) for domain in DOMAINS
            for label, path in class_folders(find(root, domain))]  # fmt: skip
    return LabelledSet.of("pacs", rows)
