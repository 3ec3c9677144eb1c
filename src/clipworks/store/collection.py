"""`Collection`: what `embed` makes and all else reads: keys, vectors, columns of one version, memory-mapped."""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..errors import ClipworksError, CollectionError, check_choice
from ..types import Features
from . import snapshot
from .identity import recorded
from .journal import TABLE, Journal
from .table import FORMAT, INTERNAL, OWN, damaged, is_collection, literal, make_schema, open_table, translated
from .writer import Writer

if TYPE_CHECKING:
    import torch

    from ..encoders.encoder import Encoder


class Collection:
    """One version of an embedding collection, read-only and memory-mapped; rows are sorted by key.

    Opening costs milliseconds and a few pages of memory. A writer never disturbs an open collection: it keeps
    showing the version it was opened at.

    Parameters
    ----------
    path : the collection's folder

    Attributes
    ----------
    path : the folder
    vectors : (rows, dim) memory-mapped matrix, float16 or float32
    meta : format, encoder and dates
    norm : length of the longest vector

    Raises
    ------
    CollectionError
        If there is none, or if it is damaged.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not is_collection(self.path) and Journal.read(self.path).files:
            raise damaged(self.path, {TABLE: "has lost all its versions"})
        if not is_collection(self.path):
            raise CollectionError(_absent(self.path))
        _check_files(self.path)
        self._snapshot = snapshot.current(self.path)
        self.vectors: np.ndarray = self._snapshot.vectors
        self.meta: dict[str, Any] = self._snapshot.meta
        self.norm: float = self._snapshot.norm
        self._compared = False

    @classmethod
    def open(cls, path: str | os.PathLike | Collection) -> Collection:
        """Open the collection at `path`; an open one is returned as it is."""
        return path if isinstance(path, Collection) else cls(path)

    @classmethod
    def create(
        cls,
        path: str | os.PathLike,
        *,
        encoder: Encoder | None = None,
        dim: int | None = None,
        dtype: str = "float16",
        features: Features | None = None,
    ) -> Collection:
        """Make a new collection, empty or from vectors that are already there.

        Parameters
        ----------
        path : a folder that does not exist or is empty
        encoder : the one whose vectors it will hold; recorded, and needed to search by words
        dim : length of the vectors, where neither `encoder` nor `features` says it
        dtype : "float16" (half the size, relative error at most 2^-11) or "float32"
        features : rows to begin with; their fingerprint is recorded

        Returns
        -------
        the open collection
        """
        place = Path(path)
        if is_collection(place):
            raise CollectionError(f"there is a collection at {str(place)!r} already; open it, or choose another place.")
        identity = recorded(encoder) if encoder is not None else {}
        if features is not None:
            if identity and features.fingerprint and features.fingerprint != identity["fingerprint"]:
                raise CollectionError("features and encoder have different fingerprints.")
            dim = features.vectors.shape[1]
            identity = identity or {"fingerprint": features.fingerprint}
        dim = encoder.dim if encoder is not None else dim
        if dim is None:
            raise ClipworksError("dim must be given where there is neither an encoder nor features.")
        with Writer(place, make_schema(dim, dtype, new_meta(identity))):
            pass
        made = cls(place)
        return made if features is None else made.add(features)

    def add(self, features: Features) -> Collection:
        """Add vectors from elsewhere under new keys, and return the collection opened anew.

        Parameters
        ----------
        features : vectors (n, dim) with keys, labels and texts (stored as captions); a fingerprint other than the
            collection's is refused
        """
        mine = self.meta["encoder"].get("fingerprint", "")
        if features.fingerprint and mine and features.fingerprint != mine:
            raise CollectionError(
                f"the features' fingerprint {features.fingerprint[:12]} is not that of the collection, {mine[:12]}."
            )
        if features.vectors.shape[1] != self.dim:
            raise CollectionError(f"vectors must have {self.dim} columns. Got {features.vectors.shape[1]}.")
        keys = list(features.keys)
        twice = next((k for k in keys if k in self.rows_by_key), None)
        if twice is not None or len(set(keys)) < len(keys):
            raise CollectionError(f"keys must be new and unique. Got {twice if twice is not None else 'one twice'!r}.")
        given = features.labels
        labels = [None] * len(keys) if given is None else [str(x) for x in np.asarray(given).tolist()]
        texts = [None] * len(keys) if features.texts is None else list(features.texts)
        with Writer(self.path) as writer:
            for start in range(0, len(keys), 1 << 15):
                part = slice(start, start + (1 << 15))
                belongs = zip(keys[part], labels[part], texts[part], strict=True)
                rows: list[dict[str, Any]] = [{"key": k, "label": n, "caption": t} for k, n, t in belongs]
                writer.append(writer.build(rows, np.asarray(features.vectors[part])))
            writer.tidy()
        return Collection(self.path)

    # -- what is inside ------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.vectors)

    def __repr__(self) -> str:
        name = self.meta["encoder"].get("name") or "unknown encoder"
        return f"Collection({str(self.path)!r}, {len(self)} rows, dim {self.dim}, {self.dtype}, {name})"

    def __contains__(self, key: str) -> bool:
        return key in self.rows_by_key

    @property
    def dim(self) -> int:
        return int(self.vectors.shape[1])

    @property
    def version(self) -> str:
        """File name of the table's manifest that is shown."""
        return self._snapshot.version

    @property
    def dtype(self) -> str:
        return str(self.vectors.dtype)

    @property
    def fingerprint(self) -> str:
        """Of the encoder that made the vectors; empty where it is not known."""
        return self.meta["encoder"].get("fingerprint", "")

    @cached_property
    def keys(self) -> list[str]:
        return self._snapshot.table["key"].to_pylist()

    @cached_property
    def rows_by_key(self) -> dict[str, int]:
        """Key to row number."""
        return {key: row for row, key in enumerate(self.keys)}

    @cached_property
    def columns(self) -> dict[str, str]:
        """Name and type of every column that can be asked for and filtered by, apart from the vectors."""
        return {f.name: str(f.type) for f in self._snapshot.table.schema if f.name not in INTERNAL}

    def column(self, name: str) -> list[Any]:
        """One column as a list, in the order of the rows."""
        check_choice("column", name, self.columns)
        return self._snapshot.table[name].to_pylist()

    def take(self, rows: Sequence[int] | np.ndarray, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Some columns of some rows, one dictionary per row."""
        for name in columns:
            check_choice("columns", name, self.columns)
        if not columns:
            return [{} for _ in rows]
        return self._snapshot.table.select(list(columns)).take(pa.array(np.asarray(rows, np.int64))).to_pylist()

    def arrow(self, columns: Sequence[str]) -> pa.Table:
        """Some columns as they are mapped, the internal ones too."""
        return self._snapshot.table.select(list(columns))

    def sources(self, keys: Iterable[str]) -> dict[str, str | None]:
        """Where the images of some keys came from: the source that `embed` was given, None for added vectors."""
        rows = [self.row(key) for key in keys]
        found = self._snapshot.table["_source"].take(pa.array(np.asarray(rows, np.int64))).to_pylist()
        return {self.keys[row]: source for row, source in zip(rows, found, strict=True)}

    def vector(self, key: str) -> np.ndarray:
        """The vector of one item, float32."""
        return np.asarray(self.vectors[self.row(key)], np.float32)

    def row(self, key: str) -> int:
        """The row number of a key, or an error with the closest key."""
        if key not in self.rows_by_key:
            near = difflib.get_close_matches(key, self.keys, n=1, cutoff=0.6) if len(self) <= 20_000 else []
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ClipworksError(f"key must be one of the collection's {len(self)} keys. Got {key!r}.{hint}")
        return self.rows_by_key[key]

    def features(self) -> Features:
        """Vectors (still memory-mapped), keys, labels and captions together."""
        labels, texts = self.column("label"), self.column("caption")
        return Features(
            self.vectors,
            self.keys,
            np.array(labels, dtype=object) if any(x is not None for x in labels) else None,
            [t or "" for t in texts] if any(x is not None for x in texts) else None,
            self.fingerprint,
        )

    def where(self, condition: str | Mapping[str, Any]) -> np.ndarray:
        """Row numbers that meet a condition, ascending.

        Parameters
        ----------
        condition : SQL as LanceDB takes it, such as "label = 'cat' AND width > 640"; or a mapping of columns to
            the value, or the list of values, that they must have
        """
        condition = condition_of(condition, self.columns)
        if not self._compared:
            snapshot.check_table(self.path, self.version, snapshot.READ)
            self._compared = True
        table = open_table(self.path)
        with translated(self.path):
            table.checkout((1 << 64) - 1 - int(Path(self.version).stem))
        try:
            found = table.search().where(condition).select(["key"]).limit(None).to_arrow()["key"].to_pylist()
        except (ValueError, RuntimeError) as error:
            raise wrong_condition(condition, self.columns, error) from error
        if strange := [key for key in found if key not in self.rows_by_key]:
            raise damaged(self.path, {TABLE: f"has a row {strange[0]!r} that was never written"})
        return np.sort(np.array([self.rows_by_key[key] for key in found], dtype=np.int64))

    def tensor(self) -> torch.Tensor:
        """All vectors as float32 in memory."""
        import torch

        return torch.from_numpy(np.array(self.vectors, dtype=np.float32))


def new_meta(identity: dict[str, Any]) -> dict[str, Any]:
    """Metadata of a new collection."""
    from .. import __version__

    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"format": FORMAT, "clipworks": __version__, "created": made, "encoder": identity}


def condition_of(given: str | Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """A condition as SQL: as it is, or that of a mapping of known columns to the values that they must have."""
    if not isinstance(given, Mapping):
        return given
    for name in given:
        check_choice("where", name, columns)
    return " AND ".join(_equals(name, value) for name, value in given.items()) or "TRUE"


def wrong_condition(condition: str, columns: Mapping[str, str], error: Exception) -> ClipworksError:
    """The error for a condition that LanceDB does not take."""
    reason = f"Got {condition!r}: {str(error).splitlines()[0][:200]}"
    return ClipworksError(f"where must be a condition on the columns {', '.join(columns)}. {reason}")


def _equals(name: str, value: Any) -> str:
    column = f"`{name}`"
    if value is None:
        return f"{column} IS NULL"
    if isinstance(value, (list, tuple, set)):
        return f"{column} IN ({', '.join(literal(v) for v in value)})" if value else "FALSE"
    return f"{column} = {literal(value)}"


def _check_files(path: Path) -> None:
    """Refuse a collection whose recorded files are gone or have changed size; a writer's clean-up is waited for."""
    for wait in (0.0, 0.1, 0.3, 1.0):
        time.sleep(wait)
        journal = Journal.read(path)
        gone = {} if journal.cleaning else journal.missing()
        if not gone:
            return
    raise damaged(path, gone)


def _absent(path: Path) -> str:
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.5)
        return f"there is no collection at {str(path)!r}." + (f" Did you mean {near[0]!r}?" if near else "")
    return f"{str(path)!r} is no collection: make one with `clipworks embed SOURCE --out {path}`."


__all__ = ["INTERNAL", "OWN", "Collection"]
