"""An HTTP client for servers that nobody vouches for: a reply has a deadline as a whole and a greatest size."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Any

import openai

MOST_BYTES = 16 << 20  # of one reply, unpacked
CONNECT = 4.0  # seconds for a connection, however long a reply may take


class BoundedClient(openai.DefaultHttpxClient):
    """openai's HTTP client, but a server that sends a byte now and then is not waited for.

    Its own timeout bounds each read alone. Here the connection is shut down when ``seconds`` are over, whatever part
    of the reply is under way, and every request has a connection of its own, so that no other request is on it.

    openai 2 builds on httpx and openai 3 on httpx2, so neither is named here.

    Attributes:
        connected: set by every connection that is made, its encryption included.
    """

    def __init__(self, seconds: float, most_bytes: int = MOST_BYTES) -> None:
        super().__init__(timeout=patience(seconds))
        self.seconds, self.most_bytes = seconds, most_bytes
        self.connected = threading.Event()

    def send(self, request: Any, **options: Any) -> Any:
        """The response, read to its end.

        Raises:
            TimeoutError: the whole reply did not come in time.
            ValueError: the reply is longer than ``most_bytes``.
        """
        late, streams = threading.Event(), []
        last = "start_tls.complete" if request.url.scheme == "https" else "connect_tcp.complete"

        def trace(event: str, info: dict[str, Any]) -> None:
            if event.endswith(("connect_tcp.complete", "start_tls.complete")):
                streams.append(info["return_value"])
                if event.endswith(last):
                    self.connected.set()
                if late.is_set():
                    close()

        def close() -> None:
            late.set()
            for stream in streams:
                with contextlib.suppress(OSError):
                    stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)

        request.headers["Connection"] = "close"
        request.extensions = {**request.extensions, "trace": trace}
        timer = threading.Timer(self.seconds, close)
        timer.daemon = True
        timer.start()
        try:
            return self._whole(super().send(request, **{**options, "stream": True}))
        except Exception as error:
            if late.is_set():
                raise TimeoutError(f"no answer within {self.seconds:g} s") from error
            raise
        finally:
            timer.cancel()

    def _whole(self, response: Any) -> Any:
        body = bytearray()
        with contextlib.closing(response):
            for piece in response.iter_bytes():
                body += piece
                if len(body) > self.most_bytes:
                    raise ValueError(f"the reply is longer than {self.most_bytes:,} bytes")
        told = ("content-encoding", "content-length", "transfer-encoding")  # of what was sent, not of what it holds
        headers = [(name, value) for name, value in response.headers.multi_items() if name not in told]
        return type(response)(response.status_code, headers=headers, content=bytes(body), request=response.request)


def patience(seconds: float) -> openai.Timeout:
    """The time-outs of one request: ``seconds`` for each read and write, CONNECT at most for the connection."""
    return openai.Timeout(seconds, connect=min(seconds, CONNECT))
