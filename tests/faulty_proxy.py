"""An HTTP proxy between a client and an object store, with which a test makes requests fail.

It listens on loopback, reads each request completely, and forwards it to the store over another connection.
"""

import http.client
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

ERRORS = {  # fault -> status, code
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "429": (429, "TooManyRequests"),
    "401": (401, "Unauthorized"),
    "403": (403, "InvalidAccessKeyId"),
}
# 500, 503, 429, 401, 403: the proxy answers with this status and does not forward the request.
# drop: the connection is closed before the request is forwarded.
# lost: the request is forwarded, and the connection is closed instead of an answer.
# half: the body ends in the middle, before its Content-Length.
# short: the body ends in the middle, and Content-Length is that of the half.
# slow: the request is forwarded after a second.
# stale: the answer is the first listing of this path, or an empty one if there was none.
FAULTS = (*ERRORS, "drop", "lost", "half", "short", "slow", "stale")
SLOW = 1.0  # seconds


class Request(NamedTuple):
    """A request: its number, counted from 0, its method, and its path including the query."""

    number: int
    method: str
    path: str

    @property
    def is_listing(self) -> bool:
        return self.method == "GET" and "list-type" in parse_qs(urlsplit(self.path).query)


Schedule = Callable[[Request], str | None]


def seeded(seed: int, rate: float, faults: Sequence[str]) -> Schedule:
    """A schedule in which each request fails with probability `rate`, by one of these faults that can happen to it.

    The draws depend only on the seed and the number of the request.
    """

    def fault(request: Request) -> str | None:
        rng = random.Random(f"{seed}.{request.number}")
        fitting = [one for one in faults if fits(one, request)]
        return rng.choice(fitting) if fitting and rng.random() < rate else None

    return fault


def fits(fault: str, request: Request) -> bool:
    """Whether a fault can happen to a request: only a listing can be stale, and only a read has a body to cut short."""
    if fault == "stale":
        return request.is_listing
    return request.method == "GET" or fault not in ("half", "short")


class FaultyProxy(ThreadingHTTPServer):
    """The proxy. `schedule` decides which requests fail and how; `requests` and `injected` record what happened."""

    daemon_threads = True

    def __init__(self, upstream: str, schedule: Schedule = lambda request: None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream, self.schedule = urlsplit(upstream).netloc, schedule
        self.requests: list[Request] = []
        self.injected: list[tuple[str, Request]] = []
        self.ignored_headers: set[str] = set()  # request headers, in lower case, that are not forwarded to the store
        self.listings: dict[str, bytes] = {}  # the first answer to each listing, served when stale
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def next_fault(self, method: str, path: str) -> tuple[str | None, Request]:
        with self.lock:
            request = Request(len(self.requests), method, path)
            self.requests.append(request)
            fault = self.schedule(request)
            if fault is not None:
                self.injected.append((fault, request))
            return fault, request

    def handle_error(self, request: object, client_address: object) -> None:
        """A closed connection of a client is not an error."""


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault, request = self.server.next_fault(self.command, self.path)
        if fault in ERRORS:
            status, code = ERRORS[fault]
            text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>injected</Message></Error>'
            return self.answer(status, {"Content-Type": "application/xml"}, text.encode())
        if fault == "drop":
            return self.hang_up()
        if fault == "slow":
            time.sleep(SLOW)
        status, headers, data = self.ask(body)
        if request.is_listing and status == 200:
            before = self.server.listings.setdefault(self.path, data)
            if fault == "stale":
                data = before if before is not data else b'<?xml version="1.0"?><ListBucketResult/>'
        if fault == "lost":
            return self.hang_up()
        if fault == "short":
            data = data[: len(data) // 2]
        self.answer(status, headers, data, cut=fault == "half")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = serve

    def ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """The store's answer."""
        connection = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            ignored = self.server.ignored_headers
            headers = {name: value for name, value in self.headers.items() if name.lower() not in ignored}
            connection.request(self.command, self.path, body or None, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def answer(self, status: int, headers: dict[str, str], data: bytes, cut: bool = False) -> None:
        kept = {"connection", "transfer-encoding", "date", "server"}
        if self.command != "HEAD":
            kept.add("content-length")
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in kept:
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.hang_up()

    def hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


@contextmanager
def faulty_proxy(upstream: str, schedule: Schedule = lambda request: None) -> Iterator[FaultyProxy]:
    """Run a proxy in front of a store."""
    with FaultyProxy(upstream, schedule) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
