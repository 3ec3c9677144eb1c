"""Enriching: both texts are in the result, refusals give the alt-text, orders hold."""

import pytest

from clipworks.errors import ClipworksError
from clipworks.pretraining.veclip import enrich_captions, fusion_prompt, refused

NOUNS = {"car", "road", "dog", "beach", "tower", "sky"}
ALTS = ["Toyota Supra 1998 for sale", "IMG_2231 Rex", "Eiffel Tower, Paris.", "", "the red car"]
SEEN = ["a red car on a road", "a dog on a beach", "a tower under a blue sky", "a dog", "a photo of the red car"]


def test_the_rule_keeps_names_and_visible_things():
    for alt, seen, joined in zip(ALTS, SEEN, enrich_captions(ALTS, SEEN), strict=True):
        words = set(joined.replace(",", " ").replace(".", " ").split())
        capitals = {w.strip(".,") for w in alt.split() if w[0].isupper()}
        assert capitals <= words
        assert {w for w in seen.split() if w in NOUNS} <= {w.lower() for w in words}


def test_the_rule_does_not_say_things_twice():
    assert enrich_captions(["the red car"], ["a photo of the red car"]) == ["a photo of the red car"]
    assert enrich_captions(["A red car on a road in Rome"], ["a red car on a road"]) == ["A red car on a road in Rome"]
    assert enrich_captions(["Rex"], [""]) == ["Rex"]


def test_things_are_mentioned_more_often():
    mentioned = lambda texts: sum(w.lower().strip(".,") in NOUNS for t in texts for w in t.split())  # noqa: E731
    assert mentioned(enrich_captions(ALTS, SEEN)) > mentioned(ALTS)


@pytest.mark.parametrize(
    "answer", ["I cannot help with that.", "I'm sorry, but", "Sorry, no.", "As an AI language model", " ", "",
               "I am unable to", "Unable to comply", "I apologize"],
)  # fmt: skip
def test_refusals(answer):
    assert refused(answer)
    assert enrich_captions(["Rex"], ["a dog"], lambda prompts: [answer]) == ["Rex"]


@pytest.mark.parametrize("answer", ["A sorry sight", "Iris in bloom", "An icon of AI", "I (2020), a film poster"])
def test_captions_that_are_no_refusals(answer):
    assert enrich_captions(["Rex"], ["a dog"], lambda prompts: [answer]) == [answer]


def test_only_described_images_are_asked_about_and_order_holds():
    asked = []

    def fuse(prompts):
        asked.extend(prompts)
        return [f"answer\n{i}" for i in range(len(prompts))]

    assert enrich_captions(["A", "B", "C"], ["x", " ", "y"], fuse) == ["answer 0", "B", "answer 1"]
    assert len(asked) == 2
    assert "First: A\nSecond: x\n" in asked[0]
    assert fusion_prompt("a\nb", "c").count("\n") == 3


def test_faults():
    with pytest.raises(ClipworksError, match=r"one per alt-text, 2. Got 1"):
        enrich_captions(["a", "b"], ["c"])
    with pytest.raises(ClipworksError, match=r"1 in all. Got 0"):
        enrich_captions(["a"], ["c"], lambda prompts: [])
