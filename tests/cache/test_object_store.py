"""The methods of an object store, their messages when the store fails, and what these messages must never contain."""

import socket
import sys
import threading
import time
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from sae.cache import machine_credentials, object_store
from sae.cache.mirror import Mirror, map_ahead, working_folder
from sae.cache.object_store import ObjectStore, client_options, folder_or_url, is_url, open_store
from sae.cache.opening import open_cache
from sae.cache.store_errors import StoreWarning, failure
from sae.common.errors import DamagedError, UnavailableError, UsageError

from .. import faulty_proxy as faulty_proxies
from ..faulty_proxy import FaultyProxy, faulty_proxy, fits
from ..object_store import SECRET

pytestmark = pytest.mark.usefixtures("fast_retries")


@pytest.fixture
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry at once, and give up after three retries."""
    backoff = {"init_backoff": timedelta(milliseconds=1), "max_backoff": timedelta(milliseconds=5), "base": 2}
    monkeypatch.setattr(object_store, "RETRY", {**object_store.RETRY, "max_retries": 3, "backoff": backoff})
    monkeypatch.setattr(object_store, "PAUSE", 0)
    monkeypatch.setattr(faulty_proxies, "SLOW", 0.05)


@pytest.fixture(params=["s3", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "file":
        return open_store(f"file://{tmp_path}/objects")
    return open_store(f"{request.getfixturevalue('bucket')}/pile/")


@pytest.fixture
def proxy(s3_endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch):
    with faulty_proxy(s3_endpoint) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


def test_objects_are_written_read_listed_and_deleted(store: ObjectStore, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(range(256)) * 40_000)  # large enough for a download in several parts
    store.put("layer_12/c.0.0", large)
    store.put("zarr.json", b"{}")
    store.put("empty", b"")
    assert store.get("zarr.json") == b"{}" and store.get("empty") == b""
    assert store.size("layer_12/c.0.0") == large.stat().st_size
    store.get_to("layer_12/c.0.0", tmp_path / "deep" / "copy")
    assert (tmp_path / "deep" / "copy").read_bytes() == large.read_bytes()
    assert sorted(store.list()) == [("empty", 0), ("layer_12/c.0.0", 10_240_000), ("zarr.json", 2)]
    assert list(store.list("layer_12")) == [("layer_12/c.0.0", 10_240_000)]
    assert list(store.list("layer_1")) == []  # the argument names a folder, not the beginning of a name
    store.delete(["zarr.json", "never there", "empty"])
    assert [key for key, _ in store.list()] == ["layer_12/c.0.0"]
    assert store.exists("layer_12/c.0.0") and not store.exists("zarr.json")


def slowly(fault: str):
    return pytest.param(fault, marks=pytest.mark.slow)


def first_request_fails(fault: str):
    return lambda request: fault if request.number == 0 and fits(fault, request) else None


class Forbidding(BaseHTTPRequestHandler):
    """Answers, and gives nothing."""

    def do_PUT(self) -> None:
        self.send_error(403)

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


ACTIONS = {
    "get": lambda store, path: store.get("there") == DATA,
    "get_to": lambda store, path: store.get_to("there", path / "copy") or (path / "copy").read_bytes() == DATA,
    "put": lambda store, path: store.put("new", DATA) or store.get("new") == DATA,
    "put_if_absent": lambda store, path: store.put_if_absent("new", DATA) and store.get("new") == DATA,
    "not_absent": lambda store, path: not store.put_if_absent("there", b"other") and store.get("there") == DATA,
    "exists": lambda store, path: store.exists("there"),
    "does_not_exist": lambda store, path: not store.exists("absent"),
    "size": lambda store, path: store.size("there") == len(DATA),
    "list": lambda store, path: list(store.list()) == [("there", len(DATA))],
    "delete": lambda store, path: store.delete(["there", "absent"]) or not store.exists("there"),
}
DATA = bytes(range(256)) * 1000


@pytest.mark.parametrize("fault", ["lost", "half", *(slowly(one) for one in ("500", "503", "429", "drop", "slow"))])
def test_one_failure_changes_no_result(fault: str, proxy: FaultyProxy, bucket: str, tmp_path: Path) -> None:
    for name, action in ACTIONS.items():
        store = open_store(f"{bucket}/{name}")
        store.put("there", DATA)
        proxy.requests.clear()
        proxy.injected.clear()
        proxy.schedule = first_request_fails(fault)
        assert action(store, tmp_path), name
        proxy.schedule = lambda request: None
        assert len(proxy.injected) == (fault != "half" or name in ("get", "get_to", "list"))
    assert not list(tmp_path.rglob("*.tmp-*"))


@pytest.mark.parametrize("fault", ["429", *(slowly(one) for one in ("500", "503", "drop"))])
def test_failures_without_end_are_one_sentence(fault: str, proxy: FaultyProxy, bucket: str, tmp_path: Path) -> None:
    store = open_store(f"{bucket}/pile")
    store.put("there", DATA)
    proxy.schedule = lambda request: fault if fits(fault, request) else None
    for name, action in ACTIONS.items():
        with (
            pytest.warns(StoreWarning, match=f"^{bucket}/pile: the store .*Trying again"),
            pytest.raises(UnavailableError, match="run the same command again") as caught,
        ):
            action(store, tmp_path)
        assert one_sentence(caught.value).startswith(f"{bucket}/pile"), name
    assert not (tmp_path / "copy").exists()


def one_sentence(error: Exception) -> str:
    """Return the message, after checking that it is short and contains neither a secret nor obstore's own text."""
    text = str(error)
    assert "\n" not in text and len(text) < 400 and "Debug source" not in text and "http://" not in text
    assert SECRET not in text and error.__cause__ is None and error.__suppress_context__
    return text


