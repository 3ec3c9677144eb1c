"""Questions and answers of language models, a local model built on the spot, files that grow, and the command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clipworks.cli.main import main
from clipworks.errors import ClipworksError
from clipworks.zeroshot.description_sources import (
    EXAMPLES,
    LocalModel,
    described_by,
    parse_pairs,
    question,
    told_apart_by,
    write_descriptions,
    write_pairs,
)
from clipworks.zeroshot.descriptions import PairDescriptions, descriptions_of, parse_answer, read_descriptions
from clipworks.zeroshot.endpoint import NoAnswer


def test_the_question_shows_two_examples_in_the_form_that_is_read():
    said = question("snow {} leopard")
    assert said[-1]["content"] == "What are useful features for distinguishing a snow {} leopard in a photo?"
    assert [parse_answer(m["content"]) for m in said if m["role"] == "assistant"] == list(EXAMPLES.values())


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("Features:\n- a long tail\n-  **Fur**: grey \n- sharp\tteeth.", ["a long tail", "Fur: grey", "sharp teeth"]),
        ("* one\n• two\n3. three\n4) four\n- five", ["one", "two", "three", "four", "five"]),
        ("It has a long tail.", []),
        ("", []),
        ("- same\n- same\n- \x1b[31mred\n- .", ["same", "[31mred"]),
        ("- " + "x" * 1000, ["x" * 300]),
        ("\n".join(f"- item {i}" for i in range(80)), [f"item {i}" for i in range(50)]),
    ],
)
def test_answers_become_short_clean_lists(answer, found):
    assert described_by(lambda messages: answer)("cat") == found


def test_a_source_of_a_model_is_a_source_of_descriptions():
    said = {"hen": "- a comb", "cock": "no list"}

    def model(messages):
        return said[messages[-1]["content"].removesuffix(" in a photo?").split()[-1]]

    assert descriptions_of(["hen", "cock"], described_by(model)) == [["a comb"], []]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ('[{"attribute": "x", "first": "a one.", "second": "b one"}]', [("a one", "b one")]),
        ('Here:\n```json\n[{"first": "a", "second": "b"}, {"first": "a", "second": "b"}]\n```', [("a", "b")]),
        ('[{"first": "a"}, {"first": "a", "second": ""}, {"first": 1, "second": "b"}, {"first": "c", "second": "d"}]',
         [("c", "d")]),
        ('{"first": "a", "second": "b"}', []),
        ("[not json]", []),
        ("][", []),
        ("[" * 50_000 + "]" * 50_000, []),
        ("", []),
    ],
)  # fmt: skip
def test_pairs_are_read_from_json_and_what_is_not_of_the_form_is_passed_over(answer, found):
    assert parse_pairs(answer) == found


def test_a_pair_is_asked_for_by_both_names():
    seen = []
    told_apart_by(lambda messages: seen.append(messages) or "[]")("wren", "lark {x}")
    ((message,),) = seen
    assert message["role"] == "user"
    assert "a wren" in message["content"]
    assert "a lark {x}" in message["content"]
    assert '{"attribute":' in message["content"]


@pytest.fixture(scope="module")
def tiny():
    """A random language model of 2 layers over a few words, and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [
        "<unk>",
        "<end>",
        "What",
        "are",
        "a",
        "in",
        "photo",
        "?",
        "Question",
        ":",
        "Answer",
        "-",
        "red",
        "comb",
        "hen",
    ]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>")
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=None, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    torch.set_rng_state(state)
    return model, made


def greedy(model, ids, steps):
    """The likeliest token again and again, without a cache."""
    ids = torch.tensor([ids])
    for _ in range(steps):
        with torch.no_grad():
            following = model(ids).logits[0, -1].argmax()
        if following == 1:
            break
        ids = torch.cat([ids, following.reshape(1, 1)], 1)
    return ids[0].tolist()


def test_a_local_model_says_the_likeliest_words(tiny):
    model, tokenizer = tiny
    said = "Question: a zebra\nAnswer:\n- red\nQuestion: a hen\nAnswer:\n"
    ids = tokenizer(said)["input_ids"]
    expected = tokenizer.decode(greedy(model, ids, 12)[len(ids) :], skip_special_tokens=True)
    messages = [{"role": "user", "content": "a zebra"}, {"role": "assistant", "content": "- red"},
                {"role": "user", "content": "a hen"}]  # fmt: skip
    ask = LocalModel(model, tokenizer, max_tokens=12)
    assert ask(messages) == expected
    assert expected
    assert ask(messages) == ask(messages)


