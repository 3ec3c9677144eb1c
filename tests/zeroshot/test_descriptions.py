"""Sources of descriptions: mappings, JSON files, WordNet's file, answers of language models, differences of pairs."""

import json

import pytest

from clipworks.errors import ClipworksError
from clipworks.zeroshot.descriptions import (
    PairDescriptions,
    WordNetGlosses,
    contrasts,
    describe,
    descriptions_of,
    parse_answer,
    read_descriptions,
)

NOUNS = """  1 This software and database is being provided to you, the LICENSEE, by
02012849 05 n 01 crane 0 002 @ 02000954 n 0000 ~ 02013177 n 0000 | large long-necked wading bird of marshes
02099601 05 n 01 golden_retriever 0 001 @ 02099267 n 0000 | an English breed; silky golden coat; "a golden sat by me"
03126707 06 n 02 crane 0 derrick 1 001 @ 03664675 n 0000 | lifts and moves heavy objects; a boom that rotates
09888888 04 n 01 hoisting 0 001 @ 03664675 n 0000 | the act of raising something
10914447 18 n 02 Crane 0 Stephen_Crane 0 001 @i 10794014 n 0000 | United States writer (1871-1900)
"""
INDEX = """  1 This software
crane n 3 2 @ ~ 3 0 10914447 03126707 02012849
golden_retriever n 1 1 @ 1 0 02099601
"""


@pytest.fixture
def nouns(tmp_path):
    (tmp_path / "data.noun").write_text(NOUNS)
    return tmp_path / "data.noun"


@pytest.mark.parametrize(
    ("descriptor", "sentence"),
    [
        ("a long tail", "cat, which is a long tail"),
        ("an arched back", "cat, which is an arched back"),
        ("used for baking", "cat, which is used for baking"),
        ("has sharp teeth", "cat, which has sharp teeth"),
        ("often green", "cat, which often green"),
        ("typically small", "cat, which typically small"),
        ("may purr", "cat, which may purr"),
        ("can climb", "cat, which can climb"),
        ("sharp teeth", "cat, which has sharp teeth"),
        ("anchors", "cat, which has anchors"),  # the first word decides, not its first letters
        ("candles", "cat, which has candles"),
    ],
)
def test_the_joiner_follows_the_first_word(descriptor, sentence):
    assert describe("cat", descriptor) == sentence


def test_answers_are_read_line_by_line():
    answer = "There are several useful features:\n- a long tail\n  - sharp teeth  \n-whiskers\n\n-\n"
    assert parse_answer(answer) == ["a long tail", "sharp teeth", "whiskers"]
    assert parse_answer("It has a long tail, and sharp teeth.") == []


def test_a_file_a_mapping_and_a_function_say_the_same(tmp_path):
    told = {"golden retriever": ["a golden coat", "a golden coat ", "floppy ears", " "], "Hen": ["a comb"]}
    (tmp_path / "d.json").write_text(json.dumps(told))
    names = ["Golden_Retriever", "hen", "unheard of"]
    expected = [["a golden coat", "floppy ears"], ["a comb"], []]
    lower = {k.lower(): v for k, v in told.items()}
    for source in (told, tmp_path / "d.json", str(tmp_path / "d.json"),
                   lambda name: lower.get(name.lower().replace("_", " "), [])):  # fmt: skip
        assert descriptions_of(names, source) == expected
    assert descriptions_of(["a", "b"], {}) == [[], []]
    # where names differ in case alone, each keeps its own
    assert descriptions_of(["Turkey", "turkey"], {"turkey": ["feathers"], "Turkey": ["a map"]}) == [
        ["a map"], ["feathers"]]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"cow": ["horns"]}, "at least one of the names"),
        ({"cat": "whiskers"}, "list of strings.*'cat'"),
        ({"cat": [3]}, "list of strings"),
        (["whiskers"], "must map names to lists"),
        ("no/such.json", "No such file"),
        (lambda name: "whiskers", "list of strings"),
    ],
)
def test_what_is_no_description_is_refused(source, message):
    with pytest.raises(ClipworksError, match=message):
        descriptions_of(["cat"], source)


