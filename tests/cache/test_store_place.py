"""Several machines that write one cache in a store, each with its own working folder: nothing is lost or mixed."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from sae.cache.contexts import Contexts
from sae.cache.object_store import ObjectStore, open_store
from sae.cache.opening import open_cache
from sae.cache.place import FolderPlace, claim_file
from sae.cache.reader import Cache
from sae.cache.store_place import StorePlace, check_address
from sae.cache.writer import CacheWriter
from sae.common.errors import DamagedError, UnavailableError, UsageError

from ..faulty_proxy import faulty_proxy

ROWS, D = 40, 8  # three windows of 16


@pytest.fixture
def store(bucket: str) -> ObjectStore:
    return open_store(f"{bucket}/pile")


@pytest.fixture
def worker(store: ObjectStore, tmp_path: Path, tiny_cache: Cache, make_writer):
    """worker(name, {layer: bits}) returns the writer of a machine that has begun to harvest into the store."""

    def begin(name: str, bits: dict[int, np.ndarray]) -> CacheWriter:
        folder = tmp_path / name
        local = make_writer(folder, bits, 16)
        writer = CacheWriter(folder, local.identity, local.layout, local.widths, StorePlace(store, folder))
        shutil.copy(tiny_cache.folder / "harvest.json", folder)
        writer.place.begin()
        return writer

    return begin


def assert_whole(store: ObjectStore, layers: list[int]) -> Cache:
    cache = open_cache(store.url)
    assert cache.layers == layers and len(list(cache.verify())) == len(cache.manifest["files"])
    return cache


@pytest.mark.parametrize(
    ("step", "other"),
    [
        ("publish", "other bytes"),
        ("create_commit", "the same bytes"),
        pytest.param("publish", "the same bytes", marks=pytest.mark.slow),
        pytest.param("create_commit", "other bytes", marks=pytest.mark.slow),
    ],
)
def test_two_machines_at_one_window_leave_the_objects_of_one(
    store: ObjectStore, worker, finite_bits, write_windows, monkeypatch: pytest.MonkeyPatch, step: str, other: str
) -> None:
    """The second machine commits all windows before a step of the first. Their GPUs may compute different bytes."""
    first = {5: finite_bits(ROWS, D, 5)}
    second = first if other == "the same bytes" else {5: finite_bits(ROWS, D, 6)}
    writer, original = worker("first", first), getattr(StorePlace, step)

    def interrupted(self, *arguments):
        monkeypatch.setattr(StorePlace, step, original)
        write_windows(worker("second", second), second, [0, 1, 2])
        return original(self, *arguments)

    monkeypatch.setattr(StorePlace, step, interrupted)
    write_windows(writer, first, [0, 1, 2])
    assert writer.seal()
    cache = assert_whole(store, [5])
    assert np.array_equal(cache.read_chunk("layer_05", 1), second[5][16:32])
    assert not list(writer.folder.glob("*/c.*")) and writer.missing_windows() == {}


@pytest.mark.parametrize("step", [pytest.param("seal", marks=pytest.mark.slow), "_seal_root"])
def test_layers_that_are_sealed_at_once_are_both_there(
    store: ObjectStore, worker, finite_bits, write_windows, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The second machine seals layer 12 before the manifest of the first, or between its manifest and its zarr.json."""
    bits = {5: finite_bits(ROWS, D, 5), 12: finite_bits(ROWS, D, 12)}
    writer, original = worker("first", {5: bits[5]}), getattr(StorePlace, step)
    write_windows(writer, {5: bits[5]}, [0, 1, 2])

    def interrupted(self, *records):
        monkeypatch.setattr(StorePlace, step, original)
        second = worker("second", {12: bits[12]})
        if step == "_seal_root":
            second.place.fetch()  # fetches the manifest of the first, as another machine would
            second = CacheWriter(second.folder, second.identity, second.layout, second.widths, second.place)
        write_windows(second, {12: bits[12]}, [0, 1, 2])
        assert second.seal()
        return original(self, *records)

    monkeypatch.setattr(StorePlace, step, interrupted)
    assert writer.seal()
    cache = assert_whole(store, [5, 12])
    assert set(cache.manifest["statistics"]) == {"layer_05", "layer_12"}


