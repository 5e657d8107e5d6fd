"""A repaired cache equals the original, byte for byte; intact files are not written."""

import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sae.cache.place import FolderPlace
from sae.cache.reader import Cache
from sae.cache.record_files import record_files
from sae.cache.removal import remove_cache
from sae.common import records
from sae.common.cache_schemas import CACHE_RECORD, COMMIT_RECORD, HARVEST_RECORD
from sae.common.errors import DamagedError, SaeError, UsageError
from sae.common.files import read_json, write_json
from sae.common.locks import writer_lock
from sae.common.records import DIGEST, UncheckedRecordWarning
from sae.common.special_tokens import BOS_OR_EOS
from sae.harvest.documents import ListedDocuments, TextSource
from sae.harvest.model import ModelSource
from sae.harvest.plan import HarvestConfig, plan_harvest
from sae.harvest.progress import HarvestProgress
from sae.harvest.repair import plan_same_harvest, repair
from sae.harvest.request import request_of
from sae.harvest.run import run_harvest


@pytest.fixture(scope="module")
def request_(tiny_model: Path, sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> HarvestConfig:
    """1,000 rows of two layers and another site in windows of 256, four contexts in a pass."""
    return HarvestConfig(
        model=str(tiny_model), dataset=str(sentences), layers=(0, 1), sites=("resid_post", "attn_z"), tokens=1000,
        context=32, window=256, held_out=0.1, device="cpu", batch_contexts=4, max_norm=3.0,
        out=tmp_path_factory.mktemp("repair") / "cache",
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(request_: HarvestConfig) -> Cache:
    return run_harvest(plan_harvest(request_))


@pytest.fixture
def folder(whole: Cache, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole.folder, tmp_path / "copy"))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}


def different(one: Path, other: Path) -> set[str]:
    ours, theirs = bytes_of(one), bytes_of(other)
    return {file for file in ours.keys() | theirs.keys() if ours.get(file) != theirs.get(file)}


def delete(path: Path) -> None:
    path.unlink()


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 16
    path.write_bytes(raw)


FILES = [
    "layer_00/c.0.0", "layer_01/c.3.0", "layer_01.attn_z/c.1.0", "layer_00.row_norm/c.2", "layer_01.moments/c.1.0.0",
    "row_ctx/c.1", "row_pos/c.3", "tokens/ids/c.0.0", "tokens/held_out/c.0",
]  # fmt: skip


DAMAGES = (delete, cut_off, flip)
# The quick tests damage each file in one way, and one file of activations in every way.
DAMAGED_FILES = [
    pytest.param(damage, file, marks=() if file == FILES[0] or (m + n) % 3 == 0 else pytest.mark.slow)
    for m, damage in enumerate(DAMAGES)
    for n, file in enumerate(FILES)
]


@pytest.mark.parametrize(("damage", "file"), DAMAGED_FILES)
def test_a_damaged_file_is_restored(whole: Cache, folder: Path, file: str, damage: Callable[[Path], None]) -> None:
    damage(folder / file)
    others = {p: p.stat().st_mtime_ns for p in folder.glob("layer_*/c.*") if p != folder / file}
    assert [sentence for sentence in repair(folder) if file in sentence]
    assert different(folder, whole.folder) == set()
    assert {p: p.stat().st_mtime_ns for p in others} == others
    assert repair(folder) == []


@pytest.mark.parametrize("array", ["layer_00.moments/c.{}.0.0", "layer_01.row_norm/c.{}", "row_ctx/c.{}"])
def test_a_side_chunk_of_another_window_is_restored(whole: Cache, folder: Path, array: str) -> None:
    shutil.copyfile(folder / array.format(1), folder / array.format(2))
    assert [sentence for sentence in repair(folder) if array.format(2) in sentence]
    assert different(folder, whole.folder) == set()


