"""`sae cache` prints, finds and repairs the same at an address as in a folder."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sae.cache.mirror import working_folder, working_folders
from sae.cache.object_store import ObjectStore, open_store
from sae.cache.opening import open_cache
from sae.cache.reader import Cache
from sae.cache.store_catalog import remove_stored_cache
from sae.cli.main import app
from sae.common.errors import DamagedError
from sae.common.locks import writer_lock

from ..faulty_proxy import faulty_proxy


@pytest.fixture
def stored(tiny_cache: Cache, bucket: str) -> ObjectStore:
    """The files of `tiny_cache` as objects."""
    store = open_store(f"{bucket}/models/pile")
    for path in tiny_cache.folder.rglob("*"):
        if path.is_file() and not path.name.startswith(".lock"):
            store.put(path.relative_to(tiny_cache.folder).as_posix(), path)
    return store


def sae(*words: object, code: int = 0, answer: str = "") -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], input=answer)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def flip(store: ObjectStore, key: str, position: int = 100) -> None:
    data = bytearray(store.get(key))
    data[position] ^= 1
    store.put(key, bytes(data))


def objects(store: ObjectStore) -> dict[str, bytes]:
    return {key: store.get(key) for key, _ in store.list()}


def test_list_info_and_verify(stored: ObjectStore, tiny_cache: Cache, bucket: str) -> None:
    line = f"{stored.url}   {tiny_cache.model}, layer 0, layer 1, 8,000 rows\n"
    for address in (f"{bucket}/models", f"{bucket}/models/", stored.url):
        assert sae("cache", "list", address) == line
    assert "no caches under" in sae("cache", "list", bucket)
    here, there = sae("cache", "info", tiny_cache.folder), sae("cache", "info", stored.url)
    assert there.splitlines()[:-1] == here.splitlines()[:-1] and "all present with the recorded sizes" in there
    assert f"{stored.url}: {len(tiny_cache.manifest['files'])} files, all checksums match" in sae(
        "cache", "verify", stored.url
    )


@pytest.mark.slow
def test_a_web_server_is_asked_for_each_file(tiny_cache: Cache) -> None:
    handler = partial(SimpleHTTPRequestHandler, directory=tiny_cache.folder.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{tiny_cache.folder.name}"
        assert "all present with the recorded sizes" in sae("cache", "info", address)
        assert "all checksums match" in sae("cache", "verify", address)
        for command in (["list"], ["rm", "--yes"], ["repair"]):
            assert "which cannot list its files" in sae("cache", *command, address, code=2).replace("\n", " ")
        server.shutdown()


@pytest.mark.parametrize(
    ("key", "command", "message"),
    [
        ("layer_01/c.2.0", "verify", "{}/layer_01/c.2.0 is not the file that the cache lists"),
        pytest.param(
            "row_ctx/c.1", "verify", "{}/row_ctx/c.1 is not the file that the cache lists", marks=pytest.mark.slow
        ),
        pytest.param(
            "commits/000001.layer_00.json", "verify", "{}/commits/000001.layer_00.json ", marks=pytest.mark.slow
        ),
        pytest.param("tokens/commit.json", "verify", "{}/tokens/commit.json ", marks=pytest.mark.slow),
        pytest.param(
            "-layer_01/c.2.0",
            "verify",
            "{}/layer_01/c.2.0 is not the file that the cache lists",
            marks=pytest.mark.slow,
        ),
        ("-layer_01/c.2.0", "info", "1 files of {} are missing or truncated: layer_01/c.2.0"),
        pytest.param("-harvest.json", "verify", "{}/harvest.json is missing", marks=pytest.mark.slow),
        pytest.param(
            "-commits/000003.layer_01.json",
            "verify",
            "{}/commits/000003.layer_01.json is missing",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_damage_is_found_at_its_address(stored: ObjectStore, key: str, command: str, message: str) -> None:
    open_cache(stored.url)  # intact copies in the local folder must not hide the damage
    if key.startswith("-"):
        stored.delete([key[1:]])
    else:
        flip(stored, key)
    output = sae("cache", command, stored.url, code=3)
    assert message.format(stored.url) in output.replace("\n", " ") and "/tmp/sae-verify" not in output


def test_a_listing_from_before_is_no_damage(
    stored: ObjectStore, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty_proxy(s3_endpoint, lambda request: "stale" if request.is_listing else None) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert "all present with the recorded sizes" in sae("cache", "info", stored.url)
        assert proxy.injected


@pytest.mark.slow
def test_verify_keeps_nothing(stored: ObjectStore, home: Path) -> None:
    sae("cache", "verify", stored.url)
    assert not list(home.rglob("layer_0*/c.*"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chunks", "tokens", "records", "root", "moments"])
def test_repair_harvests_and_uploads_what_is_damaged(stored: ObjectStore, kind: str) -> None:
    before = objects(stored)
    if kind == "chunks":
        flip(stored, "layer_01/c.2.0")
        stored.delete(["layer_00/c.0.0", "row_pos/c.3"])
    elif kind == "tokens":
        flip(stored, "tokens/ids/c.0.0")
        stored.delete(["tokens/length/c.0"])
    elif kind == "records":
        flip(stored, "manifest.json")
        flip(stored, "commits/000001.layer_00.json")
        flip(stored, "layer_01/zarr.json", 30)
        stored.delete(["tokens/commit.json"])
    elif kind == "root":
        flip(stored, "zarr.json")
    else:
        flip(stored, "layer_01.moments/c.0.0.0")
    sae("cache", "verify", stored.url, code=3)
    output = sae("cache", "repair", stored.url)
    assert "repaired" in output and str(working_folder(stored.url)) not in output
    after = objects(stored)
    assert {name for name in before if before[name] != after.get(name)} <= {"harvest.json"}
    assert "all checksums match" in sae("cache", "verify", stored.url)
    assert f"{stored.url}: no damage found" in sae("cache", "repair", stored.url)


def test_rm_asks_and_leaves_what_is_not_its_own(stored: ObjectStore) -> None:
    stored.put("notes.txt", b"mine")
    stored.put("layer_0/notes.txt", b"mine")
    stored.put("largest/000000.layer_00", b"rows")
    before = objects(stored)
    assert "nothing was deleted" in sae("cache", "rm", stored.url, answer="n\n")
    with writer_lock(working_folder(stored.url, "--share-2-of-3"), "sae harvest --share 2/3"):
        assert "is being written by process" in sae("cache", "rm", stored.url, "--yes", code=4)
    assert objects(stored) == before
    size = sum(len(data) for name, data in before.items() if "notes" not in name)
    assert f"{stored.url} deleted, {size / 1e6:.1f} MB freed" in sae("cache", "rm", stored.url, "--yes")
    assert objects(stored) == {"notes.txt": b"mine", "layer_0/notes.txt": b"mine"} and not working_folders(stored.url)
    assert "holds no activation cache; nothing was deleted" in sae("cache", "rm", stored.url, "--yes", code=2)


@pytest.mark.parametrize("moments", [(1, -1), pytest.param((1, 2, 3, 8, -2, -1), marks=pytest.mark.slow)], ids=str)
def test_a_deletion_that_is_killed_is_finished_by_the_next(
    stored: ObjectStore, monkeypatch: pytest.MonkeyPatch, moments: tuple[int, ...]
) -> None:
    """After the first deletion the address holds no cache, but its remains are recognized until the last deletion."""
    before, delete = objects(stored), ObjectStore._delete

    class Killed(BaseException):
        pass

    for moment in moments:
        number = moment % len(before)  # so many are deleted, or all but so many
        left = iter(range(number))

        def some(store: ObjectStore, keys: list[str]) -> None:
            for key in keys:
                if next(left, None) is None:  # noqa: B023
                    raise Killed
                delete(store, [key])

        for name, data in before.items():
            stored.put(name, data)
        for task in ("", "--share-1-of-2"):
            (working_folder(stored.url, task) / "tokens").mkdir(parents=True)
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(ObjectStore, "_delete", some)
            remove_stored_cache(stored)
        there = objects(stored).keys()
        assert len(there) == len(before) - number and "zarr.json" not in there and "harvest.json" in there
        if len(there) == 1:  # once the last object is gone, nothing would delete files that are left on this machine
            assert {path.name for path in working_folder(stored.url).parent.rglob("*") if path.is_file()} == {".lock"}
        remove_stored_cache(stored)
        assert not objects(stored) and not working_folders(stored.url)


def test_other_programs_read_the_same_address(stored: ObjectStore, tiny_cache: Cache, s3_endpoint: str) -> None:
    """zarr-python reads through obstore, and tensorstore through its own client; neither uses this package."""
    import numpy as np
    import tensorstore
    import zarr

    group = zarr.open_group(zarr.storage.ObjectStore(stored.store, read_only=True), mode="r")
    rows = np.concatenate([tiny_cache.read_chunk("layer_01", n) for n in range(len(tiny_cache.chunk_rows))])
    assert np.array_equal(group["layer_01"][:].view(np.uint16), rows)
    assert np.array_equal(group["layer_01.row_norm"][:], tiny_cache.row_norms("layer_01"))
    bucket, path = stored.url.removeprefix("s3://").split("/", 1)
    place = {"driver": "s3", "bucket": bucket, "path": f"{path}/layer_01/", "endpoint": s3_endpoint}
    spec = {"driver": "zarr3", "kvstore": place | {"aws_region": "us-east-1"}}
    assert np.array_equal(tensorstore.open(spec, read=True).result().read().result().view(np.uint16), rows)


def test_another_zarr_group_is_named_and_left_alone(bucket: str) -> None:
    store = open_store(f"{bucket}/group")
    store.put("zarr.json", b'{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    store.put("layer_0/c.0.0", b"not ours")
    assert f"{store.url} is a Zarr group, but not an activation cache" in sae("cache", "info", store.url, code=2)
    assert "holds no activation cache; nothing was deleted" in sae("cache", "rm", store.url, "--yes", code=2)
    assert set(objects(store)) == {"zarr.json", "layer_0/c.0.0"}


def test_a_cache_that_is_not_there(bucket: str) -> None:
    for command in ("info", "verify", "repair"):
        assert f"{bucket}/none holds no activation cache" in sae("cache", command, f"{bucket}/none", code=2)
    with pytest.raises(DamagedError, match="is missing"):
        open_store(bucket).get("none")