def test_sealing_again_writes_nothing(
    store: ObjectStore, worker, finite_bits, write_windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This also holds if no listing shows the objects, because commits are looked up by name."""
    bits = {5: finite_bits(ROWS, D, 5)}
    writer = worker("first", bits)
    write_windows(writer, bits, [0, 2])
    assert not writer.seal() and not store.exists("manifest.json")
    write_windows(worker("second", bits), bits, [1])
    assert writer.seal()
    before = {key: store.store.head(key)["last_modified"] for key, _ in store.list()}
    late = worker("late", bits)
    late.place.fetch()
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "list", lambda *arguments: iter(()))
        assert late.missing_windows(range(3)) == {} and late.seal() and writer.seal()
    assert {key: store.store.head(key)["last_modified"] for key, _ in store.list()} == before


def test_a_store_that_never_keeps_still_ends_in_a_sentence(
    worker, finite_bits, write_windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = {5: finite_bits(ROWS, D, 5)}
    writer = worker("first", bits)
    write_windows(writer, bits, [0, 1, 2])
    monkeypatch.setattr(ObjectStore, "replace", lambda *arguments: False)
    with pytest.raises(UnavailableError, match="Other processes keep changing .*. Run the same command again"):
        writer.seal()


def test_what_proves_others_comes_after_them(
    worker, finite_bits, write_windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order is tokens, their record, zarr.json; chunks, their commit; the manifest, and zarr.json again."""
    written, bits = [], {5: finite_bits(ROWS, D, 5)}
    for name in ("put", "put_if_absent", "replace"):
        original = getattr(ObjectStore, name)

        def noted(store: ObjectStore, key: str, *arguments, original=original):
            answer = original(store, key, *arguments)
            written.append(key)
            return answer

        monkeypatch.setattr(ObjectStore, name, noted)
    writer = worker("first", bits)
    begun = len(written)
    write_windows(writer, bits, [0, 1, 2])
    assert writer.seal()
    tokens = [at for at, key in enumerate(written) if key.startswith("tokens/")]
    assert written[tokens[-1]] == "tokens/commit.json" and tokens[-1] < written.index("zarr.json") < begun
    for window in range(3):
        ends = f"/c.{window}", f"/c.{window}.0", f"/c.{window}.0.0"
        chunks = [at for at, key in enumerate(written) if at >= begun and key.endswith(ends)]
        assert len(chunks) == 5 and max(chunks) < written.index(f"commits/{window:06d}.layer_05.json")
    assert written[-2:] == ["manifest.json", "zarr.json"]


@pytest.fixture
def other_tokens(store: ObjectStore, tmp_path: Path, tiny_cache: Cache, make_writer, finite_bits):
    """other_tokens() returns the writer of a machine whose tokenizer splits the same text into other tokens."""

    def begin() -> CacheWriter:
        local = make_writer(folder := tmp_path / "other", {5: finite_bits(ROWS, D, 5)}, 16)
        contexts = Contexts.read(folder)
        shutil.rmtree(folder)
        dataclasses.replace(contexts, ids=contexts.ids + 1).write(folder)
        shutil.copy(tiny_cache.folder / "harvest.json", folder)
        return CacheWriter(folder, local.identity, local.layout, local.widths, StorePlace(store, folder))

    return begin


def contents(store: ObjectStore) -> dict[str, bytes]:
    return {key: store.get(key) for key, _ in store.list()}


def test_a_machine_with_other_tokens_is_refused_and_changes_nothing(
    store: ObjectStore, worker, other_tokens, finite_bits
) -> None:
    """The machine began to cut the text when the store was still empty."""
    worker("first", {5: finite_bits(ROWS, D, 5)})
    before = contents(store)
    with pytest.raises(
        DamagedError, match=f"The harvest at {store.url} was started with other tokens than the tokenizer"
    ):
        other_tokens().place.begin()
    assert contents(store) == before


@pytest.mark.parametrize(
    ("write", "moment"),
    [
        pytest.param("put", "tokens/ids/c.0.0", marks=pytest.mark.slow),
        pytest.param("put", "tokens/commit.json", marks=pytest.mark.slow),
        ("put_if_absent", "harvest.json"),
    ],
)
def test_a_machine_with_other_tokens_is_refused_while_those_of_another_are_uploaded(
    store: ObjectStore, worker, other_tokens, finite_bits, write_windows, write: str, moment: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    real, bits = getattr(ObjectStore, write), {5: finite_bits(ROWS, D, 5)}

    def interrupted(self: ObjectStore, key: str, content: bytes | Path) -> object:
        if key == moment:
            monkeypatch.setattr(ObjectStore, write, real)
            before = contents(store)
            with pytest.raises(UsageError, match="A harvest with other options or other tokens is starting at"):
                other_tokens().place.begin()
            # further files of the first machine may arrive in the meantime
            assert before.items() <= contents(store).items()
        return real(self, key, content)

    monkeypatch.setattr(ObjectStore, write, interrupted)
    writer = worker("first", bits)
    assert getattr(ObjectStore, write) is real and not store.exists("tokens/owner")
    write_windows(writer, bits, [0, 1, 2])
    assert writer.seal()
    assert_whole(store, [5])


def test_a_machine_with_other_tokens_that_comes_between_two_steps_is_refused(
    store: ObjectStore, worker, other_tokens, finite_bits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine found no zarr.json, but the first machine began before it could claim the address."""
    claim = StorePlace._claim_address

    def late(self: StorePlace, ours: Path) -> bytes | None:
        monkeypatch.setattr(StorePlace, "_claim_address", claim)
        worker("first", {5: finite_bits(ROWS, D, 5)})
        first.update(contents(store))
        return claim(self, ours)

    first: dict[str, bytes] = {}
    monkeypatch.setattr(StorePlace, "_claim_address", late)
    with pytest.raises(DamagedError, match="was started with other tokens"):
        other_tokens().place.begin()
    assert contents(store) == first


def test_a_harvest_with_other_options_is_refused_once_another_has_begun(
    store: ObjectStore, worker, finite_bits, make_writer, tmp_path: Path
) -> None:
    worker("first", {5: finite_bits(ROWS, D, 5)})
    before = contents(store)
    local = make_writer(folder := tmp_path / "second", {5: finite_bits(ROWS, D, 5)}, 16, seed=1)
    writer = CacheWriter(folder, local.identity, local.layout, local.widths, StorePlace(store, folder))
    with pytest.raises(UsageError, match=rf"{store.url} holds another harvest .*Different: seed \(0, here 1\)"):
        writer.place.begin()
    assert contents(store) == before


def test_a_store_that_ignores_conditions_is_refused_before_the_first_write(
    store: ObjectStore, worker, finite_bits, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with faulty_proxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        proxy.ignored_headers = {"if-none-match"}
        store.store = open_store(store.url).store
        with pytest.raises(UnavailableError, match="harvest into a folder and upload it"):
            worker("first", {5: finite_bits(ROWS, D, 5)})
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    assert not contents(open_store(store.url))


def test_a_working_folder_with_the_tokens_of_another_cache_gets_those_of_the_store(
    store: ObjectStore, worker, finite_bits, tmp_path: Path, make_writer
) -> None:
    worker("first", {5: finite_bits(ROWS, D, 5)})
    folder = tmp_path / "second"
    make_writer(folder, {5: finite_bits(2 * ROWS, D, 5)}, 16)  # the tokens of an earlier cache
    StorePlace(store, folder).fetch()
    for path in (tmp_path / "first" / "tokens").rglob("*"):
        if path.is_file():
            assert (folder / path.relative_to(tmp_path / "first")).read_bytes() == path.read_bytes()


def test_what_arrives_damaged_is_asked_for_again(
    store: ObjectStore, worker, finite_bits, write_windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits, get, asked = {5: finite_bits(ROWS, D, 5)}, ObjectStore.get, []
    writer = worker("first", bits)
    write_windows(writer, bits, [0, 1, 2])

    def damaged_at_first(store: ObjectStore, key: str) -> bytes:
        asked.append(key)
        data = get(store, key)
        return data[:-1] + bytes([data[-1] ^ 1]) if "/c." in key and asked.count(key) == 1 else data

    monkeypatch.setattr(ObjectStore, "get", damaged_at_first)
    assert writer.seal() and asked.count("layer_05.moments/c.1.0.0") == 2
    monkeypatch.setattr(ObjectStore, "get", get)
    assert_whole(store, [5])


def test_an_address_where_a_harvest_was_killed_early_is_its_own(store: ObjectStore) -> None:
    check_address(store, "0" * 64)
    store.put("tokens/ids/c.0.0", b"")
    store.put("harvest.json", b"{}")
    check_address(store, "0" * 64)
    store.put("cat.jpg", b"")
    with pytest.raises(UsageError, match="holds cat.jpg, but no activation cache"):
        check_address(store, "0" * 64)


def test_a_task_that_waits_for_the_text_has_it_once_another_has_begun(
    store: ObjectStore, worker, finite_bits, tmp_path: Path
) -> None:
    (tmp_path / "second").mkdir()
    waiting = StorePlace(store, tmp_path / "second")
    assert not waiting.is_begun()
    worker("first", {5: finite_bits(ROWS, D, 5)})
    assert waiting.is_begun() and Contexts.is_complete(waiting.folder)


def test_rewriting_a_window_removes_its_commit_first(
    store: ObjectStore, worker, finite_bits, write_windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = {5: finite_bits(ROWS, D, 5)}
    writer = worker("first", bits)
    write_windows(writer, bits, [0, 1, 2])
    monkeypatch.setattr(CacheWriter, "chunks_to_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_windows(writer, bits, [1], replace=True)
    assert writer.missing_windows() == {1: ["layer_05"]} and not store.exists("commits/000001.layer_05.json")


def test_a_harvest_that_another_task_begins_meanwhile_is_no_other_object(
    store: ObjectStore, worker, finite_bits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """zarr.json is not there yet, and then the list has all that the other task has uploaded."""
    begun, children = [], ObjectStore.children

    def list_what_another_has_begun(store: ObjectStore, prefix: str = "") -> object:
        begun.append(worker("other", {5: finite_bits(ROWS, D)}))
        return children(store, prefix)

    monkeypatch.setattr(ObjectStore, "children", list_what_another_has_begun)
    with pytest.raises(UsageError, match="holds another harvest"):
        check_address(store, {"seed": 1})
    check_address(store, begun[0].identity)


def test_a_claim_that_was_removed_is_not_made_again_by_renewing_it(store: ObjectStore, tmp_path: Path) -> None:
    """Another task took this one for dead, cut the text and removed all claims."""
    for place in (StorePlace(store, tmp_path), FolderPlace(tmp_path)):
        file, record = claim_file(1), {"owner": "process 1", "task": "1", "beat": 8}
        assert place.create_claim(file, record)
        for beat in (9, 10, 7):
            place.renew_claim(file, record | {"beat": beat})
            assert (place.read_claim(file) or {})["beat"] == beat
        place.remove_claims([file])
        place.renew_claim(file, record)
        assert place.claim_files() == [] and place.read_claim(file) is None