@pytest.mark.parametrize("status", ["401", "403"])
def test_refused_credentials(proxy: FaultyProxy, bucket: str, tmp_path: Path, status: str) -> None:
    store = open_store(f"{bucket}/pile")
    proxy.schedule = lambda request: status
    for name, action in ACTIONS.items():
        proxy.requests.clear()
        with pytest.raises(UnavailableError, match="the store refused the credentials") as caught:
            action(store, tmp_path)
        assert f"({status}" in one_sentence(caught.value)
        assert len(proxy.requests) == 1, name  # there is no retry, which would not help


def test_missing_bucket_and_missing_object(bucket: str, tmp_path: Path) -> None:
    store = open_store("s3://no-such-bucket/pile")
    for action in (store.check, lambda: store.put("a", b""), lambda: store.get("a"), lambda: list(store.list())):
        with pytest.raises(UnavailableError, match="the bucket does not exist.*Create it") as caught:
            action()
        one_sentence(caught.value)
    here = open_store(f"{bucket}/pile")
    here.check()
    for action in (lambda: here.get("a"), lambda: here.get_to("a", tmp_path / "a"), lambda: here.size("a")):
        with pytest.raises(DamagedError, match=f"{bucket}/pile/a is missing"):
            action()
    assert not (tmp_path / "a").exists()


def test_no_credentials_no_endpoint_no_account(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(UnavailableError, match="the endpoint is http://, which is not encrypted"):
        open_store(bucket).exists("a")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(UnavailableError, match="cannot be reached"):
        open_store(bucket).exists("a")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):  # without the first variable, then without both
        monkeypatch.delenv(name)
        with pytest.raises(UnavailableError, match="No credentials for .* were found. Set them in the") as caught:
            open_store(bucket).exists("a")
        one_sentence(caught.value)
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(UnavailableError, match="set AZURE_STORAGE_ACCOUNT_NAME"):
        open_store("az://container/pile")


