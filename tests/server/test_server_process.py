"""The real process: many clients at once, a full queue, slow and endless senders, lack of memory, SIGTERM."""

import base64
import http.client
import io
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from small_server import coded, picture

TOO_LONG = 120


class Server:
    """`clipworks serve` on a free port."""

    def __init__(self, collection, *options, env=None):
        command = [sys.executable, "-m", "clipworks", "serve", str(collection), "--port", "0", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        try:
            self.start()
        except BaseException:
            self.process.kill()
            raise

    def start(self):
        line = self.process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, line + self.process.stderr.read()
        self.port = int(found[1])
        until = time.monotonic() + TOO_LONG
        while self.get("/readyz")[0] != 200:
            assert time.monotonic() < until
            time.sleep(0.1)

    def get(self, path):
        return self.send("GET", path)

    def send(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TOO_LONG)
        try:
            kind = {"content-type": "application/json"} if body is not None else {}
            data = body if isinstance(body, bytes | None) else json.dumps(body)
            connection.request(method, path, data, {**kind, **(headers or {})})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def post(self, path, **body):
        return self.send("POST", path, body)

    def memory(self):
        return float(re.search(rb"\nprocess_resident_memory_bytes (\S+)", self.get("/metrics")[2])[1])

    def metric(self, name):
        return float(re.search(rf"^{name} (\S+)$", self.get("/metrics")[2].decode(), re.M)[1])

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(TOO_LONG)
        return code, self.process.stderr.read()


@pytest.fixture(scope="module")
def server(place):
    made = Server(place / "kept", "--max-batch", "8", "--max-queue", "16")
    yield made
    made.stop()


def test_requests_of_many_clients_are_answered_together(server):
    before = server.metric("clipworks_batch_size_count")

    def client(number):
        return [server.post("/search", text=f"words {number} {i}", k=3)[0] for i in range(12)]

    with ThreadPoolExecutor(8) as pool:
        statuses = [status for found in pool.map(client, range(8)) for status in found]
    assert statuses == [200] * 96
    assert server.metric("clipworks_batch_size_count") - before < 96  # fewer passes than requests


def test_an_answer_is_sent_at_once_on_a_line_that_stays_open(server):
    """The body must not wait until the client has acknowledged the head, which takes it some 40 ms."""
    line, seconds = http.client.HTTPConnection("127.0.0.1", server.port, timeout=TOO_LONG), []
    for _ in range(60):
        start = time.perf_counter()
        line.request("GET", "/healthz")
        assert line.getresponse().read() == b'{"status":"ok"}'
        seconds.append(time.perf_counter() - start)
    line.close()
    assert min(seconds[30:]) < 0.03


def test_a_flood_is_told_to_come_again_and_the_server_lives(server):
    image = coded(Image.new("RGB", (700, 700), "red"))

    def client(i):
        return server.post("/segment", names=["a", "b", f"c{i}"], image=image)

    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(client, range(60)))
    statuses = {status for status, _, _ in answers}
    assert statuses == {200, 429}
    for status, headers, body in answers:
        if status == 429:
            assert int(headers["retry-after"]) >= 1
            assert "error" in json.loads(body)
    assert server.metric("clipworks_rejected_total") >= 1
    assert server.post("/search", text="after the flood", k=1)[0] == 200


def test_an_endless_body_is_cut_off(server):
    before = server.memory()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as line:
        line.sendall(b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     b"Transfer-Encoding: chunked\r\n\r\n")  # fmt: skip
        piece, sent = b"100000\r\n" + b"a" * 2**20 + b"\r\n", 0
        try:
            while sent < 400:
                line.sendall(piece)
                sent += 1
        except OSError:
            pass
        assert sent < 200  # mebibytes: the limit is 10, the rest lay in buffers on the way
    assert server.memory() - before < 100e6
    assert server.post("/search", text="after it", k=1)[0] == 200


