"""A server of chat completions on loopback with the faults of real servers."""

import json
import select
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.replies import THINK, reply

FAULTS = ("429", "500", "half a body", "invalid JSON", "closed socket", "stall")


class Server(ThreadingHTTPServer):
    """Chat completions on 127.0.0.1; `answer()` decides the reply to each request.

    It returns the name of a fault, a status with a body and perhaps headers, or the content of a
    completion. As an HTTP proxy the server answers for every host.
    """

    request_queue_size, daemon_threads = 128, True

    def __init__(self, answer=lambda: f"<think>{THINK}</think>", delay=0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.delay, self.lock = answer, delay, threading.Lock()
        self.in_flight = self.most_in_flight = 0
        self.bodies, self.outcomes = [], Counter()
        self.keys, self.paths = set(), set()
        self.asked = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # clients that hang up are part of the tests


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            server.bodies.append(body)
            server.keys.add(self.headers["Authorization"])
            server.paths.add(self.path)
            answer = server.answer()
        server.asked.set()
        time.sleep(server.delay)
        with server.lock:  # before the reply: the next request follows it at once
            server.in_flight -= 1
            fault = answer if answer in FAULTS else ("ok" if isinstance(answer, str) else "status")
            server.outcomes[fault] += 1
        self.respond(answer)

    def do_CONNECT(self):
        """Refuse to pass HTTPS on."""
        self.server.paths.add(self.path)
        self.server.keys.add(self.headers["Authorization"])
        self.send(403, b"not through here")

    def respond(self, answer):
        if answer == "closed socket":
            self.connection.shutdown(socket.SHUT_RDWR)
        elif answer == "stall":
            select.select([self.connection], [], [], 60)  # until the client hangs up
        elif answer == "429":
            self.send(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.01"})
        elif answer == "500":
            self.send(500, {"error": {"message": "oops"}})
        elif answer == "invalid JSON":
            self.send(200, b'{"choices": [{"mess')
        elif isinstance(answer, tuple):
            self.send(*answer)
        else:
            self.send(200, reply(answer), cut=answer == "half a body")

    def send(self, status, value, headers=(), cut=False):
        text = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, content in dict(headers).items():
            self.send_header(name, content)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text[: len(text) // 2] if cut else text)

    def log_message(self, *args):
        pass