@pytest.fixture(scope="module")
def other_tokens(request_: HarvestConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder tokens/ of a cache of the same text with another seed."""
    out = tmp_path_factory.mktemp("other") / "cache"
    return run_harvest(plan_harvest(replace(request_, layers=(0,), seed=1, out=out))).folder / "tokens"


@pytest.mark.parametrize("lost", [[], ["zarr.json"]], ids=["", "without zarr.json"])
def test_the_tokens_of_another_cache_are_replaced(
    whole: Cache, folder: Path, request_: HarvestConfig, other_tokens: Path, lost: list[str]
) -> None:
    """A harvest refuses these tokens and says what to do, and that works."""
    shutil.copytree(other_tokens, folder / "tokens", dirs_exist_ok=True)
    for file in lost:  # the manifest lists the tokens too
        (folder / file).unlink()
    again = Path(shutil.copytree(folder, folder.with_name("again")))
    with pytest.raises(DamagedError, match="is not the text that this cache was .* delete .*tokens/commit.json and"):
        run_harvest(plan_harvest(replace(request_, out=again)))
    (again / "tokens" / "commit.json").unlink()
    assert run_harvest(plan_harvest(replace(request_, out=again))).layers == [0, 1]
    assert repair(folder)
    assert different(folder, whole.folder) == different(again, whole.folder) == set()


def test_a_harvest_refuses_side_arrays_of_another_window(whole: Cache, folder: Path, request_: HarvestConfig) -> None:
    """A harvest ends with statistics of the files in the commits. Deleting the file, as the message says, helps."""
    for file in ("manifest.json", "layer_00/c.3.0"):  # to the command, the cache looks half written
        (folder / file).unlink()
    shutil.copyfile(folder / "layer_01.moments/c.1.0.0", folder / "layer_01.moments/c.0.0.0")
    with pytest.raises(DamagedError, match=r"layer_01.moments/c.0.0.0 is not the file .* or delete the file"):
        run_harvest(plan_harvest(replace(request_, out=folder)))
    (folder / "layer_01.moments/c.0.0.0").unlink()
    run_harvest(plan_harvest(replace(request_, out=folder)))
    assert different(folder, whole.folder) == set()


def test_fill_values_of_earlier_versions_are_replaced(whole: Cache, folder: Path, request_: HarvestConfig) -> None:
    """The fill values were 0. Such a cache can be opened, and any writer changes the fill values to NaN."""
    parts = ("", ".row_norm", ".moments")
    floats = {f"{hook.array}{part}/zarr.json" for hook in whole.hooks for part in parts}
    for file in floats:
        write_json(folder / file, read_json(folder / file) | {"fill_value": 0.0})
    assert different(folder, whole.folder) == floats
    old = Cache(folder)
    assert old.array_digest("layer_01") == whole.array_digest("layer_01") and list(old.verify())
    added = Path(shutil.copytree(folder, folder.with_name("added")))
    site = replace(request_, layers=(0,), sites=("mlp_out",), out=added)
    assert len(run_harvest(plan_harvest(site)).hooks) == 5
    assert different(added, folder) >= {"layer_00.mlp_out/c.0.0"} and not different(added, folder) & floats
    assert repair(folder) == [] and different(folder, whole.folder) == set()


RECORDS = [
    "manifest.json",
    "zarr.json",
    "layer_01/zarr.json",
    "commits/000002.layer_01.json",
    "tokens/commit.json",
    "tokens/ids/zarr.json",
]


def count_wrong(path: Path) -> None:
    """Add one to the first number of rows, contexts or windows, or to the first dimension of a shape."""
    names = re.compile(r'("(?:rows|contexts|window|shape)": \[?\s*)(\d+)')
    path.write_text(names.sub(lambda found: f"{found[1]}{int(found[2]) + 1}", path.read_text(), count=1))


def count_wrong_unnoticed(path: Path) -> None:
    """Do the same to a record of an earlier version, which has no digest."""
    count_wrong(path)
    path.write_text(re.sub(rf',\s*"{DIGEST}": "\w*"', "", path.read_text()))


DAMAGES_OF_RECORDS: dict[str, Callable[[Path], object]] = {
    "lost": delete,
    "torn": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "changed": count_wrong,
    "changed, no digest": count_wrong_unnoticed,
}


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        pytest.param(
            file, damage, id=f"{name}-{file}", marks=() if name == "changed" or "commits" in file else pytest.mark.slow
        )
        for file in RECORDS
        for name, damage in DAMAGES_OF_RECORDS.items()
    ],
)
@pytest.mark.filterwarnings("ignore::sae.common.records.UncheckedRecordWarning")
def test_a_record_is_restored(
    whole: Cache, folder: Path, file: str, damage: Callable[[Path], None], request_: HarvestConfig
) -> None:
    damage(folder / file)
    assert repair(folder) or file == "layer_01/zarr.json"  # every writer writes this file again
    assert different(folder, whole.folder) == set()


def test_a_cache_of_an_earlier_version_gets_digests(whole: Cache, folder: Path, monkeypatch) -> None:
    """All records get a digest without harvesting a window, and nothing else is written."""
    monkeypatch.setattr(records, "_warned", False)
    for path, _ in record_files(folder):
        path.write_text(re.sub(rf',?\s*"{DIGEST}": "\w*"', "", path.read_text()))
    said: list[str] = []
    with pytest.warns(UncheckedRecordWarning, match="has no content_digest.*`sae cache repair` adds the digests"):
        assert repair(folder, HarvestProgress(say=said.append)) == []
    monkeypatch.setattr(records, "_warned", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UncheckedRecordWarning)
        assert list(Cache(folder).verify())
    assert [line for line in said if "of an earlier version now contain a digest" in line]
    assert different(folder, whole.folder) == set()


def test_what_is_repaired_reaches_the_store(whole: Cache, folder: Path, home: Path) -> None:
    """The address is on a mounted file system, which needs no server."""
    for file in ("layer_01/c.2.0", "tokens/ids/c.0.0"):
        flip(folder / file)
    assert len(repair(f"file://{folder}")) == 2
    assert different(folder, whole.folder) == set()


def test_a_cache_of_one_file_with_any_split_is_repaired(whole: Cache, folder: Path) -> None:
    """Earlier versions ignored --split for a file, and recorded it."""
    record = dict(HARVEST_RECORD.read(folder / "harvest.json")) | {"split": "nosuch"}
    HARVEST_RECORD.write(folder / "harvest.json", record)
    flip(folder / FILES[0])
    assert repair(folder) and different(folder, whole.folder) <= {"harvest.json"}


def test_a_cache_of_every_split_of_a_folder_is_repaired(request_: HarvestConfig, tmp_path: Path) -> None:
    """Earlier versions read every file of a folder and recorded the split `train`."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for split in ("train", "test"):
        shutil.copyfile(request_.dataset, texts / f"{split}{Path(request_.dataset).suffix}")
    config = replace(request_, layers=(0,), sites=("resid_post",), dataset=str(texts), split="all", out=tmp_path / "of")
    run_harvest(plan_harvest(config))
    before = bytes_of(config.out)
    record = HARVEST_RECORD.read(config.out / "harvest.json")
    HARVEST_RECORD.write(config.out / "harvest.json", {**record, "split": "train"})
    flip(config.out / FILES[0])
    assert len(repair(config.out)) == 1
    assert bytes_of(config.out) | {"harvest.json": b""} == before | {"harvest.json": b""}


def test_a_damaged_harvest_json_stays_as_it_is(folder: Path) -> None:
    """No other file records its content."""
    cut_off(folder / "harvest.json")
    before = bytes_of(folder)
    with pytest.raises(DamagedError, match="harvest.json"):
        repair(folder)
    assert bytes_of(folder) == before


def test_everything_at_once(whole: Cache, folder: Path) -> None:
    for file in FILES:
        flip(folder / file)
    for file in RECORDS:
        (folder / file).unlink()
    repair(folder)
    assert different(folder, whole.folder) == set()


def test_different_bytes_are_reported(whole: Cache, folder: Path) -> None:
    """If a window is not reproduced exactly, all of it is written again, so that its rows belong together."""
    path = folder / "commits/000001.layer_01.json"
    commit = COMMIT_RECORD.read(path)
    commit["files"]["layer_01/c.1.0"]["crc32c"] = "00000000"
    COMMIT_RECORD.write(path, commit)
    (said,) = repair(folder)
    assert said.startswith("window 1 of layer_01 was harvested again as a whole, with different bytes")
    assert different(folder, whole.folder) == set()  # only the record had been changed


def test_a_moved_model_can_be_given(folder: Path, whole: Cache, request_: HarvestConfig, tmp_path: Path) -> None:
    moved = shutil.copytree(request_.model, tmp_path / "elsewhere")
    record = HARVEST_RECORD.read(folder / "harvest.json")
    HARVEST_RECORD.write(folder / "harvest.json", record | {"model": "/gone"})
    (folder / "layer_00/c.0.0").unlink()
    with pytest.raises(UsageError, match="from the model in /gone, which no longer exists. Give .* --model"):
        repair(folder)
    assert repair(folder, model=str(moved))
    assert Cache(folder).read_chunk("layer_00", 0).tobytes() == whole.read_chunk("layer_00", 0).tobytes()


def test_another_model_or_text_is_rejected(folder: Path, tmp_path: Path, request_: HarvestConfig) -> None:
    (folder / "layer_00/c.0.0").unlink()
    text = tmp_path / "other.jsonl"
    text.write_text('{"text": "quite another text"}\n' * 100)
    with pytest.raises(UsageError, match=r"was harvested with other inputs than now \(changed: data\)"):
        repair(folder, dataset=str(text))


def test_text_that_tokenizes_differently_is_rejected(folder: Path) -> None:
    root = CACHE_RECORD.read(folder / "zarr.json")
    root["attributes"]["tokens"] = "0" * 64
    CACHE_RECORD.write(folder / "zarr.json", root)
    (folder / "tokens/length/c.0").unlink()
    with pytest.raises(SaeError, match="gives different tokens than before"):
        repair(folder)


def test_a_relative_model_path_is_recorded_as_absolute(
    request_: HarvestConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """harvest.json records where the model is, whatever the working directory was."""
    monkeypatch.chdir(Path(request_.model).parent)
    called = replace(request_, model=f"./{Path(request_.model).name}", layers=(0,), out=tmp_path / "named")
    run_harvest(plan_harvest(called))
    before = bytes_of(called.out)
    monkeypatch.chdir(tmp_path)
    (called.out / "zarr.json").unlink()
    assert repair(called.out) and bytes_of(called.out) == before


def test_the_revisions_of_the_hub_are_recorded(request_: HarvestConfig) -> None:
    """A name that is given without a commit is recorded with one, since its content on the Hub may change."""
    here = plan_harvest(request_)
    assert request_of(here)["revision"] is None and request_of(here)["dataset_revision"] is None
    source = ModelSource("google/gemma-2-2b", "google/gemma-2-2b", "c0ffee")
    text = TextSource(
        "pile", {"name": "pile", "revision": "beef", "split": "train", "column": "text"}, ListedDocuments(lambda: [])
    )
    there = request_of(replace(here, source=source, text=text))
    assert (there["revision"], there["dataset_revision"]) == ("c0ffee", "beef")


def test_arrays_are_restored_with_the_pass_size_of_their_own_commit(request_: HarvestConfig, tmp_path: Path) -> None:
    out = tmp_path / "passes"
    run_harvest(plan_harvest(replace(request_, layers=(0,), sites=("resid_post",), batch_contexts=4, out=out)))
    run_harvest(plan_harvest(replace(request_, layers=(1,), sites=("resid_post",), batch_contexts=1, out=out)))
    before = bytes_of(out)
    flip(out / "row_ctx/c.0")  # of both
    assert len(repair(out)) == 1 and bytes_of(out) == before


def test_a_cache_that_records_no_choice_of_bos_has_that_of_earlier_versions(folder: Path) -> None:
    record = dict(HARVEST_RECORD.read(folder / "harvest.json"))
    del record["bos"]
    HARVEST_RECORD.write(folder / "harvest.json", record)
    plan = plan_same_harvest(FolderPlace(folder), model=None, dataset=None, device="cpu")
    assert plan.config.bos == BOS_OR_EOS


def test_a_half_written_cache_is_not_repaired(folder: Path) -> None:
    root = CACHE_RECORD.read(folder / "zarr.json")
    root["attributes"]["complete"] = []
    CACHE_RECORD.write(folder / "zarr.json", root)
    with pytest.raises(UsageError, match="is half written. Run the same `sae harvest` again"):
        repair(folder)


def test_layers_keep_the_max_norm_of_their_own_harvest(request_: HarvestConfig, tmp_path: Path) -> None:
    out = tmp_path / "marks"
    run_harvest(plan_harvest(replace(request_, layers=(0,), sites=("resid_post",), max_norm=1.2, out=out)))
    run_harvest(plan_harvest(replace(request_, layers=(1,), sites=("resid_post",), max_norm=None, out=out)))
    before = bytes_of(out)
    assert repair(out) == [] and bytes_of(out) == before
    flip(out / "layer_01/c.1.0")
    assert repair(out) and bytes_of(out) == before


def test_a_newer_format_is_left_alone(folder: Path) -> None:
    root = read_json(folder / "zarr.json")
    root["attributes"]["format"] = 2
    write_json(folder / "zarr.json", root)
    (folder / "layer_00/c.0.0").unlink()
    before = bytes_of(folder)
    with pytest.raises(UsageError, match="was written in format 2; this version reads formats up to 1. Upgrade"):
        repair(folder)
    assert bytes_of(folder) == before


def test_a_cache_without_harvest_json_names_the_command_that_writes_it(folder: Path) -> None:
    (folder / "harvest.json").unlink()
    with pytest.raises(
        DamagedError, match="harvest.json, .* is missing. Run the same `sae harvest` again to restore it"
    ):
        repair(folder)


def test_a_folder_that_is_not_a_cache_is_rejected(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UsageError, match="is not a cache"):
        repair(tmp_path / "nothing")
    with writer_lock(folder, "sae harvest"), pytest.raises(SaeError, match="is being written by"):
        repair(folder)


def test_a_removed_cache_is_gone(folder: Path, tmp_path: Path) -> None:
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert remove_cache(folder) == pytest.approx(size, abs=200) and not folder.exists()  # the lock's note
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(UsageError, match="holds no activation cache; nothing was deleted"):
        remove_cache(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").exists()


def test_repaired_windows_use_the_same_pass_size(request_: HarvestConfig, whole: Cache, folder: Path) -> None:
    """Bytes can depend on the number of contexts in a pass, so repair uses the number in the commit of the window."""
    assert read_json(folder / "commits/000000.layer_00.json")["made_with"]["batch_contexts"] == 4
    HARVEST_RECORD.write(folder / "harvest.json", HARVEST_RECORD.read(folder / "harvest.json") | {"batch_contexts": 1})
    flip(folder / "layer_00/c.0.0")
    assert "with the same bytes" in repair(folder)[0]
