"""A server that speaks OpenAI's chat protocol, in a process of its own; the model's name says how it behaves.

    python chat_server.py      # prints its port

`GET /log` returns what was asked so far.
"""

import json
import socket
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ASKED = []
ANSWER = "Useful features:\n- a red comb\n- feathers of {name}"
PAIRS = '```json\n[{{"attribute": "legs", "first": "{a} with long legs", "second": "{b} with short legs"}}]\n```'


class Chat(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send(200, ASKED)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ASKED.append({"path": self.path, "key": self.headers.get("Authorization"), "body": body})
        model = body["model"]
        before = sum(a["body"]["model"] == model for a in ASKED) - 1
        getattr(self, model.split("-")[0])(body, before)

    def send(self, status, value, headers=(), raw=None):
        data = json.dumps(value).encode() if raw is None else raw
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, text in headers:
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def answer(self, text, usage=None):
        usage = {"prompt_tokens": 200, "completion_tokens": 10} if usage is None else usage
        self.send(200, {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage})

    def good(self, body, before):
        said = body["messages"][-1]["content"]
        if "JSON" in said:
            a, b = said.split(" a photo of a ")[1], said.split(" a photo of a ")[2]
            return self.answer(PAIRS.format(a=a.split(" from")[0], b=b.split("?")[0]))
        self.answer(ANSWER.format(name=said.split("distinguishing a ")[1].split(" in a photo")[0]))

    def busy(self, body, before):
        """Twice too busy, once broken, then well."""
        if before < 2:
            return self.send(429, {"error": {"message": "slow down"}}, [("Retry-After", "7")] if before else [])
        self.send(500, {"error": {"message": "oops"}}) if before == 2 else self.good(body, before)

    def broken(self, body, before):
        self.send(503, None, raw=b"<html>\x1b[31mno backend</html>")

    def denied(self, body, before):
        self.send(401, {"error": {"message": f"wrong key {self.headers.get('Authorization')}"}})

    def garbage(self, body, before):
        raws = [
            b"<html>",
            b'{"choices": []}',
            b"\xff\xfe",
            b"[" * 100_000,
            b'{"choices": [{"message": {"content": 3}}]}',
        ]
        self.send(200, None, raw=raws[before]) if before < len(raws) else self.answer("- well", usage=["no", "usage"])

    def huge(self, body, before):
        self.send(200, None, raw=b"x" * (3 << 20))

    def slow(self, body, before):
        time.sleep(2 if before == 0 else 0)
        self.good(body, before)

    def drip(self, body, before):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        for _ in range(60):
            time.sleep(0.05)
            self.wfile.write(b" ")
            self.wfile.flush()

    def hangup(self, body, before):
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def elsewhere(self, body, before):
        self.send(307, None, [("Location", "/other/chat/completions")])

    def half(self, body, before):
        """Every second class is beyond it."""
        self.broken(body, before) if "duck" in body["messages"][-1]["content"] else self.good(body, before)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Chat)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()
