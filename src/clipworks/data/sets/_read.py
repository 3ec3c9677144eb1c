"""What the readers of sets share: finding folders, CoOp's split files, lists of image names, MATLAB's tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import ClipworksError
from ..folder import IMAGE_SUFFIXES
from ..item import Item
from ..labelled import LabelledSet, Row, file_item, in_words, part_of
from ..tables import Resolver
from . import Absent


def find(folder: Path, *names: str) -> Path:
    """The first of these paths (patterns) that is below the folder; `Absent` if none is."""
    for name in names:
        found = folder if name == "." else next(iter(sorted(folder.glob(name))), None)
        if found is not None and found.exists():
            return found
    raise Absent(f"there is no {' or '.join(names)}")


def found(folder: Path, *names: str) -> Path | None:
    """As `find`, or None."""
    try:
        return find(folder, *names)
    except Absent:
        return None


def coop(name: str, folder: Path, images: Path, templates: str = "default") -> LabelledSet | None:
    """The set by CoOp's split file `split_zhou_*.json`, where the folder has it."""
    path = found(folder, "split_zhou_*.json")
    return None if path is None else read_coop(name, path, images, templates)


def read_coop(name: str, path: Path, images: Path, templates: str = "default") -> LabelledSet:
    """Read a split file of CoOp: for "train", "val" and "test", rows of path (below `images`), number and name."""
    try:
        split: Any = json.loads(path.read_text(encoding="utf-8"))
        triples = [(str(p), int(c), str(n), part) for part in split for p, c, n in split[part]]
    except (ValueError, TypeError, RecursionError) as error:
        raise ClipworksError(f"data {name}: {path} must hold lists of [path, class number, class name] under "
                             f"'train', 'val' and 'test'. Got {error}.") from error  # fmt: skip
    words: dict[int, str] = {}
    for _, number, word, _ in triples:
        words.setdefault(number, in_words(word))
    classes = dict(zip(sorted(words), distinct([words[n] for n in sorted(words)]), strict=True))
    items = listed(images, (t[0] for t in triples))
    rows = [Row(item, classes[t[1]], part_of(t[3])) for item, t in zip(items, triples, strict=True)]
    return LabelledSet.of(name, rows, list(classes.values()), templates)


def listed(images: Path, paths: Iterable[str]) -> list[Item]:
    """Items of the paths of a list, below `images`; `Absent` names the first that is not there."""
    resolve = Resolver(images, allow_outside=False)
    items = [resolve.item(path, path) for path in paths]
    missing = [item for item in items if item.error or not Path(item.image).is_file()]  # type: ignore[arg-type]
    if missing:
        first = missing[0]
        raise Absent(f"{len(missing)} of {len(items)} images of the list are not in {images}, such as {first.key!r}"
                     + (f" ({first.error})" if first.error else ""))  # fmt: skip
    return items


def class_folders(root: Path, skip: Sequence[str] = ()) -> Iterator[tuple[str, Path]]:
    """Every image below a folder per class, with the folder's name; sorted."""
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if folder.name not in skip:
            for path in sorted(folder.rglob("*")):
                if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
                    yield folder.name, path


def per_class(
    name: str, root: Path, words: Mapping[str, str] | Callable[[str], str] = in_words, *, base: Path | None = None,
    skip: Sequence[str] = (), templates: str = "default",
) -> LabelledSet:  # fmt: skip
    """A folder per class, not split; `words` turns a folder's name into the class's."""
    word = words if callable(words) else lambda folder: words.get(folder, in_words(folder))
    rows = [Row(file_item(base or root, path), word(folder)) for folder, path in class_folders(root, skip)]
    if not rows:
        raise Absent(f"there are no folders with images in {root}")
    return LabelledSet.of(name, rows, templates=templates)


def lines(path: Path) -> list[str]:
    """Lines of a text file that hold something."""
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def matlab(path: Path) -> dict[str, Any]:
    """A MATLAB file's variables, as data."""
    from scipy.io import loadmat

    try:
        return loadmat(str(path), squeeze_me=True)
    except Exception as error:  # scipy raises half a dozen types for a damaged file
        raise ClipworksError(f"{path} is not a readable MATLAB file: {error}") from error


def distinct(names: Sequence[str]) -> list[str]:
    """Names of which the second, third ... of the same are numbered: ImageNet has two cranes.

    >>> distinct(["crane", "hen", "crane"])
    ['crane', 'hen', 'crane (2)']
    """
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return out
