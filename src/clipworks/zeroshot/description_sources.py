"""Descriptions from language models: the questions, how answers are read, a local model, files that grow name by name.

A model is anything that is called with chat messages and returns text: `endpoint.Endpoint`, `LocalModel`, a function.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..atomic import write_json
from ..errors import ClipworksError, check_range, naming, need
from ..progress import Progress
from .classifier import check_names
from .descriptions import PairDescriptions, PairSource, Source, descriptions_of, parse_answer, read_descriptions
from .endpoint import Messages, NoAnswer

Model = Callable[[Messages], str]
T = TypeVar("T")

QUESTION = "What are useful features for distinguishing a {} in a photo?"
EXAMPLES = {
    "zebra": ["black and white stripes", "a short upright mane", "a tail with a tuft", "four slim legs with hooves",
              "a dark muzzle"],
    "kettle": ["a rounded body of metal or plastic", "a spout", "a handle on the side or above", "a lid with a knob",
               "a cord or a base"],
}  # fmt: skip
DIFFERENCE = (
    "Which visible attributes tell a photo of a {a} from a photo of a {b}? Answer with a JSON list alone. Each entry "
    'is one attribute: {{"attribute": its kind, "first": a sentence about the {a}, "second": one about the {b}}}, '
    'the sentences of the form "a photo of a {a}, with ..." and "a photo of a {b}, with ...".'
)
LONGEST, MOST = 300, 50  # characters of a description and descriptions of a class that are kept
SAVED_EVERY = 1.0  # seconds between two states of the file
GIVES_UP = 3  # failures in a row after which the model is taken to be gone


def question(name: str) -> list[dict[str, str]]:
    """Return the messages that ask for a class's features: two worked examples, then the name.

    >>> [message["role"] for message in question("hen")]
    ['user', 'assistant', 'user', 'assistant', 'user']
    """
    said = []
    for example, features in EXAMPLES.items():
        said.append({"role": "user", "content": QUESTION.replace("{}", example)})
        said.append({"role": "assistant", "content": "\n".join(f"- {feature}" for feature in features)})
    return [*said, {"role": "user", "content": QUESTION.replace("{}", name)}]


def described_by(model: Model) -> Callable[[str], list[str]]:
    """Return a source of descriptions that asks a model.

    >>> described_by(lambda messages: "- a red comb\\n* wings\\n1. a beak")("hen")
    ['a red comb', 'wings', 'a beak']
    """

    def source(name: str) -> list[str]:
        answer = re.sub(r"^\s*(?:[*•]|\d+[.)])\s+", "- ", model(question(name)), flags=re.M)  # other marks of a list
        items = (_plain(item) for item in parse_answer(answer))
        return list(dict.fromkeys(item for item in items if item))[:MOST]

    return source


def told_apart_by(model: Model) -> PairSource:
    """Return a source of differences that asks a model; a pair whose answer cannot be read has none.

    >>> answer = '[{"attribute": "bill", "first": "a photo of a wren, thin bill", "second": "a photo of a lark"}]'
    >>> told_apart_by(lambda messages: answer)("wren", "lark")
    [('a photo of a wren, thin bill', 'a photo of a lark')]
    """

    def source(a: str, b: str) -> list[tuple[str, str]]:
        return parse_pairs(model([{"role": "user", "content": DIFFERENCE.format(a=a, b=b)}]))

    return source


def parse_pairs(answer: str) -> list[tuple[str, str]]:
    """Return the sentences for the first and the second class of a model's JSON answer; what is not of the form is
    passed over."""
    start, end = answer.find("["), answer.rfind("]")
    try:
        entries = json.loads(answer[start : end + 1]) if 0 <= start < end else []
    except (ValueError, RecursionError):
        return []
    found = []
    for entry in entries:
        sides = [entry.get(side) for side in ("first", "second")] if isinstance(entry, dict) else []
        two = [_plain(side) for side in sides if isinstance(side, str)]
        if len(two) == 2 and all(two):
            found.append((two[0], two[1]))
    return list(dict.fromkeys(found))[:MOST]


class LocalModel:
    """A causal language model of the transformers library on this machine; call it with messages to get its answer.

    Parameters
    ----------
    model : folder or name of a model on the Hugging Face hub (which is fetched if it is not there), or the loaded model
    tokenizer : the loaded tokenizer, where the model is loaded
    max_tokens : longest answer, in tokens
    device : "cpu", "cuda" ...

    The likeliest token is taken each time. A tokenizer without a chat template gets the messages as questions and
    answers in plain text. No code from the model's repository is run.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, max_tokens: int = 100, device: str = "cpu"):
        self.max_tokens = int(check_range("max_tokens", max_tokens, 1))
        if isinstance(model, str | Path):
            library = need("transformers", "teachers")
            try:
                tokenizer = tokenizer or library.AutoTokenizer.from_pretrained(model)
                model = library.AutoModelForCausalLM.from_pretrained(model)
            except (OSError, ValueError) as error:
                reason = str(error).strip().split("\n")[0]
                raise ClipworksError(f"model must be a causal language model. Got {str(model)!r}: {reason}") from None
        if tokenizer is None:
            raise ClipworksError("tokenizer must be given with a loaded model. Got None.")
        self.model, self.tokenizer = model.eval().to(device), tokenizer

    def __call__(self, messages: Messages) -> str:
        import torch

        ids = self._ids(messages)
        room = getattr(self.model.config, "max_position_embeddings", None)
        if room is not None and ids.shape[1] + self.max_tokens > room:
            raise ClipworksError(
                f"max_tokens must leave room for the question: the model takes {room} tokens, the question has "
                f"{ids.shape[1]}. Got {self.max_tokens}."
            )
        fill = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        with torch.inference_mode():
            found = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.max_tokens,
                                        do_sample=False, pad_token_id=fill)  # fmt: skip
        answer = self.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
        return answer.split("\nQuestion:")[0]  # a plain model may go on with a question of its own

    def _ids(self, messages: Messages) -> Any:
        if getattr(self.tokenizer, "chat_template", None):
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            made = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)  # the template has its own
        else:
            marks = {"user": "Question: ", "assistant": "Answer:\n"}
            said = "\n".join(marks.get(m["role"], "") + m["content"] for m in messages)
            made = self.tokenizer(said + "\nAnswer:\n", return_tensors="pt")
        return made["input_ids"].to(self.model.device)


