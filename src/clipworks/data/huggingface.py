"""Hugging Face datasets: a `Dataset` in memory, a folder made by `save_to_disk`, or "hf:org/name" from the hub.

Images are taken as encoded bytes and decoded here, by the same rules as everywhere. No code of a dataset is run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from ..errors import ClipworksError, check_choice, need
from .item import Item
from .parquet import embedded_item
from .sources import Source, check_unique, modified
from .tables import guess_columns, with_columns


class HuggingFaceSource(Source):
    """A dataset with an image column; needs `pip install 'clipworks[datasets]'`.

    Keys are those of the key column, else `<split>#<row>`. Class numbers become class names; of several captions
    the first is taken. A streamed dataset has no length.

    Parameters
    ----------
    dataset : `Dataset`, `IterableDataset`, a dictionary of splits, a saved folder, or "hf:org/name" (downloads)
    split : which split of several
    image_column, caption_column, label_column, key_column : column names; the image is the first column of that type
    """

    def __init__(
        self,
        dataset: Any,
        *,
        split: str = "train",
        image_column: str | None = None,
        caption_column: str | None = None,
        label_column: str | None = None,
        key_column: str | None = None,
    ):
        datasets = need("datasets", "datasets")
        data = self._load(datasets, dataset, split)
        if isinstance(data, dict):
            data = data[check_choice("split", split, data)]
        super().__init__(os.fspath(dataset) if isinstance(dataset, (str, os.PathLike)) else "dataset")
        if data.features is None:
            reason = "does not say what its columns are (streamed without features)"
            raise ClipworksError(f"dataset {self.name!r} {reason}.")
        self.split = str(data.split or split)
        images = [name for name, kind in data.features.items() if isinstance(kind, datasets.Image)]
        image = image_column or (images[0] if images else None)
        given = {"image": image, "caption": caption_column, "label": label_column, "key": key_column}
        self.roles = guess_columns(list(data.features), given, self.name)
        for name in images:
            data = data.cast_column(name, datasets.Image(decode=False))
        extra = [name for name in images if name != self.roles["image"]]
        self.data = data.remove_columns(extra) if extra else data
        self.classes = {n: kind for n, kind in self.data.features.items() if isinstance(kind, datasets.ClassLabel)}
        if "key" in self.roles and hasattr(self.data, "__len__"):
            values = enumerate(self.data[self.roles["key"]])
            keys = (f"{self.split}#{n}" if k in (None, "") else str(k) for n, k in values)
            check_unique(((key, f"row {n}") for n, key in enumerate(keys)), self.name)

    @staticmethod
    def _load(datasets: Any, dataset: Any, split: str) -> Any:
        if not isinstance(dataset, (str, os.PathLike)):
            return dataset
        text = os.fspath(dataset)
        try:
            if text.startswith("hf:"):
                return datasets.load_dataset(text[3:], split=split)
            return datasets.load_from_disk(text)
        except Exception as error:  # the library raises a dozen unrelated types for "not there"
            raise ClipworksError(f"dataset {text!r} cannot be opened: {error}") from error

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Item]:
        for row, fields in enumerate(self.data):
            place = f"{self.split}#{row}"
            value = fields[self.roles["image"]]
            item = embedded_item({"path": value} if isinstance(value, str) else value, place, None)
            if isinstance(item.image, str):
                item.mtime = modified(item.image)
            yield with_columns(item, {name: self._plain(name, v) for name, v in fields.items()}, self.roles)

    def _plain(self, name: str, value: Any) -> Any:
        if name in self.classes and isinstance(value, int) and value >= 0:
            return self.classes[name].int2str(value)
        if name == self.roles.get("caption") and isinstance(value, list):
            return value[0] if value else None
        return value
