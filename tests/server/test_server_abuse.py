"""What a stranger may send: every limit answers with a 4xx at once, and the next good request is served."""

import json
import os
import time

import pytest
from small_server import coded, picture

from clipworks.errors import ClipworksError
from clipworks.server.metrics import descriptors, resident
from clipworks.server.run import is_local, read_token, serve
from clipworks.server.schemas import DEEPEST, K
from clipworks.server.shelf import item_id

JSON = {"content-type": "application/json"}


def well(client):
    """A good request is answered."""
    assert client.post("/search", json={"text": "stripes", "k": 2}).status_code == 200


@pytest.mark.parametrize(("path", "body", "status", "says"), [
    ("/search", {"text": "a" * 2049}, 422, "text"),
    ("/search", {"text": "é" * 1025}, 422, "2048 bytes"),
    ("/search", {"text": "   "}, 422, "empty"),
    ("/search", {"text": "a\0b"}, 422, "zero byte"),
    ("/search", {"text": "x", "k": 0}, 422, "k"),
    ("/search", {"text": "x", "k": K + 1}, 422, "k"),
    ("/search", {"text": "x", "k": 10**9}, 422, "k"),
    ("/search", {"text": "x", "k": 1000, "offset": DEEPEST}, 400, "offset"),
    ("/search", {"text": "x", "offset": -1}, 422, "offset"),
    ("/search", {"text": "x", "minus": ["y"] * 9}, 422, "minus"),
    ("/search", {"text": "x", "what": 1}, 422, "what"),
    ("/search", {"vector": [0.0] * 8}, 400, "length zero"),
    ("/search", {"vector": [1.0] * 7}, 400, "8 numbers"),
    ("/search", {"vector": [1e308] * 8}, 422, "vector"),
    ("/search", {"vector": [1.0] * 9000}, 422, "vector"),
    ("/search", {"text": "x", "minus": ["x", "x"]}, 400, "cancel"),
    ("/search", {"like": "0" * 16}, 404, "no image"),
    ("/search", {"like": "../../etc/passwd"}, 422, "like"),
    ("/search", {"text": "x", "columns": ["vector"]}, 400, "columns"),
    ("/search", {"text": "x", "columns": ["_source"]}, 400, "columns"),
    ("/search", {"where": [{"column": "_source", "value": "x"}]}, 400, "column"),
    ("/search", {"where": [{"column": "1=1 OR label", "value": "x"}]}, 400, "column"),
    ("/search", {"where": [{"column": "label", "operator": "= '' OR", "value": "x"}]}, 400, "operator"),
    ("/search", {"where": [{"column": "label", "operator": "in", "value": []}]}, 400, "list"),
    ("/search", {"where": [{"column": "mtime", "operator": "above", "value": "x'; DROP"}]}, 400, "conditions"),
    ("/search", {"image": "https://example.org/a.jpg"}, 422, "nothing is fetched"),
    ("/search", {"image": "file:///etc/passwd"}, 422, "nothing is fetched"),
    ("/search", {"image": "not base64!"}, 400, "base64"),
    ("/search", {"image": "aGVsbG8="}, 400, "not a known image"),
    ("/embed", {}, 400, "texts or images"),
    ("/embed", {"texts": ["a"] * 10_000}, 422, "texts"),
    ("/embed", {"images": ["aGVsbG8="] * 17}, 422, "images"),
    ("/embed", {"texts": [1]}, 422, "texts"),
    ("/classify", {"names": []}, 422, "names"),
    ("/classify", {"names": ["a", "a"], "ids": []}, 400, "images or ids"),
    ("/classify", {"names": ["a"] * 201, "images": []}, 422, "names"),
    ("/classify", {"names": ["none of these", "a"], "ids": ["0" * 16]}, 400, "none of these"),
    ("/segment", {"names": ["a"] * 33}, 422, "names"),
    ("/segment", {"names": ["a", "b"]}, 400, "image and id"),
    ("/inspect", {"normal": ["0" * 16] * 33}, 422, "normal"),
    ("/compare", {"a": []}, 422, "a"),
    ("/compare", {"a": ["0" * 16]}, 404, "no image"),
])  # fmt: skip
def test_limits_of_fields(client, path, body, status, says):
    start = time.monotonic()
    answer = client.post(path, json=body)
    assert (answer.status_code, list(answer.json())) == (status, ["error"]), answer.text
    assert says in answer.json()["error"]
    assert len(answer.content) < 1000  # what was sent is not sent back
    assert time.monotonic() - start < 5
    well(client)


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe{}", b'{"text": "\\ud800"}', b'{"text": "\xc3\x28"}',
    b'{"vector": [NaN, Infinity, 1, 1, 1, 1, 1, 1]}', b'{"k": 1e999}', b"[" * 200_000, b'{"a":' * 100_000,
    b'{"text": "x", "k": 99999999999999999999999999999999999999999999}',
])  # fmt: skip
def test_bodies_that_are_no_request(client, body):
    answer = client.post("/search", content=body, headers=JSON)
    assert answer.status_code in (400, 422), answer.text[:200]
    assert "error" in answer.json()
    well(client)


