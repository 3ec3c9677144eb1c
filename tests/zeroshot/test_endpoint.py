"""The endpoint against a real server in a process of its own: faults, pauses, cache, key, limits, counts."""

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from clipworks.errors import ClipworksError
from clipworks.zeroshot import endpoint as module
from clipworks.zeroshot.description_sources import described_by, told_apart_by
from clipworks.zeroshot.endpoint import Endpoint, NoAnswer, check_url

HELLO = [{"role": "user", "content": "What are useful features for distinguishing a hen in a photo?"}]


@pytest.fixture(scope="module")
def server():
    with subprocess.Popen([sys.executable, Path(__file__).with_name("chat_server.py")], stdout=subprocess.PIPE) as run:
        yield f"http://127.0.0.1:{int(run.stdout.readline())}/v1"
        run.terminate()


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """The pauses that were asked for, none of them made; no key of the person who runs the tests is sent."""
    monkeypatch.delenv("CLIPWORKS_API_KEY", raising=False)
    made = []
    monkeypatch.setattr(module.time, "sleep", made.append)
    return made


def asked(server, model):
    with urllib.request.urlopen(server.removesuffix("/v1") + "/log") as response:
        return [entry for entry in json.load(response) if entry["body"]["model"] == model]


def test_a_question_its_answer_and_what_it_took(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-1\n")
    model = Endpoint(server + "/", "good-1", key_variable="MY_KEY", price_in=5.0, price_out=100.0)
    assert described_by(model)("hen") == ["a red comb", "feathers of hen"]
    assert told_apart_by(model)("stork", "hen") == [("stork with long legs", "hen with short legs")]
    first, second = asked(server, "good-1")
    assert first["path"] == "/v1/chat/completions"
    assert first["key"] == "Bearer secret-1"
    assert (first["body"]["temperature"], first["body"]["max_tokens"]) == (0, 100)
    assert [m["role"] for m in first["body"]["messages"]] == ["user", "assistant"] * 2 + ["user"]
    assert "stork" in second["body"]["messages"][0]["content"]
    used = model.usage
    assert (used.asked, used.cached, used.repeated, used.tokens_in, used.tokens_out) == (2, 0, 0, 400, 20)
    assert used.cost == pytest.approx((400 * 5 + 20 * 100) / 1e6)
    assert "2 answers" in str(used)
    assert "cost 0.0040" in str(used)


def test_no_key_is_sent_where_none_is_set(server):
    Endpoint(server, "good-2")(HELLO)
    assert asked(server, "good-2")[0]["key"] is None


def test_a_busy_server_is_asked_again_after_growing_pauses(server, pauses):
    model = Endpoint(server, "busy", pause=0.5)
    assert "- a red comb" in model(HELLO)
    assert pauses == [0.5, 7.0, 2.0]  # ours, the one the server asks for, ours again
    assert model.usage.repeated == 3
    assert model.usage.asked == 1


def test_a_broken_server_is_given_up(server, pauses):
    model = Endpoint(server, "broken", retries=7, pause=4)
    with pytest.raises(NoAnswer, match=r"8 tries.*status 503: '<html> \[31mno backend</html>'") as error:
        model(HELLO)
    assert pauses == [4, 8, 16, 32, 60, 60, 60]
    assert str(error.value).isprintable()
    assert len(asked(server, "broken")) == 8
    with pytest.raises(NoAnswer, match="asked once"):
        Endpoint(server, "broken-2", retries=0)(HELLO)


def test_a_refusal_is_final_and_does_not_show_the_key(server, monkeypatch):
    monkeypatch.setenv("CLIPWORKS_API_KEY", "secret-2")
    with pytest.raises(ClipworksError, match=r"refused.*status 401: 'wrong key Bearer \*\*\*'") as error:
        Endpoint(server, "denied")(HELLO)
    assert not isinstance(error.value, NoAnswer)
    assert str(error.value).endswith("The key is read from CLIPWORKS_API_KEY, which is set.")
    assert len(asked(server, "denied")) == 1
    monkeypatch.delenv("CLIPWORKS_API_KEY")
    with pytest.raises(ClipworksError, match="CLIPWORKS_API_KEY, which is not set"):
        Endpoint(server, "denied")(HELLO)


def test_garbage_is_asked_for_again(server):
    model = Endpoint(server, "garbage", retries=5)
    assert model(HELLO) == "- well"
    assert model.usage.repeated == 5
    assert model.usage.tokens_in == 0  # no counts were given
    with pytest.raises(NoAnswer, match="not of the chat protocol: '<html>'"):
        Endpoint(server, "garbage-2", retries=0)(HELLO)


def test_size_and_time_are_limited(server):
    with pytest.raises(NoAnswer, match="longer than 1,048,576 bytes"):
        Endpoint(server, "huge", retries=1)(HELLO)
    started = time.monotonic()
    with pytest.raises(NoAnswer, match="longer than the timeout"):  # each byte comes in time, all together do not
        Endpoint(server, "drip", retries=0, timeout=0.4)(HELLO)
    with pytest.raises(NoAnswer, match="timed out"):
        Endpoint(server, "slow-2", retries=0, timeout=0.3)(HELLO)
    assert time.monotonic() - started < 3
    assert "- a red comb" in Endpoint(server, "slow", retries=1, timeout=1)(HELLO)


def test_no_connection_and_a_lost_one(server):
    with pytest.raises(NoAnswer, match="2 tries"):
        Endpoint(server, "hangup", retries=1)(HELLO)
    with pytest.raises(NoAnswer, match="refused"):
        Endpoint("http://127.0.0.1:9/v1", "any", retries=0)(HELLO)


def test_a_redirect_is_not_followed(server):
    with pytest.raises(ClipworksError, match="status 307"):
        Endpoint(server, "elsewhere")(HELLO)
    assert len(asked(server, "elsewhere")) == 1


def test_answers_are_kept_by_model_and_messages(server, tmp_path):
    first = Endpoint(server, "good-3", cache=tmp_path)
    text = first(HELLO)
    again = Endpoint(server, "good-3", cache=tmp_path)
    assert again(HELLO) == text
    assert (again.usage.asked, again.usage.cached) == (0, 1)
    assert len(asked(server, "good-3")) == 1
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["answer"] == text
    for other in (Endpoint(server, "good-4", cache=tmp_path), Endpoint(server, "good-3", cache=tmp_path, max_tokens=9)):
        other(HELLO)
        assert other.usage.asked == 1
    Endpoint(server, "good-3", cache=tmp_path)([{**HELLO[0], "content": HELLO[0]["content"] + " "}])
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"answer": 3}', "\udcff"])
def test_a_damaged_answer_is_asked_for_again(server, tmp_path, damage):
    name = f"good-damage{len(damage)}{damage[:1].encode('utf-8', 'replace').hex()}"
    text = Endpoint(server, name, cache=tmp_path)(HELLO)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage.encode("utf-8", "surrogateescape"))
    assert Endpoint(server, name, cache=tmp_path)(HELLO) == text
    assert len(asked(server, name)) == 2
    assert json.loads(file.read_text())["answer"] == text


def test_nothing_of_a_failure_is_kept(server, tmp_path):
    with pytest.raises(NoAnswer):
        Endpoint(server, "broken-3", retries=1, cache=tmp_path)(HELLO)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host/v1", "file:///etc", "http://", "http://h:port/v1", "http://h/v 1", "",
            "http://h/v1?key=1", "http://me:secret@h/v1"],
)  # fmt: skip
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ClipworksError, match="url must") as error:
        Endpoint(url, "m")
    assert "secret" not in str(error.value)


def test_settings_are_checked(server, monkeypatch):
    assert check_url("https://host/api/chat/completions") == "https://host/api"
    for settings in ({"timeout": 0}, {"retries": -1}, {"max_tokens": 0}, {"temperature": -1}, {"price_in": -1}):
        with pytest.raises(ClipworksError, match=next(iter(settings))):
            Endpoint(server, "m", **settings)
    with pytest.raises(ClipworksError, match="model must"):
        Endpoint(server, "")
    monkeypatch.setenv("CLIPWORKS_API_KEY", "a\nHost: evil")
    with pytest.raises(ClipworksError, match="plain characters"):
        Endpoint(server, "good")(HELLO)
