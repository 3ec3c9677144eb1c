"""Emoji in several drawing styles: every emoji is a class, every style a domain.

Layout: emoji.json, {"styles": {"noto": ...}, "emoji": [{"code": "1f436", "name": "dog face", "group": ...}, ...]}, and
noto/1f436.png ..., a folder of pictures per style. It is not split; with one picture of a class per style, the shots
come from the styles that are not left out.
From: the npm packages @iconify-json/noto, twemoji, openmoji ..., drawn at 64 pixels (open licences)
"""

from __future__ import annotations

import json
from pathlib import Path

from ..labelled import LabelledSet, Row, file_item
from ._read import distinct, find


def read(folder: Path) -> LabelledSet:
    table = json.loads(find(folder, "emoji.json").read_text(encoding="utf-8"))
    names = distinct([entry["name"] for entry in table["emoji"]])
    rows = [Row(file_item(folder, path), name, domain=style) for style in table["styles"]
            for name, entry in zip(names, table["emoji"], strict=True)
            if (path := folder / style / f"{entry['code']}.png").is_file()]  # fmt: skip
    return LabelledSet.of("emoji_styles", rows, names, "an emoji of a {}.")