def test_a_body_has_a_limit(client):
    large = b'{"text": "' + b"a" * (11 * 2**20) + b'"}'
    assert client.post("/search", content=large, headers=JSON).status_code == 413
    assert client.post("/search", content=(b"a" * 2**20 for _ in range(12)), headers=JSON).status_code == 413
    well(client)


def test_only_json_is_read(client):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert client.post("/search", content=b'{"text": "x"}', headers={"content-type": kind}).status_code == 415
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS"):
        assert client.request(method, "/search").status_code == 405


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "192.168.1.5", "[::ffff:8.8.8.8]",
                                  "a b", "user@localhost", "localhost:port", "",
                                  "127.0.0.1.evil.example", "[::1", "evil.example[::1]",
                                  "[::1]evil.example"])  # fmt: skip
def test_other_names_are_not_answered(client, host):
    answer = client.get("/collection", headers={"host": host})
    assert answer.status_code == 421
    assert "fingerprint" not in answer.text


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]:8000", "LOCALHOST"])
def test_the_own_names_are_answered(client, host):
    assert client.get("/healthz", headers={"host": host}).status_code == 200


def test_pages_of_other_sites_are_not_answered(client):
    for headers in ({"origin": "https://evil.example"}, {"origin": "null"}, {"origin": "http://127.0.0.1:99"},
                    {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}):  # fmt: skip
        answer = client.post("/search", json={"text": "x"}, headers=headers)
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
    assert client.post("/search", json={"text": "x"}, headers={"origin": "http://127.0.0.1"}).status_code == 200


def test_every_answer_has_its_headers(client):
    for path in ("/", "/healthz", "/nothing", "/images/x", "/docs"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert "'unsafe" not in headers["content-security-policy"]
        assert "server" not in headers


@pytest.mark.parametrize("path", [
    "/images/..%2f..%2fetc%2fpasswd", "/images/%2e%2e/%2e%2e/etc/passwd", "/images/..\\..\\etc\\passwd",
    "/images/%00", "/images/%c0%ae%c0%ae%c0%afetc", "/images//etc/passwd", "/images/even/00.png", "/..%2fapp.py",
    "/web/../app.py", "/images/0000000000000000/..", "/images/" + "f" * 5000,
])  # fmt: skip
def test_no_path_leads_to_a_file(client, path):
    answer = client.get(path)
    assert answer.status_code == 404
    assert "root:" not in answer.text
    assert "create_app" not in answer.text


def test_a_link_out_of_the_folder_and_a_file_that_changed_have_no_picture(place, client, tmp_path):
    secret = tmp_path / "secret.png"
    picture(99).save(secret)
    target = place / "photos" / "odd" / "39.png"
    address = f"/images/{item_id('odd/39.png')}?side=640"
    before = target.read_bytes()
    try:
        target.unlink()
        target.symlink_to(secret)
        assert client.get(address).status_code == 404
        target.unlink()
        target.write_text("<script>alert(1)</script>")
        assert client.get(address).status_code == 404
        target.unlink()
        assert client.get(address).status_code == 404
    finally:
        target.unlink(missing_ok=True)
        target.write_bytes(before)
    assert client.get(address).status_code == 200


def test_too_many_pixels_are_refused_from_the_header(client):
    import base64
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 13000, 13000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(10**6)))
    start = time.monotonic()
    answer = client.post("/search", json={"image": base64.b64encode(bomb).decode()})
    assert answer.status_code == 400
    assert "13000 x 13000" in answer.json()["error"]
    assert time.monotonic() - start < 5  # the memory at its highest: tests/faults/test_fuzz_requests.py


