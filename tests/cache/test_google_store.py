"""Conditional writes to Google Cloud Storage, which depend on the generation number of an object.

moto cannot emulate them, so the tests run a small server that follows Google's documentation of the XML API. They show
nothing else about Google Cloud Storage.
"""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sae.cache.object_store import ObjectStore, open_store


class Google(ThreadingHTTPServer):
    """A server that stores each object with its generation number.

    `before_write` is called once, before the condition of the next write is checked.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.before_write: Callable[[], None] | None = None

    def write(self, path: str, data: bytes) -> None:
        self.objects[path] = self.objects.get(path, (100, b""))[0] + 1, data


class Handler(BaseHTTPRequestHandler):
    server: Google

    def do_GET(self) -> None:
        found = self.server.objects.get(self.path)
        self.answer(404 if found is None else 200, b"" if found is None else found[1])

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.before_write:
            before, self.server.before_write = self.server.before_write, None
            before()
        number, expected = self.server.objects.get(self.path, (0, b""))[0], self.headers["x-goog-if-generation-match"]
        if expected not in (None, str(number)):
            return self.answer(412)
        self.server.write(self.path, data)
        self.answer(200)

    def answer(self, status: int, data: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (
            ("ETag", '"one tag for all"'),
            ("x-goog-generation", str(self.server.objects.get(self.path, (0, b""))[0])),
            ("Last-Modified", "Mon, 30 Nov 2026 00:00:00 GMT"),
            ("Content-Length", str(len(data))),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Google]:
    with Google() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        key = {"gcs_base_url": f"http://127.0.0.1:{server.server_port}", "disable_oauth": True}
        key |= {"client_email": "", "private_key": "", "private_key_id": ""}
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(key))
        monkeypatch.setenv("GOOGLE_ALLOW_HTTP", "true")
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def store(google: Google) -> ObjectStore:
    return open_store("gs://bucket/pile")


def test_an_object_is_made_once_and_replaced_only_as_it_was_seen(google: Google, store: ObjectStore) -> None:
    assert store.find("zarr.json") is None
    assert store.put_if_absent("zarr.json", b"one") and not store.put_if_absent("zarr.json", b"other")
    assert store.replace("zarr.json", b"two", b"one") and store.get("zarr.json") == b"two"
    assert not store.replace("zarr.json", b"three", b"one") and store.get("zarr.json") == b"two"


def test_what_another_writes_between_a_look_and_a_replacement_stays(google: Google, store: ObjectStore) -> None:
    store.put("manifest.json", b"seen")
    (path,) = google.objects
    google.before_write = lambda: google.write(path, b"theirs")
    assert not store.replace("manifest.json", b"ours", b"seen") and store.get("manifest.json") == b"theirs"
