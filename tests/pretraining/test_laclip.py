"""Rewriting: what a prompt holds, what of a completion survives, in which order."""

import numpy as np
import pytest

from clipworks.errors import ClipworksError
from clipworks.pretraining.laclip import INSTRUCTION, first_line, rewrite_captions, rewrite_prompt

PAIRS = [(f"source {i}", f"target {i}") for i in range(16)]


def test_a_prompt_holds_three_examples_and_the_query():
    prompt = rewrite_prompt("a red car", PAIRS, np.random.default_rng(0))
    head, blank, *lines = prompt.split("\n")
    assert head.startswith(INSTRUCTION)
    assert blank == ""
    assert len(lines) == 4
    assert lines[-1] == "a red car =>"
    assert len(set(lines[:3])) == 3
    for line in lines[:3]:
        source, target = line.split(" => ")
        assert (source, target) in PAIRS


def test_prompts_are_a_function_of_the_seed():
    seen = []

    def complete(prompts):
        seen.append(prompts)
        return ["x"] * len(prompts)

    for seed in (0, 0, 1):
        rewrite_captions(["one", "two"], PAIRS, complete, seed=seed)
    assert seen[0] == seen[1] != seen[2]
    assert seen[0][0].split("\n")[2:5] != seen[0][1].split("\n")[2:5]  # drawn anew for every caption


def test_a_long_prompt_is_cut_and_the_arrow_put_back():
    prompt = rewrite_prompt("word " * 100, PAIRS, np.random.default_rng(0), longest=120)
    assert len(prompt) <= 120
    assert prompt.endswith(" =>")
    assert prompt.count("word") > 2


@pytest.mark.parametrize(
    ("completion", "rewrite"),
    [(" a dog plays\nsource => target\n", "a dog plays"), ("\n\n a dog\r\nmore", "a dog"), ("a => b", "b"), ("", ""),
     (" \n ", "")],
)  # fmt: skip
def test_only_the_first_line_survives(completion, rewrite):
    assert first_line(completion) == rewrite


def test_order_and_fall_back():
    answers = {"one": " first\nrest", "two": "", "three": "  third "}
    complete = lambda prompts: [answers[p.rsplit("\n", 1)[1].removesuffix(" =>")] for p in prompts]  # noqa: E731
    assert rewrite_captions(["three", "two", "one"], PAIRS, complete) == ["third", "two", "first"]


def test_line_ends_in_captions_do_not_break_the_prompt():
    assert rewrite_prompt("a\nred\n car", PAIRS, np.random.default_rng(0)).endswith("\na red car =>")


def test_faults():
    with pytest.raises(ClipworksError, match=r"shown must lie in \[1, 2\]"):
        rewrite_captions(["a"], PAIRS[:2], list)
    with pytest.raises(ClipworksError, match=r"2 in all. Got 1"):
        rewrite_captions(["a", "b"], PAIRS, lambda prompts: ["x"])