def test_no_answer_tells_where_things_lie(client, place):
    answers = [client.post(path, json=body) for path, body in (
        ("/search", {"text": "x", "k": 40}), ("/search", {"where": [{"column": "mtime", "value": "x"}]}),
        ("/classify", {"names": ["a"], "ids": [item_id("even/00.png")]}))]  # fmt: skip
    answers += [client.get(path) for path in ("/collection", "/map", "/metrics", "/openapi.json", "/readyz")]
    assert [answer.status_code for answer in answers] == [200, 400, *[200] * 6]
    texts = [answer.text for answer in answers]
    assert not [text for text in texts if str(place) in text or os.path.expanduser("~/") in text]


def test_a_token(place):
    from starlette.testclient import TestClient

    from clipworks.server.app import create_app
    from clipworks.server.service import Settings

    token = "a-token-of-24-characters"
    app = create_app(place / "kept", token=token, hosts=["photos.example"], local=False,
                     settings=Settings(preload=False))  # fmt: skip
    with TestClient(app, base_url="http://photos.example") as client:
        for path in ("/healthz", "/readyz", "/", "/app.js"):
            assert client.get(path).status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {token}"},
                        {"authorization": f"Bearer {token}x"}, {"authorization": "Bearer "},
                        {"authorization": b"Bearer \xff"}, {"cookie": f"clipworks={token}"}):  # fmt: skip
            for path in ("/collection", "/metrics", "/map", "/images/" + "0" * 16, "/openapi.json", "/docs"):
                assert client.get(path, headers=headers).status_code == 401
            assert client.post("/search", json={"k": 1}, headers=headers).status_code == 401
        assert client.get("/collection", headers={"authorization": f"Bearer {token}"}).status_code == 200
        assert client.get("/healthz", headers={"host": "10.0.0.7"}).status_code == 200  # a number, no name
        assert client.get("/healthz", headers={"host": "other.example"}).status_code == 421
        assert client.post("/login", json={"token": "wrong"}).status_code == 401
        answer = client.post("/login", json={"token": token})
        assert answer.status_code == 204
        assert "HttpOnly" in answer.headers["set-cookie"]
        assert "samesite=strict" in answer.headers["set-cookie"].lower()
        assert token not in answer.headers["set-cookie"]
        assert client.get("/collection").status_code == 200  # the cookie


def test_addresses_that_others_reach_need_a_token(place, monkeypatch, tmp_path):
    monkeypatch.delenv("CLIPWORKS_TOKEN", raising=False)
    with pytest.raises(ClipworksError, match="token is needed"):
        serve(place / "kept", host="0.0.0.0")
    assert [is_local(h) for h in ("127.0.0.1", "127.5.5.5", "::1", "localhost", "0.0.0.0", "::", "example.org")] == [
        True, True, True, True, False, False, False]  # fmt: skip
    monkeypatch.setenv("CLIPWORKS_TOKEN", "short")
    with pytest.raises(ClipworksError, match="at least 16"):
        read_token(None)
    (tmp_path / "token").write_text("0123456789abcdef\n")
    assert read_token(tmp_path / "token") == "0123456789abcdef"
    with pytest.raises(ClipworksError, match="token_file"):
        read_token(tmp_path / "none")


def test_many_bad_requests_leave_nothing_behind(client):
    def burst():
        for i in range(60):
            client.post("/search", content=json.dumps({"text": "x" * (i * 100), "k": i}).encode(), headers=JSON)
            client.get(f"/images/{i:016x}")
            client.post("/embed", json={"images": [coded(picture(i))[: 40 + i]]})

    burst()
    memory, files = resident(), descriptors()
    burst()
    assert resident() - memory < 30e6
    assert descriptors() <= files + 2
    well(client)