def write_descriptions(
    names: Sequence[str], source: Source, out: str | Path, *, overwrite: bool = False, progress: bool | None = None
) -> dict[str, str]:
    """Write the descriptions of names to a JSON file; what it holds already is kept, so a stopped run goes on.

    Parameters
    ----------
    names : distinct class names
    source : a mapping, a JSON file, or a function of a name such as `described_by(model)`
    out : file {"name": [descriptions]}, for `classify_by_description`; names in it beside those given stay
    overwrite : ask again for names that the file holds
    progress : True or False for the bar; None shows it on a terminal

    Returns
    -------
    name -> why it has no entry, for names that the model gave no answer for; three in a row end the run
    """
    path = Path(out)
    with naming("out"):
        table = read_descriptions(path) if path.exists() else {}
    ask = source if callable(source) else lambda name: descriptions_of([name], source)[0]

    def take(name: str) -> None:
        table[name] = list(ask(name))

    open_names = [n for n in check_names(names) if overwrite or n not in table]
    return _each(open_names, take, lambda: write_json(path, table, ensure_ascii=False), progress)


def write_pairs(
    names: Sequence[str], source: PairSource, out: str | Path, *, overwrite: bool = False, progress: bool | None = None
) -> dict[tuple[str, str], str]:
    """Write the differences of all pairs of names to a JSON file, for `fudd`; parameters as in `write_descriptions`."""
    path = Path(out)
    with naming("out"):
        rows = PairDescriptions.read(path).as_rows() if path.exists() else []
    table = {(row["names"][0], row["names"][1]): row["sentences"] for row in rows}

    def take(two: tuple[str, str]) -> None:
        if told := list(source(*two)):
            table[two] = [list(sentences) for sentences in told]

    if len(check_names(names)) < 2:
        raise ClipworksError(f"names must be at least two to be told apart. Got {names[0]!r} alone.")
    pairs = itertools.combinations(sorted(names), 2)
    open_pairs = [two for two in pairs if overwrite or two not in table]
    return _each(open_pairs, take, lambda: PairDescriptions(table).write(path), progress)


def _each(items: list[T], take: Callable[[T], None], save: Callable[[], Any], progress: bool | None) -> dict[T, str]:
    """Take item by item, saving now and then and at the end, however it comes; returns the failures."""
    failures: dict[T, str] = {}
    running, unsaved, saved = 0, False, time.monotonic()
    try:
        for item in Progress(items, len(items), "asking", enabled=progress):
            try:
                take(item)
                running, unsaved = 0, True
            except NoAnswer as error:
                failures[item] = str(error)
                running += 1
                if running == GIVES_UP:
                    break
            if unsaved and time.monotonic() - saved > SAVED_EVERY:
                save()
                unsaved, saved = False, time.monotonic()
    finally:
        if unsaved:
            save()
    return failures


def _plain(text: str) -> str:
    """One line of printable characters without bold marks, the full stop at its end, and what is too long."""
    text = "".join(c if c.isprintable() else " " for c in text.replace("**", ""))
    return " ".join(text.split())[:LONGEST].rstrip(" .")
