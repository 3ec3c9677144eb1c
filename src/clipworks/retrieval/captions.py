"""Captions taken apart into entities and what joins them, by their small words; regions of entities by their names.

A stand-in for a language model or a parser: a caption is cut at the words that usually stand between two things ("on",
"next to", "with", verbs in -ing, "is"), and what is left are the things. It is wrong where a sentence is long; any
function that returns `Parts` can take its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

JOINS = """
about above across after against along among and around at atop before behind below beneath beside between beyond by
down for from in inside into near next of off on onto out outside over past through to toward towards under underneath
until up upon with within without while that which who as is are was were be been being has have had do does
"""
ARTICLES = "a an the some this these those his her its their our my your there it he she they"
NOUNS_IN_ING = """
building ceiling clothing wing ring king string thing morning evening wedding railing swing living dining parking
painting frosting icing topping bedding
"""
_JOINS, _ARTICLES, _NOUNS_IN_ING = (frozenset(words.split()) for words in (JOINS, ARTICLES, NOUNS_IN_ING))


@dataclass
class Parts:
    """What a caption names.

    Attributes
    ----------
    entities : words of each thing
    predicates : (words, place of the subject, place of the object) among the entities
    """

    entities: list[str]
    predicates: list[tuple[str, int, int]]


def parse_caption(caption: str) -> Parts:
    """Cut a caption at its small words.

    >>> parse_caption("A man riding a brown horse on the beach.")
    Parts(entities=['man', 'brown horse', 'beach'], predicates=[('riding', 0, 1), ('on', 1, 2)])
    """
    entities: list[list[str]] = [[]]
    joins: list[list[str]] = [[]]  # joins[i] stands before entities[i]
    for word in re.findall(r"[\w'-]+|[,;.]", caption.lower()):
        if word in _ARTICLES:
            if entities[-1]:  # "a man the dog": a new thing without a join
                entities.append([])
                joins.append([])
        elif word in _JOINS or word in ",;." or (word.endswith("ing") and word not in _NOUNS_IN_ING):
            if entities[-1]:
                entities.append([])
                joins.append([])
            if word not in ",;.":
                joins[-1].append(word)
        else:
            entities[-1].append(word)
    kept = [i for i, words in enumerate(entities) if words]
    place = {i: n for n, i in enumerate(kept)}
    names = [" ".join(entities[i]) for i in kept]
    found = [(" ".join(joins[i]), place[i] - 1, place[i]) for i in kept if joins[i] and place[i]]
    return Parts(names, found)


def named_boxes(
    boxes: Callable[[Any], Sequence[tuple[str, Any]]], synonyms: Mapping[str, Sequence[str]] | None = None
) -> Callable[[Any, str], list[Any]]:
    """Regions from boxes with names: an entity's are those whose name, or a synonym of it, is among its words.

    Parameters
    ----------
    boxes : function of an image that returns (name, box) of what is in it
    synonyms : name -> other words for it
    """

    def regions(image: Any, entity: str) -> list[Any]:
        told = {singular(word) for word in entity.lower().split()}
        found = []
        for name, box in boxes(image):
            known = [name, *(synonyms or {}).get(name, ())]
            if any({singular(word) for word in other.lower().split()} <= told for other in known):
                found.append(box)
        return found

    return regions


def singular(word: str) -> str:
    """A word without the ending of the plural, roughly.

    >>> [singular(w) for w in ("dogs", "benches", "knives", "glass", "people", "men")]
    ['dog', 'bench', 'knife', 'glass', 'person', 'man']
    """
    irregular = {"people": "person", "men": "man", "women": "woman", "children": "child", "knives": "knife",
                 "sheep": "sheep", "mice": "mouse", "geese": "goose", "feet": "foot", "teeth": "tooth"}  # fmt: skip
    if word in irregular:
        return irregular[word]
    if word.endswith(("ches", "shes", "sses", "xes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) else word