def test_a_long_body_is_refused_by_its_length_alone(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as line:
        line.sendall(b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     b"Content-Length: 100000000\r\n\r\n")  # fmt: skip
        assert line.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("head", [
    b"GET /healthz HTTP/1.1\r\n\r\n", b"GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"\x16\x03\x01\x02\x00",
    b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
])  # fmt: skip
def test_heads_that_are_none(server, head):
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as line:
        line.sendall(head)
        line.shutdown(socket.SHUT_WR)
        answer = line.recv(1000)
    assert not answer or re.match(rb"HTTP/1.1 4\d\d", answer), answer
    assert server.get("/healthz")[0] == 200


def test_two_hundred_slow_senders_stop_nobody(server):
    lines = []
    try:
        for _ in range(200):
            line = socket.create_connection(("127.0.0.1", server.port), timeout=60)
            line.sendall(b"POST /search HTTP/1.1\r\nHost: localhost\r\nX: ")
            lines.append(line)
        start = time.monotonic()
        assert server.post("/search", text="in between", k=1)[0] == 200
        assert time.monotonic() - start < 10
    finally:
        for line in lines:
            line.close()


@pytest.mark.slow
def test_a_sender_that_never_ends_its_head_is_dropped(server):
    from clipworks.server.run import PATIENCE

    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE + 30) as line:
        line.sendall(b"GET /healthz HTTP/1.1\r\nHost: loc")
        start = time.monotonic()
        assert line.recv(10) == b""
        assert time.monotonic() - start > PATIENCE - 5


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")
def test_lack_of_memory_fails_the_request_and_not_the_server(place):
    server = Server(place / "kept")
    try:
        out = io.BytesIO()
        Image.new("RGB", (5000, 3900), "blue").save(out, "PNG")
        large = base64.b64encode(out.getvalue()).decode()
        for i in range(4):  # all threads are there
            assert server.post("/search", image=coded(picture(i)), text=f"{i}", k=1)[0] == 200
        pid = server.process.pid
        size = int(re.search(r"VmSize:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) * 1024
        before = resource.prlimit(pid, resource.RLIMIT_AS)
        resource.prlimit(pid, resource.RLIMIT_AS, (size + 16 * 2**20, before[1]))
        status, headers, body = server.post("/search", image=large, k=1)
        assert (status, "retry-after" in headers) == (503, True), body
        resource.prlimit(pid, resource.RLIMIT_AS, before)
        assert server.post("/search", image=large, k=1)[0] == 200
        assert server.get("/healthz")[0] == 200
    finally:
        assert server.stop()[0] == 0


def test_sigterm_answers_what_is_in_work_and_leaves(place):
    server = Server(place / "kept", "--no-preload")
    answers = []
    # the first request loads the encoder, which takes long enough to be interrupted
    thread = threading.Thread(target=lambda: answers.append(server.post("/search", text="the last one", k=1)))
    thread.start()
    while not server.metric("clipworks_model_loads") and server.get("/readyz")[2].find(b"loading") < 0:
        pass
    server.process.send_signal(signal.SIGTERM)
    code, said = server.stop()
    thread.join(TOO_LONG)
    assert answers[0][0] == 200
    assert code == 0, said
    assert "stopped" in said
    with pytest.raises(OSError, match="refused"):
        server.get("/healthz")


def test_messages_before_it_starts(place, capsys, monkeypatch):
    from clipworks.cli.main import main

    monkeypatch.delenv("CLIPWORKS_TOKEN", raising=False)
    assert main(["serve", str(place / "kept"), "--host", "0.0.0.0"]) == 2
    assert "token" in capsys.readouterr().err
    assert main(["serve", str(place / "kep"), "--port", "0"]) == 1
    assert "Did you mean 'kept'" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", str(place / "kept"), "--port", str(taken.getsockname()[1])]) == 2
    assert "in use" in capsys.readouterr().err
    assert main(["serve", str(place / "kept"), "--port", "70000"]) == 2
    assert "65535" in capsys.readouterr().err
