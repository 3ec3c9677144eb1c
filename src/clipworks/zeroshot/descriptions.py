"""Descriptions of classes from anywhere: a mapping, a JSON file, WordNet's glosses, or a function.

A source of descriptions is a mapping or a JSON file `{"hen": ["a red comb", ...], ...}`, or a function that is given a
name and returns its list. A source of differences between two classes is a function that is given two names and returns
pairs of sentences; `PairDescriptions` keeps them, `contrasts` derives them from plain descriptions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..atomic import write_json
from ..errors import ClipworksError, closest

Source = Mapping[str, Sequence[str]] | str | Path | Callable[[str], Sequence[str]]
PairSource = Callable[[str, str], Sequence[tuple[str, str]]]

VISIBLE = ("05", "06", "08", "13", "17", "18", "20")  # WordNet's files of animals, artifacts ... plants


def descriptions_of(names: Sequence[str], source: Source) -> list[list[str]]:
    """Return the descriptions of each class, without repetitions; an empty list where the source has none.

    Names are matched as they stand, else without regard to case and underscores.

    Raises
    ------
    ClipworksError
        If the source cannot be read, holds something else than lists of words, or knows none of the names.

    >>> descriptions_of(["Hen", "cock"], {"hen": ["a red comb", "feathers", "feathers"]})
    [['a red comb', 'feathers'], []]
    """
    if callable(source):
        return [_words(name, source(name)) for name in names]
    table = read_descriptions(source) if isinstance(source, str | Path) else source
    if not isinstance(table, Mapping):
        raise ClipworksError(f"descriptions must map names to lists. Got {type(table).__name__}.")
    folded = {_fold(name): name for name in reversed(list(table))}
    keys = [name if name in table else folded.get(_fold(name)) for name in names]
    if table and not any(key is not None for key in keys):
        raise ClipworksError(
            f"descriptions must describe at least one of the names. None of {list(names)[:5]!r} is among its "
            f"{len(table)}.{closest(names[0], table)}"
        )
    return [[] if key is None else _words(key, table[key]) for key in keys]


def read_descriptions(path: str | Path) -> dict[str, list[str]]:
    """Read a JSON file that maps class names to lists of descriptions."""
    table = _read_json("descriptions", path)
    if not isinstance(table, dict):
        raise ClipworksError(f"descriptions must be a JSON object. {str(path)!r} holds a {type(table).__name__}.")
    return {name: _words(name, items) for name, items in table.items()}


def parse_answer(text: str) -> list[str]:
    """Return the items of a language model's answer: its lines that begin with a dash.

    >>> parse_answer("Useful features are:\\n- a long tail\\n- sharp teeth ")
    ['a long tail', 'sharp teeth']
    """
    lines = (line.strip() for line in text.splitlines())
    return [item for line in lines if line.startswith("-") and (item := line.lstrip("-").strip())]


def describe(name: str, descriptor: str) -> str:
    """Return a phrase of a name and one of its features, joined as the feature's first word asks.

    >>> [describe("tiger", d) for d in ("a long tail", "often orange", "used to jungles", "sharp teeth")]
    ['tiger, which is a long tail', 'tiger, which often orange', 'tiger, which is used to jungles', \
'tiger, which has sharp teeth']
    """
    first = descriptor.split(maxsplit=1)[0].lower() if descriptor.strip() else ""
    if first in ("a", "an", "used"):
        joiner = "which is"
    elif first in ("has", "often", "typically", "may", "can"):
        joiner = "which"
    else:
        joiner = "which has"
    return f"{name}, {joiner} {descriptor}"


class WordNetGlosses:
    """What WordNet says of a noun: its gloss, cut at the semicolons, without the quoted examples.

    Parameters
    ----------
    path : WordNet's `data.noun`, of any version; where `index.noun` lies beside it, it tells which sense is commonest
    synsets : optional name -> offset ("n02099601" or "02099601") for names with several senses

    Kinds of things come before single ones that bear the name (crane the bird before Crane the writer), visible ones
    (animal, artifact, body, food, object, person, plant) before others.

    >>> WordNetGlosses("/usr/share/wordnet/data.noun")("golden retriever")  # doctest: +SKIP
    ['an English breed having a long silky golden coat']
    """

    def __init__(self, path: str | Path, synsets: Mapping[str, str] | None = None):
        path = Path(path)
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ClipworksError(f"path must be WordNet's data.noun. {str(path)!r}: {error.strerror}.") from None
        self._glosses: dict[str, str] = {}
        self._senses: dict[str, list[tuple[bool, bool, int, str]]] = {}
        self._order = _sense_order(path.with_name("index.noun"))
        for line in lines:
            head, bar, gloss = line.partition("|")
            fields = head.split()
            if not bar or not line[:8].isdigit() or len(fields) < 4:  # the licence stands above the data
                continue
            offset, kind = fields[0], fields[1]
            self._glosses[offset] = gloss.strip()
            for word, number in zip(*[iter(fields[4 : 4 + 2 * int(fields[3], 16)])] * 2, strict=True):
                sense = ("@i" in fields, kind not in VISIBLE, int(number, 16), offset)
                self._senses.setdefault(_fold(word), []).append(sense)
        if not self._glosses:
            raise ClipworksError(f"path must be WordNet's data.noun. {str(path)!r} holds no entry of that form.")
        self._chosen = {name: str(offset).lstrip("n") for name, offset in (synsets or {}).items()}
        for name, offset in self._chosen.items():
            if offset not in self._glosses:
                raise ClipworksError(f"synsets must be offsets of {str(path)!r}. Got {offset!r} for {name!r}.")

    def __call__(self, name: str) -> list[str]:
        word = _fold(name)
        if name in self._chosen:
            offset = self._chosen[name]
        elif word in self._senses:
            common = self._order.get(word, "").split()
            ranked = [(*s[:2], common.index(s[-1]) if s[-1] in common else 99, *s[2:]) for s in self._senses[word]]
            offset = min(ranked)[-1]
        else:
            return []
        parts = (part.strip() for part in self._glosses[offset].split(";"))
        return list(dict.fromkeys(part for part in parts if part and '"' not in part))


class PairDescriptions:
    """Sentences that tell two classes apart, kept under the pair, whichever is named first.

    Parameters
    ----------
    pairs : {(a, b): [(sentence for a, sentence for b), ...]}

    >>> told = PairDescriptions({("wren", "robin"): [("a wren, brown", "a robin, red")]})
    >>> told("robin", "wren")
    [('a robin, red', 'a wren, brown')]
    """

    def __init__(self, pairs: Mapping[tuple[str, str], Iterable[Sequence[str]]] | None = None):
        self._pairs: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for key, sentences in (pairs or {}).items():
            if not isinstance(key, tuple) or len(key) != 2 or key[0] == key[1]:
                raise ClipworksError(f"pairs must have two different names as keys. Got {key!r}.")
            for two in sentences:
                if isinstance(two, str) or len(two) != 2 or not all(isinstance(s, str) and s.strip() for s in two):
                    raise ClipworksError(f"pairs must hold one sentence for each of the two. Got {two!r} for {key!r}.")
                entry = self._pairs.setdefault((min(key), max(key)), [])
                entry.append((two[0], two[1]) if key[0] < key[1] else (two[1], two[0]))

    def __call__(self, a: str, b: str) -> list[tuple[str, str]]:
        found = self._pairs.get((min(a, b), max(a, b)), [])
        return list(found) if a < b else [(second, first) for first, second in found]

    def __len__(self) -> int:
        return len(self._pairs)

    def write(self, path: str | Path) -> None:
        """Write a JSON file: a list of {"names": [a, b], "sentences": [[for a, for b], ...]}."""
        write_json(Path(path), self.as_rows(), ensure_ascii=False)

    def as_rows(self) -> list[dict[str, list]]:
        """The content of the file, sorted by names."""
        return [{"names": list(key), "sentences": [list(s) for s in told]} for key, told in sorted(self._pairs.items())]

    @classmethod
    def read(cls, path: str | Path) -> PairDescriptions:
        """Read what `write` wrote."""
        rows = _read_json("pairs", path)
        try:
            return cls({tuple(row["names"]): row["sentences"] for row in rows})
        except (TypeError, KeyError):
            raise ClipworksError(
                f'pairs must be a list of {{"names": [a, b], "sentences": [[for a, for b], ...]}}. See {str(path)!r}.'
            ) from None


def contrasts(source: Source, template: str = "a photo of a {}.") -> PairSource:
    """Tell two classes apart by the descriptions that one has and the other lacks; none where nothing differs.

    >>> contrasts({"cock": ["feathers", "a red comb"], "duck": ["feathers", "webbed feet"]}, "{}")("cock", "duck")
    [('cock, which is a red comb', 'duck, which has webbed feet')]
    """
    table = read_descriptions(source) if isinstance(source, str | Path) else source

    def told(a: str, b: str) -> list[tuple[str, str]]:
        of_a, of_b = (descriptions_of([name], table)[0] for name in (a, b)) if callable(table) else _both(a, b, table)
        if not set(of_a) ^ set(of_b):
            return []
        sides = []
        for name, own, others in ((a, of_a, of_b), (b, of_b, of_a)):
            phrases = [describe(name, d) for d in own if d not in others]
            sides.append([template.replace("{}", phrase) for phrase in phrases or [name]])
        longest = max(map(len, sides))
        return [(sides[0][i % len(sides[0])], sides[1][i % len(sides[1])]) for i in range(longest)]

    return told


def _both(a: str, b: str, table: Any) -> list[list[str]]:
    known = {_fold(name) for name in table}
    return descriptions_of([a, b], table) if {_fold(a), _fold(b)} & known else [[], []]


def _fold(name: str) -> str:
    return name.replace("_", " ").strip().lower()


def _words(name: str, items: Any) -> list[str]:
    if isinstance(items, str) or not isinstance(items, Sequence) or not all(isinstance(i, str) for i in items):
        raise ClipworksError(f"descriptions must be a list of strings for every name. Got {items!r} for {name!r}.")
    return list(dict.fromkeys(i.strip() for i in items if i.strip()))


def _sense_order(path: Path) -> dict[str, str]:
    """word -> its line in WordNet's index, which ends with the offsets, commonest first; empty where there is none."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {_fold(word): rest for word, _, rest in (line.partition(" ") for line in lines) if word}


def _read_json(argument: str, path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ClipworksError(f"{argument} must be a JSON file. {str(path)!r}: {error.strerror}.") from None
    except ValueError as error:  # bad JSON, or bytes that are not UTF-8
        raise ClipworksError(f"{argument} must be a JSON file. {str(path)!r}: {error}.") from None