def test_a_broken_file_is_named(tmp_path):
    for text, message in (("{", r"d\.json"), ("[1]", "JSON object"), ('{"a": 1}', "for 'a'")):
        (tmp_path / "d.json").write_text(text)
        with pytest.raises(ClipworksError, match=message):
            read_descriptions(tmp_path / "d.json")


def test_wordnet_glosses(nouns):
    wordnet = WordNetGlosses(nouns)
    assert wordnet("golden retriever") == ["an English breed", "silky golden coat"]
    assert wordnet("Golden_retriever") == wordnet("golden retriever")
    assert wordnet("derrick") == ["lifts and moves heavy objects", "a boom that rotates"]
    assert wordnet("stephen crane") == ["United States writer (1871-1900)"]  # a single person, if nothing else has it
    assert wordnet("hoisting") == ["the act of raising something"]
    assert wordnet("unheard of") == []
    assert wordnet("crane") == ["large long-necked wading bird of marshes"]  # equal ranks: the first in the file
    (nouns.parent / "index.noun").write_text(INDEX)
    assert WordNetGlosses(nouns)("crane") == wordnet("derrick")  # the commonest sense, the writer left aside
    for offset in ("02012849", "n02012849"):
        assert WordNetGlosses(nouns, {"crane": offset})("crane") == wordnet("crane")


def test_what_is_no_wordnet_is_refused(nouns, tmp_path):
    with pytest.raises(ClipworksError, match=r"offsets.*'99'.*'crane'"):
        WordNetGlosses(nouns, {"crane": "n99"})
    (tmp_path / "empty").write_text("nothing\n")
    with pytest.raises(ClipworksError, match="no entry"):
        WordNetGlosses(tmp_path / "empty")
    with pytest.raises(ClipworksError, match="No such file"):
        WordNetGlosses(tmp_path / "none")


def test_pairs_are_found_from_both_sides_and_survive_the_disk(tmp_path):
    pairs = PairDescriptions({("b", "a"): [("b1", "a1")], ("a", "b"): [("a2", "b2")], ("c", "a"): [("c1", "a3")]})
    assert pairs("a", "b") == [("a1", "b1"), ("a2", "b2")]
    assert pairs("b", "a") == [("b1", "a1"), ("b2", "a2")]
    assert pairs("b", "c") == []
    assert len(pairs) == 2
    pairs.write(tmp_path / "p.json")
    again = PairDescriptions.read(tmp_path / "p.json")
    assert all(again(x, y) == pairs(x, y) for x in "abc" for y in "abc" if x != y)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({("a", "a"): []}, "two different names"),
        ({"ab": []}, "two different names"),
        ({("a", "b"): ["xy"]}, "one sentence for each"),
        ({("a", "b"): [("x",)]}, "one sentence for each"),
        ({("a", "b"): [("x", "")]}, "one sentence for each"),
    ],
)
def test_pairs_that_say_nothing_are_refused(pairs, message, tmp_path):
    with pytest.raises(ClipworksError, match=message):
        PairDescriptions(pairs)
    (tmp_path / "p.json").write_text('{"a": 1}')
    with pytest.raises(ClipworksError, match="pairs must be a list of"):
        PairDescriptions.read(tmp_path / "p.json")


@pytest.mark.parametrize("as_function", [False, True])
def test_contrasts_keep_what_differs(as_function):
    table = {"cock": ["feathers", "a comb", "spurs"], "duck": ["feathers", "webbed feet"], "goose": ["feathers"],
             "hen": ["feathers"]}  # fmt: skip
    told = contrasts((lambda name: table.get(name, [])) if as_function else table, "{}")
    assert told("cock", "duck") == [
        ("cock, which is a comb", "duck, which has webbed feet"),
        ("cock, which has spurs", "duck, which has webbed feet"),
    ]
    assert told("duck", "cock") == [(b, a) for a, b in told("cock", "duck")]
    assert told("goose", "duck") == [("goose", "duck, which has webbed feet")]  # nothing of its own: the name
    assert told("goose", "hen") == []
    assert told("crow", "raven") == []