def test_a_chat_template_is_used_where_there_is_one(tiny):
    model, tokenizer = tiny
    import copy

    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}hen"
    ids = tokenizer("red comb hen")["input_ids"]
    expected = tokenizer.decode(greedy(model, ids, 5)[len(ids) :], skip_special_tokens=True)
    assert LocalModel(model, chat, max_tokens=5)([{"role": "user", "content": "red comb"}]) == expected


def test_a_local_model_is_read_from_a_folder_and_its_limits_are_named(tiny, tmp_path):
    model, tokenizer = tiny
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    read, given = LocalModel(tmp_path, max_tokens=6), LocalModel(model, tokenizer, max_tokens=6)
    assert read(question("hen")) == given(question("hen"))
    with pytest.raises(ClipworksError, match=r"takes 256 tokens.*Got 250"):
        LocalModel(model, tokenizer, max_tokens=250)(question("hen"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ClipworksError, match="causal language model"):
        LocalModel(tmp_path / "empty")
    with pytest.raises(ClipworksError, match="tokenizer must"):
        LocalModel(model)


def test_the_file_keeps_what_it_has_and_a_stopped_run_goes_on(tmp_path):
    out, seen = tmp_path / "new" / "d.json", []

    def source(name):
        seen.append(name)
        if name == "stop" and seen.count("stop") == 1:
            raise KeyboardInterrupt
        return [f"{name}'s look"]

    with pytest.raises(KeyboardInterrupt):
        write_descriptions(["a", "stop", "b"], source, out)
    assert read_descriptions(out) == {"a": ["a's look"]}
    assert write_descriptions(["a", "stop", "b"], source, out) == {}
    assert seen == ["a", "stop", "stop", "b"]
    write_descriptions(["c"], {"c": ["from a table"]}, out)
    assert read_descriptions(out) == {
        "a": ["a's look"], "stop": ["stop's look"], "b": ["b's look"], "c": ["from a table"]}  # fmt: skip
    write_descriptions(["a"], {"a": ["new"]}, out, overwrite=True)
    assert read_descriptions(out)["a"] == ["new"]
    with pytest.raises(ClipworksError, match="distinct"):
        write_descriptions(["a", "a"], source, out)


def test_single_failures_are_told_and_three_in_a_row_end_the_run(tmp_path):
    seen = []

    def source(name):
        seen.append(name)
        if name.isupper():
            raise NoAnswer(f"no {name}")
        return []

    failures = write_descriptions(["A", "b", "C", "D", "e", "F", "G", "H", "i"], source, tmp_path / "d.json")
    assert failures == {n: f"no {n}" for n in "ACDFGH"}
    assert seen == ["A", "b", "C", "D", "e", "F", "G", "H"]
    assert read_descriptions(tmp_path / "d.json") == {"b": [], "e": []}


def test_a_refusal_is_passed_on_and_leaves_no_empty_file(tmp_path):
    def source(name):
        if name == "b":
            raise ClipworksError("wrong key")
        return [name]

    for names, kept in ((["b", "c"], None), (["a", "b"], {"a": ["a"]})):
        with pytest.raises(ClipworksError, match="wrong key"):
            write_descriptions(names, source, tmp_path / "d.json")
        assert (read_descriptions(tmp_path / "d.json") if (tmp_path / "d.json").exists() else None) == kept


def test_a_long_run_is_saved_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr("clipworks.zeroshot.description_sources.SAVED_EVERY", 0.0)
    out, states = tmp_path / "d.json", []
    write_descriptions(
        list("abc"), lambda name: states.append(sorted(read_descriptions(out)) if out.exists() else []) or [], out
    )
    assert states == [[], ["a"], ["a", "b"]]


def test_pairs_grow_in_their_file_as_well(tmp_path):
    out, seen = tmp_path / "p.json", []

    def source(a, b):
        seen.append((a, b))
        return [(f"{a} not {b}", f"{b} not {a}")] if a != "a" else []

    PairDescriptions({("x", "y"): [("1", "2")]}).write(out)
    write_pairs(["c", "a", "b"], source, out)
    assert seen == [("a", "b"), ("a", "c"), ("b", "c")]
    told = PairDescriptions.read(out)
    assert told("y", "x") == [("2", "1")]
    assert told("c", "b") == [("c not b", "b not c")]
    write_pairs(["c", "b"], source, out)
    assert len(seen) == 3
    write_pairs(["c", "b"], source, out, overwrite=True)
    assert len(seen) == 4
    with pytest.raises(ClipworksError, match="at least two"):
        write_pairs(["c"], source, out)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("CLIPWORKS_API_KEY", raising=False)
    with subprocess.Popen([sys.executable, Path(__file__).with_name("chat_server.py")], stdout=subprocess.PIPE) as run:
        yield f"http://127.0.0.1:{int(run.stdout.readline())}/v1"
        run.terminate()


def test_the_command_asks_an_endpoint_once_and_says_what_it_took(server, tmp_path, capsys):
    out = tmp_path / "d.json"
    line = ["describe", "--names", "hen,stork", "--source", "endpoint", "--url", server, "--model", "good",
            "--price-in", "10", "--out", str(out)]  # fmt: skip
    assert main(line) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{out}\n"
    assert "2 answers, 0 more from the cache" in shown.err
    assert "cost 0.0040" in shown.err
    assert read_descriptions(out)["stork"] == ["a red comb", "feathers of stork"]
    assert main([*line, "--overwrite"]) == 0
    assert "0 answers, 2 more from the cache" in capsys.readouterr().err
    pairs = [word if word != str(out) else str(tmp_path / "p.json") for word in line]
    assert main([*pairs, "--pairs"]) == 0
    assert PairDescriptions.read(tmp_path / "p.json")("hen", "stork") == [
        ("hen with long legs", "stork with short legs")
    ]


def test_the_command_leaves_out_what_fails_and_goes_on_later(server, tmp_path, capsys):
    out = tmp_path / "d.json"
    line = ["describe", "--names", "hen,duck,stork", "--source", "endpoint", "--url", server, "--retries", "0", "--out",
            str(out)]  # fmt: skip
    assert main([*line, "--model", "half"]) == 1
    assert "left out: duck: " in capsys.readouterr().err
    assert list(read_descriptions(out)) == ["hen", "stork"]
    assert main([*line, "--model", "good"]) == 0
    assert set(read_descriptions(out)) == {"hen", "stork", "duck"}


def test_the_command_with_wordnet_and_with_a_local_model(tiny, tmp_path, capsys):
    (tmp_path / "data.noun").write_text("02 05 n 01 hen 0 000 | adult female chicken\n".replace("02 ", "01514859 ", 1))
    out = tmp_path / "d.json"
    base = ["describe", "--names", "hen", "--out", str(out)]
    assert main([*base, "--source", "wordnet", "--wordnet", str(tmp_path / "data.noun")]) == 0
    assert json.loads(out.read_text()) == {"hen": ["adult female chicken"]}
    model, tokenizer = tiny
    model.save_pretrained(tmp_path / "m"), tokenizer.save_pretrained(tmp_path / "m")
    local = [*base, "--source", "transformers", "--model", str(tmp_path / "m"), "--max-tokens", "5", "--overwrite"]
    assert main(local) == 0
    assert json.loads(out.read_text()) == {"hen": described_by(LocalModel(model, tokenizer, max_tokens=5))("hen")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source", "endpoint", "--model", "m"], "needs --url"),
        (["--source", "endpoint", "--url", "http://localhost:1/v1"], "needs --model"),
        (["--source", "endpoint", "--url", "localhost", "--model", "m"], "url must"),
        (["--source", "wordnet"], "needs --wordnet"),
        (["--source", "wordnet", "--wordnet", "w", "--url", "http://h/v1"], "--url is no option"),
        (["--source", "transformers", "--model", "m", "--retries", "3"], "--retries is no option"),
        (["--source", "endpoint", "--url", "http://h/v1", "--model", "m", "--device", "cpu"], "--device is no option"),
        (["--source", "wordnet", "--wordnet", "w", "--pairs"], "needs a language model"),
        (["--source", "gpt"], "gpt"),
        (["--source", "wordnt"], "one of 'endpoint', 'transformers', 'wordnet'. Did you mean 'wordnet'?"),
        (["--source", "wordnet", "--wordnet", "nowhere"], "--wordnet: path must be WordNet's data.noun. 'nowhere': No"),
        (["--source", "endpoint", "--url", "http://h/v1", "--model", "m", "--names", ","], "names must hold at least"),
    ],
)
def test_the_command_names_what_is_missing_or_too_much(words, message, tmp_path, capsys):
    assert main(["describe", "--names", "hen", "--out", str(tmp_path / "d.json"), *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pairs", [[], ["--pairs"]])
def test_a_file_to_go_on_with_that_holds_something_else_is_left_as_it_is(pairs, tmp_path, capsys):
    out = tmp_path / "d.json"
    out.write_text("{broken")
    line = ["describe", "--names", "hen,duck", "--out", str(out), "--source", "endpoint", "--url", "http://h/v1"]
    assert main([*line, "--model", "m", *pairs]) == 2
    assert "clipworks: out: " in capsys.readouterr().err
    assert out.read_text() == "{broken"


def test_transformers_is_not_imported_before_it_is_used():
    code = "import sys, clipworks.zeroshot.description_sources; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
