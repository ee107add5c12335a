"""A real server on this machine that answers what it is posted, and fails on request."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Service(ThreadingHTTPServer):
    """Counts what it is asked.

    Args:
        reply: a request's JSON → the answer's.
    """

    daemon_threads = True

    def __init__(self, reply: Callable[[Any], Any]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply = reply
        self.asked = 0
        """Requests, those that were refused included."""
        self.items = 0
        """Items of the requests that were answered."""
        self.failures = 0
        """How many requests are refused from now on."""
        self.status, self.retry_after = 503, ""
        """With which status, and after how many seconds to come again."""
        self.raw: bytes | None = None
        """What is answered in place of the reply."""
        self.slow = 0.0
        """Seconds before an answer."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever asked may have gone."""


class _Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        service, asked = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        service.asked += 1
        time.sleep(service.slow)
        refused = service.failures > 0
        body = b""
        if refused:
            service.failures -= 1
        else:
            service.items += len(asked.get("items", ()))
            body = json.dumps(service.reply(asked)).encode() if service.raw is None else service.raw
        self.send_response(service.status if refused else 200)
        if refused and service.retry_after:
            self.send_header("Retry-After", service.retry_after)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving(reply: Callable[[Any], Any]) -> Iterator[Service]:
    """The server while the block runs."""
    with Service(reply) as service:
        thread = threading.Thread(target=service.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield service
        finally:
            service.shutdown()
            thread.join()
