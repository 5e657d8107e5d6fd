"""An S3 store on loopback for tests: moto's server, in a separate process.

moto speaks S3 over real HTTP, with paginated listings, multipart uploads, XML errors and conditional writes
(If-None-Match, answered with 412 as by S3). It is a pure Python package on PyPI, and it keeps objects in memory, so it
leaves nothing behind. It does not verify signatures; tests of refused credentials use tests/faulty_proxy.py, which
answers 403 in its place.
"""

import itertools
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SECRET = "fake-secret-that-no-file-may-hold"
NUMBERS = itertools.count()
SERVER = """
from moto.moto_server.werkzeug_app import MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple
run_simple("127.0.0.1", 0, create_backend_app("s3"), threaded=True, request_handler=MotoRequestHandler)
"""
# moto.server finds out for each request which of some 200 services it is for. That takes longer than many answers.


def environment(endpoint: str) -> dict[str, str]:
    """Environment variables of the store. They replace the user's variables, so no test can reach a real store."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "fake-key",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_METADATA_ENDPOINT": "http://127.0.0.1:9",  # nothing listens there
    }


@contextmanager
def running_server() -> Iterator[str]:
    """Start the server on a free port and yield its address; stop it at the end."""
    words = [sys.executable, "-u", "-c", SERVER]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=clean) as server:
        try:
            assert server.stdout is not None
            said = []
            for line in server.stdout:
                said.append(line)
                if match := re.search(r"Running on (http://127\.0\.0\.1:\d+)", line):
                    break
            else:
                raise RuntimeError(f"moto's server did not start:\n{''.join(said)}")
            # The server writes a line for each request, and would block if the pipe were full.
            threading.Thread(target=server.stdout.read, daemon=True).start()
            yield match[1]
        finally:
            server.kill()


def make_bucket(endpoint: str) -> str:
    """Make a new bucket and return its address."""
    name = f"bucket-{os.getpid()}-{next(NUMBERS)}"
    with urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{name}", method="PUT")) as answer:
        assert answer.status == 200
    return f"s3://{name}"


def upload(folder: Path, address: str) -> str:
    """Copy the files of a cache to an address, under the same names; returns the address."""
    from sae.cache.object_store import open_store

    store = open_store(address)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            store.put(path.relative_to(folder).as_posix(), path)
    return address
