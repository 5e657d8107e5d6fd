"""A Hub on localhost, which the real client of the Hub talks to."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


class LocalHub:
    """In-memory repositories, each with one commit, and a record of the requested paths."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, str] = {}
        self.api_requests: list[str] = []
        self.downloads: list[str] = []
        self.corrupt: set[str] = set()  # files whose last byte is changed when they are served
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def publish(self, repo: str, files: dict[str, bytes], commit: str = "a" * 40) -> None:
        self.repositories[repo], self.commits[repo] = files, commit

    def publish_folder(self, repo: str, path: str, folder: Path, commit: str = "a" * 40) -> None:
        files = {
            f"{path}/{p.relative_to(folder).as_posix()}".lstrip("/"): p.read_bytes()
            for p in folder.rglob("*")
            if p.is_file()
        }
        self.publish(repo, self.repositories.get(repo, {}) | files, commit)

    def answer(self, request: BaseHTTPRequestHandler, with_body: bool) -> None:
        parts = unquote(urlsplit(request.path).path).strip("/").split("/")
        status, headers, body = 404, {"X-Error-Code": "RepoNotFound"}, b""
        if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in self.repositories:
            self.api_requests.append(request.path)
            status, headers, body = 200, {"Content-Type": "application/json"}, self.describe("/".join(parts[2:4]))
        elif "/".join(parts[:2]) in self.repositories and parts[2] == "resolve":
            repo, file = "/".join(parts[:2]), "/".join(parts[4:])
            body = self.repositories[repo][file]
            status, headers = 200, {"X-Repo-Commit": self.commits[repo], "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}
            if with_body:
                self.downloads.append(file)
            if file in self.corrupt:
                body = body[:-1] + bytes([body[-1] ^ 1])
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        if with_body:
            request.wfile.write(body)

    def describe(self, repo: str) -> bytes:
        """What the Hub says about a repository when it is asked with blobs=true."""
        siblings = []
        for name, data in self.repositories[repo].items():
            sibling: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            if not name.endswith(".json"):
                sibling["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(sibling)
        record = {"_id": "1", "id": repo, "modelId": repo, "sha": self.commits[repo], "siblings": siblings}
        return json.dumps({**record, "private": False, "downloads": 0, "likes": 0, "tags": []}).encode()


@pytest.fixture
def local_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    hub = LocalHub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    close_session()
    yield hub
    close_session()
    hub.server.shutdown()
    hub.server.server_close()