def test_a_machine_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent metadata server, as in a container on EC2, is not waited for. With credentials it is not asked."""
    monkeypatch.setattr(machine_credentials, "SECONDS", 0.05)
    for name in machine_credentials.GIVEN:
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadingHTTPServer(("127.0.0.1", 0), Forbidding) as answers:
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(
            UnavailableError, match="No credentials for s3://bucket/pile were found. Set them in the env"
        ):
            open_store("s3://bucket/pile")
        for name, value in (("AWS_SKIP_SIGNATURE", "true"), ("AWS_WEB_IDENTITY_TOKEN_FILE", "/token")):
            with monkeypatch.context() as patched:
                patched.setenv(name, value)
                assert not machine_credentials.asks_the_machine("s3")
        assert machine_credentials.asks_the_machine("s3") and not machine_credentials.asks_the_machine("gs")
        threading.Thread(target=answers.handle_request, daemon=True).start()
        monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{answers.server_port}")
        monkeypatch.setattr(machine_credentials, "SECONDS", 5)
        assert machine_credentials.machine_answers()


@pytest.mark.parametrize(
    ("scheme", "variable"), [("s3", "AWS_ACCESS"), ("gs", "GOOGLE_APPLICATION"), ("az", "AZURE_STORAGE")]
)
def test_missing_credentials_are_named_as_the_provider_names_them(scheme: str, variable: str) -> None:
    error = failure(Exception("token request to 169.254.169.254"), f"{scheme}://bucket/pile")
    assert f"for example {variable}" in str(error) and f"{variable[:4]}" in str(error).partition("; ")[2]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/a", "unknown scheme ftp://: expected s3://, gs://, az://, file://, https://, http://"),
        ("s3://user:hunter2@bucket/a", "contains a user name, a password, a query or a fragment"),
        ("s3://bucket/a?X-Amz-Signature=hunter2", "contains a user name"),
        ("https://host/a#hunter2", "contains a user name"),
        ("s3://", "names no bucket"),
        ("file://", "names no folder"),
        ("file://host/a", "names no folder"),
        ("s3://bucket/a//b", "invalid address s3://bucket/a//b: expected s3://bucket/prefix"),
        ("s3://bucket/../a", "invalid address s3://bucket/../a"),
        ("s3://[bucket/a", "invalid address s3://...: expected s3://bucket/prefix"),
    ],
)
def test_addresses_that_are_refused(url: str, message: str) -> None:
    assert is_url(url)
    with pytest.raises(UsageError, match=message) as caught:
        open_store(url)
    assert "hunter2" not in str(caught.value)


def test_a_web_address_is_only_read(tmp_path: Path) -> None:
    (tmp_path / "pile").mkdir()
    (tmp_path / "pile" / "b").write_bytes(DATA)
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        web = open_store(f"http://127.0.0.1:{server.server_port}/pile")
        assert web.get("b") == DATA and web.size("b") == len(DATA) and not web.exists("c")
        for action in (lambda: web.put("c", b""), lambda: web.put_if_absent("c", b""), lambda: web.delete(["b"])):
            with pytest.raises(UsageError, match="can only be read"):
                action()
        with pytest.raises(UsageError, match="can only be read"):
            open_store(web.url, write=True)
        for action in (lambda: web.list(), lambda: web.children()):
            with pytest.raises(UsageError, match="is on a web server, which cannot list its files"):
                action()
        server.shutdown()


def test_folders_are_no_addresses() -> None:
    for folder in ("activations/pile", "/data/pile", "s3:/bucket", "C:\\data", "", None, Path("s3://bucket")):
        assert not is_url(folder)


@pytest.mark.parametrize(
    ("path", "address"),
    [
        ("s3:/bucket/pile", "s3://bucket/pile"),
        ("gs:bucket/pile", "gs://bucket/pile"),
        ("file:/data/pile", "file:///data/pile"),
        (Path("s3://bucket/pile"), "s3://bucket/pile"),
    ],
)
def test_an_address_with_too_few_slashes_is_no_folder(path: str | Path, address: str) -> None:
    for use in (folder_or_url, open_cache):
        with pytest.raises(UsageError, match=f"is not an address: expected {address}."):
            use(path)
    assert folder_or_url("runs/s3:/a") == Path("runs/s3:/a") and folder_or_url(address) == address


def test_only_the_first_of_two_writers_writes(store: ObjectStore) -> None:
    assert store.put_if_absent("claim", b"task 1")
    assert not store.put_if_absent("claim", b"task 2")
    assert store.put_if_absent("claim", b"task 1")  # a retry after a lost response finds its own object
    assert store.get("claim") == b"task 1"


def test_an_object_is_replaced_only_if_it_is_as_it_was_read(store: ObjectStore) -> None:
    store.put("manifest.json", b"1")
    assert store.replace("manifest.json", b"2", b"1") and store.get("manifest.json") == b"2"
    assert not store.replace("manifest.json", b"3", b"1") and store.get("manifest.json") == b"2"
    assert store.replace("manifest.json", b"2", b"1")  # as after an answer that was lost
    assert not store.replace("manifest", b"2", b"1") and store.find("manifest") is None


def test_an_object_that_was_deleted_since_is_not_taken_for_ones_own(bucket: str) -> None:
    """Another worker deletes the object after the write was refused and before the store reads the object."""
    store = open_store(bucket)
    store.put("commit", b"theirs")
    real = store.store

    class Deleted:
        def put(self, *arguments, **options):
            store.store = real
            try:
                real.put(*arguments, **options)
            finally:
                real.delete("commit")

    store.store = Deleted()
    assert not store.put_if_absent("commit", b"ours") and store.find("commit") is None


@pytest.mark.parametrize("ignored", ["if-none-match", "if-match", ""])
def test_a_store_that_ignores_conditions_is_found_out(proxy: FaultyProxy, bucket: str, ignored: str) -> None:
    store = open_store(f"{bucket}/pile")
    store.put("zarr.json", b"{}")
    proxy.requests.clear()
    proxy.ignored_headers = {ignored}
    if not ignored:
        store.check_conditional_writes("tokens/test")
    else:
        with pytest.raises(UnavailableError, match="pile: the store ignores the conditions of conditional writes"):
            store.check_conditional_writes("tokens/test")
    assert len(proxy.requests) <= 5 and [key for key, _ in store.list()] == ["zarr.json"]


@pytest.mark.parametrize("fault", ["500", "lost"])
@pytest.mark.parametrize("number", range(5))
def test_a_lost_answer_is_no_sign_of_a_store_that_ignores_conditions(
    proxy: FaultyProxy, bucket: str, fault: str, number: int
) -> None:
    store = open_store(f"{bucket}/pile")
    proxy.schedule = lambda request: fault if request.number == number else None
    store.check_conditional_writes("tokens/test")
    assert len(proxy.injected) == 1 and not list(store.list())


def test_another_writer_between_reading_and_replacing(bucket: str) -> None:
    store = open_store(bucket)
    store.put("manifest.json", b"1")
    real = store.store

    class Interrupted:
        def get(self, key: str):
            store.store = real
            result = real.get(key)
            real.put(key, b"other")
            return result

        put = staticmethod(real.put)

    store.store = Interrupted()
    assert not store.replace("manifest.json", b"2", b"1") and store.get("manifest.json") == b"other"


def test_a_large_object_goes_up_in_parts(
    proxy: FaultyProxy, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "PART_BYTES", 5 << 20)
    (tmp_path / "large").write_bytes(bytes(range(256)) * 50_000)
    store = open_store(bucket)
    proxy.schedule = lambda request: "500" if request.number == 2 else None
    store.put("large", tmp_path / "large")
    assert len([one for one in proxy.requests if one.method == "PUT"]) == 4  # three parts, one of which is sent twice
    assert store.get("large") == (tmp_path / "large").read_bytes()


def test_parts_of_an_object_are_read(store: ObjectStore) -> None:
    store.put("there", DATA)
    starts, lengths = [0, 10, 200_000], [4, 1, 56_000]
    assert store.get_ranges("there", starts, lengths) == [
        DATA[start : start + length] for start, length in zip(starts, lengths, strict=True)
    ]
    assert store.get_ranges("there", [], []) == []


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UnavailableError, match=r"obstore.*cannot be imported|pip install 'sae-pipeline\[remote\]'"):
        open_store("s3://bucket/pile")


class TestMirror:
    def test_pull_push_and_drop(self, store: ObjectStore, tmp_path: Path) -> None:
        mirror = Mirror(store, tmp_path / "mirror")
        names = [f"layer_12/c.{chunk}.0" for chunk in range(20)]
        for number, name in enumerate(names):
            store.put(name, bytes([number]) * 1000)
        mirror.pull([*names, *names])
        assert [(tmp_path / "mirror" / name).read_bytes() for name in names] == [bytes([n]) * 1000 for n in range(20)]
        (tmp_path / "mirror" / names[0]).write_bytes(b"own")
        mirror.pull(names)  # what is there stays
        mirror.push(names[:1])
        assert store.get(names[0]) == b"own"
        mirror.drop([*names, "absent"])
        assert not list((tmp_path / "mirror").rglob("c.*")) and store.exists(names[0])

    def test_the_first_error_ends_it(self, store: ObjectStore, tmp_path: Path) -> None:
        mirror = Mirror(store, tmp_path / "mirror")
        with pytest.raises(DamagedError, match="absent is missing"):
            mirror.pull(["absent", *(f"never there {n}" for n in range(1000))])
        with pytest.raises(UnavailableError, match="Cannot read .*absent"):
            mirror.push(["absent"])

    def test_what_arrives_damaged_is_asked_for_again(self, store: ObjectStore, tmp_path: Path) -> None:
        mirror, asked = Mirror(store, tmp_path / "mirror"), []

        def check(name: str) -> None:
            asked.append(name)
            if name == "bad" or asked == ["once"]:
                raise DamagedError(f"{name} is damaged.")

        for name in ("once", "bad", "good"):
            store.put(name, b"data")
        mirror.pull(["once"], check)
        mirror.pull(["good"], check)
        with pytest.raises(DamagedError, match="bad is damaged"):
            mirror.pull(["bad"], check)
        assert asked == ["once", "once", "good", "bad", "bad"]
        assert sorted(path.name for path in (tmp_path / "mirror").iterdir()) == ["good", "once"]


def test_the_environment_decides_about_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    assert client_options("s3")["timeout"] == "1h" and "allow_http" not in client_options("s3")
    monkeypatch.setenv("AWS_TIMEOUT", "5s")
    monkeypatch.setenv("GOOGLE_PROXY_URL", "http://proxy")
    assert client_options("s3")["timeout"] == "5s" and client_options("gs")["proxy_url"] == "http://proxy"
    assert client_options("gs")["timeout"] == "1h" and client_options("http")["allow_http"] == "true"


def test_every_address_has_a_working_folder_of_its_own() -> None:
    urls = ["s3://a/b-c", "s3://a-b/c", "gs://a/b-c", "s3://a/b/c", "file:///a/b-c"]
    folders = [working_folder(url, task) for url in urls for task in ("", "--share-1-of-2")]
    assert len({*folders}) == len(folders) and len({folder.parent for folder in folders}) == 1


@pytest.mark.parametrize(("seconds", "attempts"), [(1, 4), (70, 3), (200, 1)])
def test_there_are_four_attempts_within_three_minutes(monkeypatch, tmp_path: Path, seconds: int, attempts: int) -> None:
    """One attempt at a store that does not answer can take minutes, because obstore itself retries several times."""
    clock, begun = [0.0], []

    def read() -> None:
        begun.append(clock[0])
        clock[0] += seconds
        raise DamagedError("too short")

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with pytest.raises(DamagedError, match="too short"):
        open_store(f"file://{tmp_path}")._try(read, "zarr.json")
    assert len(begun) == attempts


def test_an_object_that_ends_before_its_end_is_damaged(tmp_path: Path) -> None:
    store = open_store(f"file://{tmp_path}/objects")
    store.store = SimpleNamespace(get=lambda key: SimpleNamespace(bytes=lambda: b"1", meta={"size": 2}))
    with pytest.raises(DamagedError, match="Received only 1 of the 2 bytes of .*objects/a"):
        store.get("a")


def test_a_file_that_is_named_twice_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, asked = open_store(f"file://{tmp_path}/objects"), []
    store.put("a", b"1")
    monkeypatch.setattr(ObjectStore, "get", lambda self, key: asked.append(key) or b"1")
    Mirror(store, tmp_path / "folder").pull(["a", "a"])
    assert asked == ["a"]


def test_after_an_error_nothing_further_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the two actions that are queued at that moment, one may already be running."""
    begun, cancelled, cancel = [], [], Future.cancel
    both = threading.Event()

    def noted(future: Future) -> bool:
        answer = cancel(future)
        cancelled.append(answer)
        if len(cancelled) == 2:
            both.set()
        return answer

    def action(number: int) -> None:
        begun.append(number)
        if number == 0:
            raise ValueError
        both.wait(1)

    monkeypatch.setattr(Future, "cancel", noted)
    with pytest.raises(ValueError):
        list(map_ahead(action, range(9), threads=1))
    assert begun in ([0], [0, 1])
