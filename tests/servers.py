"""Small servers on 127.0.0.1 for tests: a chat model that behaves as a script says, and a file server."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Say:
    """A proper completion."""

    text: str | None
    prompt_tokens: int = 10
    completion_tokens: int = 2
    usage: bool = True


@dataclass(frozen=True)
class Status:
    """An error with the given status."""

    code: int
    message: str = "try later"
    headers: Mapping[str, str] = field(default_factory=dict)
    error_code: str | None = None


@dataclass(frozen=True)
class Raw:
    """Status 200 and a body that is no completion."""

    body: bytes
    content_type: str = "application/json"
    encoding: str | None = None


@dataclass(frozen=True)
class Silence:
    """Nothing is ever said: the server holds the connection until it is closed."""


@dataclass(frozen=True)
class Cut:
    """The connection is closed without an answer."""


@dataclass(frozen=True)
class Drip:
    """A reply that never ends: a byte at a time, from its very beginning (``headers``) or in its body."""

    headers: bool


Behaviour = Say | Status | Raw | Silence | Cut | Drip


class ChatServer:
    """``script(request body, number of the request from 0)`` says how each request is treated."""

    def __init__(self, script: Callable[[dict[str, Any], int], Behaviour]) -> None:
        self.script, self.requests, self.headers = script, [], []
        self._lock, self._ended = threading.Lock(), threading.Event()
        self.in_flight = self.most_in_flight = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> ChatServer:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    number = len(outer.requests)
                    outer.requests.append(body)
                    outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                    outer.in_flight += 1
                    outer.most_in_flight = max(outer.most_in_flight, outer.in_flight)
                try:
                    self._answer(outer.script(body, number), body)
                finally:
                    with outer._lock:
                        outer.in_flight -= 1

            def _answer(self, how: Behaviour, body: dict[str, Any]) -> None:
                if isinstance(how, Silence):
                    outer._ended.wait(30)
                if isinstance(how, Silence | Cut):
                    self.close_connection = True
                    return
                if isinstance(how, Drip):
                    self._drip(how)
                elif isinstance(how, Say):
                    self._send(200, json.dumps(completion(how, body["model"])).encode())
                elif isinstance(how, Status):
                    error = {"error": {"message": how.message, "type": "x", "code": how.error_code}}
                    self._send(how.code, json.dumps(error).encode(), headers=how.headers)
                else:
                    headers = {"Content-Encoding": how.encoding} if how.encoding else {}
                    self._send(200, how.body, how.content_type, headers)

            def _drip(self, how: Drip) -> None:
                self.close_connection = True
                if not how.headers:
                    self._send(200, b"", headers={"Content-Length": "100000"})
                with suppress(OSError):
                    while not outer._ended.wait(0.01):
                        self.wfile.write(b"H" if how.headers else b" ")

            def _send(
                self, code: int, data: bytes, kind: str = "application/json", headers: Mapping[str, str] | None = None
            ) -> None:
                self.send_response(code)
                for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()


def completion(say: Say, model: str) -> dict[str, Any]:
    """The JSON of a chat completion."""
    whole = {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": say.text}}],
    }
    if say.usage:
        whole["usage"] = {
            "prompt_tokens": say.prompt_tokens,
            "completion_tokens": say.completion_tokens,
            "total_tokens": say.prompt_tokens + say.completion_tokens,
        }
    return whole


def last_text(body: Mapping[str, Any]) -> str:
    """Text of the last message of a request, pictures left out."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else " ".join(p["text"] for p in content if p["type"] == "text")


@dataclass
class Files:
    """Files of a FileServer: path to bytes; what each request asked for; when to cut."""

    content: dict[str, bytes]
    ranges: bool = True
    cut_after: list[int] = field(default_factory=list)  # bytes sent before request n breaks off; -1: whole
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    etag: str | None = None
    length: bool = True  # whether the length is said
    drip: str = ""  # where a byte now and then is all that comes: header, chunk or body
    refuse: dict[str, tuple[int, Mapping[str, str]]] = field(default_factory=dict)  # path → status and headers
    logins: list[tuple[str, str | None]] = field(default_factory=list)  # path and Authorization of each request


@contextmanager
def file_server(files: Files, encrypted: Callable[[str], ssl.SSLContext] | None = None) -> Iterator[str]:
    """Serves ``files`` and yields the address it listens at.

    With ``encrypted``, which makes a certificate for a host, it is a proxy too that answers in the name of every host:
    the paths of these files begin with ``https://HOST``.
    """

    class Handler(BaseHTTPRequestHandler):
        site = ""

        def do_CONNECT(self) -> None:
            assert encrypted is not None
            host = self.path.removesuffix(":443")
            self.send_response(200)
            self.end_headers()
            self.connection = encrypted(host).wrap_socket(self.connection, server_side=True)
            self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", 0)
            self.site, self.close_connection = f"https://{host}", False

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            files.asked.append((self.site + self.path, wanted))
            files.logins.append((self.site + self.path, self.headers.get("Authorization")))
            path = self.site + self.path.partition("?")[0]
            data = files.content.get(path)
            if path in files.refuse:
                status, headers = files.refuse[path]
                self.send_response(status)
                for name, value in ({"Content-Length": "0"} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                return
            if data is None:
                self.send_error(404)
                return
            start = 0
            if files.drip:
                self.trickle()
                return
            if wanted and files.ranges:
                start = int(wanted.removeprefix("bytes=").split("-")[0])
                if start >= len(data):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(data)}")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            else:
                self.send_response(200)
            if files.length:
                self.send_header("Content-Length", str(len(data) - start))
            if files.etag:
                self.send_header("ETag", files.etag)
            self.end_headers()
            cut = files.cut_after.pop(0) if files.cut_after else -1
            self.wfile.write(data[start:] if cut < 0 else data[start : start + cut])

        def trickle(self) -> None:
            """A byte every 20 ms until the client leaves."""
            length = "Transfer-Encoding: chunked" if files.drip == "chunk" else "Content-Length: 9999"
            start = "HTTP/1.1 200 OK\r\n" if files.drip == "header" else f"HTTP/1.1 200 OK\r\n{length}\r\n\r\n"
            with suppress(OSError):
                self.wfile.write(start.encode() + b"X-Slow: " * (files.drip == "header"))
                while not left.is_set():
                    self.wfile.write(b"0")
                    left.wait(0.02)

        def log_message(self, *_: Any) -> None:
            pass

    left = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        left.set()
        server.shutdown()
        server.server_close()
