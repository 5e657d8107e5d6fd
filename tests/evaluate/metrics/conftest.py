"""Fixtures of the metric tests: an evaluation context on the tiny model, gemma-2-mini's tokenizer, a chat server."""

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae.cache.context_format import ContextFormat
from sae.cache.contexts import Contexts
from sae.evaluate.artifacts import ArtifactCache
from sae.evaluate.context import EvalContext
from sae.harvest.mini import WEIGHTS
from sae.harvest.model import LanguageModel, ModelSource, find_model, load_model, load_tokenizer

SPECIAL = (0, 1, 2)  # pad, eos, bos


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tokenizer of gemma-2-mini."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(WEIGHTS)


@pytest.fixture(scope="session")
def loaded_tiny_model(tiny_model: Path) -> tuple[ModelSource, LanguageModel, Any]:
    """The source of the tiny model, the model in float32, and its tokenizer."""
    source, config = find_model(str(tiny_model))
    return source, load_model(source, config, dtype="float32", device="cpu"), load_tokenizer(source)


@pytest.fixture
def ctx(loaded_tiny_model: tuple[ModelSource, LanguageModel, Any], tmp_path: Path) -> EvalContext:
    """An evaluation context without held-out text. Each test has its own artifact cache."""
    source, model, tokenizer = loaded_tiny_model
    no_text = Contexts(*(np.zeros(0) for _ in range(4)))
    artifacts = ArtifactCache(tmp_path / "shelf")
    form = ContextFormat(2, SPECIAL)
    return EvalContext(lambda: model, tokenizer, no_text, form, "0.6.0", source.identity(), {}, artifacts)


@dataclass
class Server:
    """A chat endpoint that sends `replies` in turn and repeats the last one.

    `seen` records the path, key and body of each request.
    """

    replies: list
    url: str = ""
    seen: list = field(default_factory=list)

    @staticmethod
    def completion(text: str) -> tuple[int, dict[str, str], Any]:
        """A reply with one chat message."""
        return 200, {}, {"choices": [{"message": {"role": "assistant", "content": text}}]}


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server([])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            state.seen.append((self.path, self.headers["Authorization"], json.loads(body)))
            reply = state.replies.pop(0) if len(state.replies) > 1 else state.replies[0]
            status, headers, content = reply(state.seen[-1][2]) if callable(reply) else reply
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_header("Content-Length", str(len(data)))
            with contextlib.suppress(ConnectionError):  # the client has closed
                self.end_headers()
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    class Listening(ThreadingHTTPServer):
        request_queue_size = 64  # with 5, the sixth simultaneous connection waits a second to try again

    http = Listening(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield state
    http.shutdown()
    thread.join()
    http.server_close()
