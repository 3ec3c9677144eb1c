"""Requests of every wrong form: each is answered with what it deserves, and the server is as ready afterwards.

Bodies and pictures are mutants of good ones; heads, ids and tokens are drawn; some clients go away or send slowly.
"""

import asyncio
import base64
import io
import json
import random

import numpy as np
import pytest
from fuzzing import bounded_memory, edited_json, edits, run
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("fastapi", reason="the extra 'serve' is not there")
from starlette.testclient import TestClient

from clipworks.encoders.tokenizers.bpe import CLIPTokenizer
from clipworks.encoders.toy import toy_encoder
from clipworks.server.app import create_app
from clipworks.server.shelf import item_id
from clipworks.store.collection import Collection
from clipworks.types import Features

JSON = {"content-type": "application/json"}
REFUSED = {400, 404, 413, 422}
TOKEN = "a-token-of-some-letters"


def file(form, size=(20, 16)):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)).save(out, form)
    return out.getvalue()


def coded(data):
    return base64.b64encode(data).decode()


FILES = {form: file(form) for form in ("PNG", "JPEG", "GIF", "WEBP", "BMP")}
ONE, TWO = item_id("0"), item_id("1")
BODIES = {
    "/search": {"text": "a cat", "minus": ["a dog"], "image": coded(FILES["PNG"]), "like": ONE, "vector": [1.0] * 8,
                "where": [{"column": "label", "operator": "is", "value": "x"}], "columns": ["label"], "k": 3,
                "offset": 0},
    "/embed": {"texts": ["a", "b"], "images": [coded(FILES["JPEG"])]},
    "/classify": {"names": ["a", "b"], "images": [], "ids": [ONE], "templates": ["a {}"], "none": False},
    "/compare": {"a": [ONE], "b": [TWO]},
    "/login": {"token": TOKEN},
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "c"
    vectors = np.eye(8, dtype=np.float32)
    features = Features(vectors, [str(i) for i in range(8)], np.array(list("xyxyxyxy")))
    Collection.create(folder, encoder=toy_encoder(tokenizer=CLIPTokenizer()), features=features)
    return folder


def application(place, **options):
    return create_app(place, encoder=toy_encoder(tokenizer=CLIPTokenizer()), **options)


@pytest.fixture(scope="module")
def client(place):
    guard = application(place)
    with TestClient(guard, base_url="http://127.0.0.1", raise_server_exceptions=False) as made:
        made.guard = guard
        assert made.post("/search", json=BODIES["/search"]).status_code == 200
        yield made


@pytest.fixture(autouse=True)
def still_well(request):
    """After every test the server is ready, answers, and holds nothing of what was sent."""
    yield
    if "client" in request.fixturenames:
        client = request.getfixturevalue("client")
        assert client.get("/readyz").json()["status"] == "ready"
        assert client.post("/search", json={"text": "stripes", "k": 2}).status_code == 200
        assert held(client.guard) == (0, 0, 0)


def held(guard):
    """Bytes of bodies, requests that wait, requests in work."""
    return guard.buffered, guard.service.batcher.waiting, sum(guard.service._inside.values())


def judged(answer, allowed):
    """A good answer, or a refusal in the form that was promised."""
    assert answer.status_code in allowed, (answer.status_code, answer.text[:300])
    if answer.status_code >= 400:
        assert list(answer.json()) == ["error"]
        assert len(answer.content) < 2000
    return answer.status_code


# -- bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [30, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", list(BODIES))
def test_fields_of_another_kind(client, path, count):
    allowed, seen = REFUSED | {200, 401}, set()

    def work(given):
        body = json.dumps(given).encode()
        seen.add(judged(client.post(path, content=body, headers=JSON), allowed))

    run(edited_json(BODIES[path]), work, count, seconds=5.0)
    assert 422 in seen
    # what is mutated is good before, but that there is no token to log in with
    assert path == "/login" or client.post(path, json=BODIES[path]).status_code == 200


@pytest.mark.parametrize("count", [30, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", ["/search", "/classify"])
def test_bytes_of_bodies(client, path, count):
    seen = set()

    def work(body):
        seen.add(judged(client.post(path, content=body, headers=JSON), REFUSED | {200}))

    run(edits(json.dumps(BODIES[path]).encode()), work, count, seconds=5.0)
    assert {400, 422} <= seen


@pytest.mark.parametrize("body", [
    b"[" * 3_000_000, b'{"a":' * 1_000_000, b'{"text":' * 1000 + b"1" + b"}" * 1000, b"1" * 5_000_000,
    b'{"k": ' + b"9" * 5000 + b"}", b'{"k": 1e999999999}', b'{"k": -0.0}', b'{"vector": [' + b"1," * 500_000 + b"1]}",
    b'{"vector": [NaN]}', b'{"vector": [-Infinity]}', b'{"vector": [1e400, 1, 1, 1, 1, 1, 1, 1]}',
    b'{"text": "' + b"\\u0000" * 100 + b'"}', b'{"text": "\\ud83d"}', b'{"text": "a", "text": 5}',
    b'{"where": [' + b'{"column": "label"},' * 100_000 + b"{}]}", b"\0" * 1000,
    b'{"columns": [' + b'"label",' * 300_000 + b'"label"]}', b'{"text": "x"}' * 1000,
], ids=range(18))  # fmt: skip
def test_bombs_of_json(client, body):
    """Deep, long, or of numbers that nothing can hold."""
    with bounded_memory():
        assert judged(client.post("/search", content=body, headers=JSON), REFUSED) >= 400


@pytest.mark.parametrize("kind", [
    "multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "x" * 5000,
    "multipart/mixed; boundary=a", "application/x-www-form-urlencoded", "application/json+x", "application/jsonx",
    "text/json", "application", ";", "", "application/json/../x",
])  # fmt: skip
@pytest.mark.parametrize("body", [b"--a\r\nContent-Disposition: form-data; name=\r\n\r\n", b"--\r\n" * 5000, b"a=b&"])
def test_forms_are_not_read(client, kind, body):
    assert judged(client.post("/search", content=body, headers={"content-type": kind}), {415}) == 415


# -- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [15, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", list(FILES))
def test_damaged_pictures(client, form, count):
    seen = set()

    def work(data):
        seen.add(judged(client.post("/embed", json={"images": [coded(data)]}), {200, 400, 413}))

    run(edits(FILES[form], keep=4), work, count, seconds=5.0)
    assert 400 in seen
    assert form not in ("BMP", "GIF") or 200 in seen  # without checksums some damage is another picture


def test_pictures_cut_at_every_tenth(client):
    for form, data in FILES.items():
        for tenth in range(10):
            body = {"images": [coded(data[: len(data) * tenth // 10])]}
            status = judged(client.post("/embed", json=body), {200, 400})
            assert (form, tenth, status) == (form, tenth, 400) or tenth > 5


def test_bombs_of_pictures(client):
    """Refused from the header: the largest would take 800 MB."""
    bombs = []
    for size in ((13_000, 13_000), (60_000, 60_000)):
        data = bytearray(FILES["PNG"])
        data[16:24] = np.array(size, ">u4").tobytes()
        data[29:33] = np.array(_crc(bytes(data[12:29])), ">u4").tobytes()
        bombs.append(bytes(data))
    jpeg = bytearray(FILES["JPEG"])
    place = jpeg.index(b"\xff\xc0")
    jpeg[place + 5 : place + 9] = b"\xff\xdc\xff\xdc"
    out = io.BytesIO()
    Image.new("1", (5000, 4100)).save(out, "PNG", optimize=True)  # real ones, just above the limit
    with bounded_memory(64 << 20):
        for bomb in (*bombs, bytes(jpeg), out.getvalue()):
            for path, body in (("/embed", {"images": [coded(bomb)] * 8}), ("/search", {"image": coded(bomb)}),
                               ("/segment", {"names": ["a"], "image": coded(bomb)})):  # fmt: skip
                assert "pixels" in client.post(path, json=body).text
                assert judged(client.post(path, json=body), {400}) == 400


def _crc(data):
    import zlib

    return zlib.crc32(data)


# -- heads -----------------------------------------------------------------------------------------------------------

texts = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=40)
WORDS = ["..", "%2e%2e", "%2f", "etc/passwd", "\\", "%00", ONE, "0" * 16, "?", "#", "//", "%c0%ae", "é", "\u202e"]


@pytest.mark.parametrize("count", [60, pytest.param(5000, marks=pytest.mark.slow)])
def test_paths(client, count):
    from urllib.parse import quote

    seen = set()

    def work(parts):
        path = "/images/" + quote("".join(parts), safe="%/?#.\\")
        answer = client.get(path)
        assert answer.status_code in (404, 422) or answer.url.path in ("/", "/docs"), path
        assert "root:" not in answer.text
        seen.add(answer.status_code)

    run(st.lists(st.sampled_from(WORDS) | texts, max_size=6), work, count, seconds=5.0)
    assert 404 in seen


@pytest.mark.parametrize("count", [60, pytest.param(5000, marks=pytest.mark.slow)])
def test_hosts_and_origins(client, count):
    local = st.sampled_from(["localhost", "127.0.0.1", "[::1]", "evil.example", "localhost.", ":80", "@", "..", "["])
    hosts = st.lists(local, max_size=4).map("".join) | texts.map(lambda t: t.encode("utf-8").decode("latin-1"))
    seen = set()

    def work(given):
        headers = {name: value.encode("latin-1") for name, value in given.items()}
        status = client.get("/collection", headers=headers).status_code
        assert status in (200, 403, 421)
        seen.add(status)
        if status == 200:
            name = given["host"].rsplit(":", 1)[0] if not given["host"].endswith("]") else given["host"]
            assert name.strip("[]").rstrip(".").lower() in ("localhost", "127.0.0.1", "::1")

    run(st.fixed_dictionaries({"host": hosts}, optional={"origin": hosts}), work, count, seconds=5.0)
    assert seen == {200, 403, 421}


@pytest.mark.parametrize("count", [60, pytest.param(5000, marks=pytest.mark.slow)])
def test_tokens(place, count):
    """Nothing but the token lets in, whatever stands around it."""
    guard = application(place, token=TOKEN)
    client = TestClient(guard, base_url="http://127.0.0.1", raise_server_exceptions=False)
    seen = set()
    shown = edits(TOKEN.encode(), 2).map(lambda t: bytes(b for b in t if b >= 32 and b != 127))
    near = shown.filter(lambda t: t.strip() != TOKEN.encode())
    heads = st.tuples(st.sampled_from([b"Bearer ", b"bearer", b"Basic ", b"", b"Bearer  Bearer "]),
                      near | st.just(b"") | st.just(guard.cookie().encode()))  # fmt: skip

    def work(given):
        value = b"".join(given)
        for name in ("authorization", "cookie"):
            answer = client.get("/collection", headers={name: value if name != "cookie" else b"clipworks=" + value})
            right = name == "cookie" and value == guard.cookie().encode()
            assert answer.status_code == (200 if right else 401)
            seen.add(answer.status_code)

    run(heads, work, count, seconds=5.0)
    assert seen == {200, 401}
    assert client.get("/collection", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert guard.buffered == 0


# -- clients that go away, and slow ones -----------------------------------------------------------------------------


async def asked(guard, path, body, pause=0.0, cut=10_000, gone=None):
    """The status of one request, sent in parts; `gone` is the event after which the client has left."""
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
             "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")], "scheme": "http",
             "http_version": "1.1", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1)}  # fmt: skip
    parts, status = [body[i : i + cut] for i in range(0, len(body), cut)], []

    async def receive():
        if gone is not None and gone.is_set():
            return {"type": "http.disconnect"}
        await asyncio.sleep(pause)
        if not parts:
            await asyncio.sleep(3600)
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message):
        if message["type"] == "http.response.start":
            status.append(message["status"])

    await guard(scope, receive, send)
    return status[0] if status else None


def test_requests_that_are_given_up(place):
    """Half of 200 clients leave at any moment, also while their request waits or is in work."""
    guard, draw = application(place), random.Random(0)

    async def one(number):
        body = {"text": f"words {number}", "k": 3, "image": coded(FILES["PNG"])}
        task = asyncio.create_task(asked(guard, "/search", json.dumps(body).encode(), draw.choice([0, 0, 0.01]), 200))
        await asyncio.sleep(draw.random() * 0.3)
        if draw.random() < 0.5:
            task.cancel()
        return (await asyncio.gather(task, return_exceptions=True))[0]

    async def all_of_them():
        await asked(guard, "/search", json.dumps({"text": "first"}).encode())
        found = await asyncio.gather(*(one(number) for number in range(200)))
        last = await asked(guard, "/search", json.dumps({"text": "last"}).encode())
        return found, last

    found, last = asyncio.run(all_of_them())
    assert last == 200
    given_up = sum(isinstance(status, asyncio.CancelledError) for status in found)
    assert 20 < given_up < 180
    assert 200 in (kept := {status for status in found if not isinstance(status, asyncio.CancelledError)})
    assert kept <= {200, 429}
    assert held(guard) == (0, 0, 0)
    guard.service.stop()


def test_slow_bodies_stop_nobody(place):
    """Fifty bodies that never end are given up in time; requests beside them are answered."""
    guard = application(place, patience=3.0)

    async def both():
        await asked(guard, "/search", json.dumps({"text": "first"}).encode())
        slow = [asyncio.create_task(asked(guard, "/search", b" " * 50_000, 0.2, 10)) for _ in range(50)]
        gone = asyncio.Event()
        left = asyncio.create_task(asked(guard, "/search", b" " * 50_000, 0.2, 10, gone))
        await asyncio.sleep(0.3)
        gone.set()
        quick = [await asked(guard, "/search", json.dumps({"text": str(i)}).encode()) for i in range(5)]
        return quick, await left, set(await asyncio.gather(*slow))

    assert asyncio.run(both()) == ([200] * 5, 400, {408})
    assert held(guard) == (0, 0, 0)
    guard.service.stop()
