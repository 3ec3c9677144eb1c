"""LaCLIP's rewriting: every caption said differently by a language model, once, before training.

Claim: training on captions and their rewrites, drawn at random, makes a better CLIP at the same cost (CC3M, ViT-B/16,
ImageNet zero-shot: 15.8 and 21.5; CC12M 40.2 and 48.4; LAION-400M 67.0 and 69.3).

Formula: prompt = instruction, three example pairs "source => target" drawn from one style, "caption =>"; the rewrite is
the first line that the model writes. One file of rewrites per style.

Paper: Fan et al. 2023, Improving CLIP Training with Language Rewrites (NeurIPS).
Differs from the paper: no model is shipped; `complete` is any function from prompts to completions (the paper samples
LLaMA-7B at temperature 0.9, top-p 0.95, at most 77 tokens). The example pairs are an argument as well.
Defaults: three examples per prompt from the released code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..errors import ClipworksError
from ..registry import method

INSTRUCTION = "rewrite image captions"
ARROW = "=>"


@method(card="laclip", level="M")
def rewrite_captions(
    captions: Sequence[str],
    examples: Sequence[tuple[str, str]],
    complete: Callable[[list[str]], Sequence[str]],
    *,
    shown: int = 3,
    longest: int | None = None,
    seed: int = 0,
) -> list[str]:
    """Have captions rewritten in one style.

    Parameters
    ----------
    captions : the originals
    examples : pairs (caption, the same differently worded) of the style; about 16 in the paper
    complete : from a list of prompts to what a language model writes after each
    shown : examples in every prompt, drawn anew for each caption (3)
    longest : characters after which a prompt is cut, with the arrow put back at its end; None never cuts
    seed : of the draws

    Returns
    -------
    list of rewrites in the order of the captions; an empty completion gives the caption itself

    Raises
    ------
    ClipworksError
        If there are too few examples, or not one completion per prompt.

    Inputs
    ------
    captions, a few example pairs, and any language model; no images

    Relations
    ---------
    `caption_pools` draws from what this makes; give every style its own examples and call once per style. Words about
    classes of a test set do not belong into the examples.

    References
    ----------
    Fan et al. 2023, Improving CLIP Training with Language Rewrites

    Examples
    --------
    >>> pairs = [("a dog", "a brown dog"), ("a cat", "one cat"), ("tree", "an old tree")]
    >>> rewrite_captions(["a red car"], pairs, lambda prompts: [" a car painted red\\nnext line"])
    ['a car painted red']
    """
    if not 1 <= shown <= len(examples):
        raise ClipworksError(f"shown must lie in [1, {len(examples)}] (the examples). Got {shown}.")
    rng = np.random.default_rng(seed)
    prompts = [rewrite_prompt(caption, examples, rng, shown, longest) for caption in captions]
    answers = list(complete(prompts))
    if len(answers) != len(prompts):
        raise ClipworksError(f"complete must return a text per prompt, {len(prompts)} in all. Got {len(answers)}.")
    return [first_line(answer) or caption for answer, caption in zip(answers, captions, strict=True)]


def rewrite_prompt(
    caption: str,
    examples: Sequence[tuple[str, str]],
    rng: np.random.Generator,
    shown: int = 3,
    longest: int | None = None,
) -> str:
    """Return the prompt of one caption: instruction, `shown` distinct examples, the caption with an open arrow."""
    chosen = rng.choice(len(examples), shown, replace=False)
    lines = [f"{one_line(examples[i][0])} {ARROW} {one_line(examples[i][1])}" for i in chosen]
    prompt = "\n".join([f"{INSTRUCTION}:", "", *lines, f"{one_line(caption)} {ARROW}"])
    if longest is not None and len(prompt) > longest:
        prompt = f"{prompt[: longest - len(ARROW) - 1].rstrip()} {ARROW}"
    return prompt


def first_line(completion: str) -> str:
    """Return the right-hand side of the first line that has something in it.

    >>> first_line(" a dog => a dog at play\\n a cat => one cat")
    'a dog at play'
    """
    line = next((line for line in completion.splitlines() if line.strip()), "")
    return line.rpartition(ARROW)[2].strip()


def one_line(text: str) -> str:
    """Return a text without line ends."""
    return " ".join(text.split())
