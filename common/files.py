"""Atomic and durable file writes, JSON and TOML, and the sizes of folders.

Every file of a cache or a run folder is written with `atomic_write`: under a temporary name, flushed to disk, renamed.
So a kill at any instant leaves the old file, the new file or neither, plus at most a stray temporary file
(`temporary_path`), which `remove_stale_files` deletes.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .addresses import disk_path
from .errors import DamagedError, UnavailableError, UsageError
from .open_files import OUT_OF_FILES, describe_files_limit

# --- writing ---------------------------------------------------------------------------------------------------------

WRITE_ATTEMPTS = 3
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
TEMPORARY = re.compile(r"\.tmp-([0-9]{1,10})(?:-[0-9a-f]{8})?")


def atomic_write(path: Path, *parts: bytes | memoryview) -> None:
    """Write the concatenated parts to `path`, all or nothing; the file is on disk when this returns.

    Raises UnavailableError if the disk is full or not writable.
    """
    _write_temporary(path, parts, os.replace)


def atomic_create(path: Path, *parts: bytes | memoryview) -> bool:
    """Write like `atomic_write`, but only if `path` does not exist yet. Returns whether this call created the file. Of
    concurrent calls, only one creates it.

    On a file system without hard links, such as exFAT, two calls in the same instant can both return True.
    """
    try:
        _write_temporary(path, parts, _link)
    except FileExistsError:
        return False
    return True


def _link(temporary: Path, path: Path) -> None:
    """Give a file a second name, which must not exist yet, and remove the first name."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, "File exists", str(path)) from None
        os.replace(temporary, path)
    else:
        temporary.unlink()


def _write_temporary(path: Path, parts: Sequence[bytes | memoryview], publish: Callable[[Path, Path], None]) -> None:
    """Write and flush a temporary file, then give it its final name. Raises FileExistsError if `publish` does."""
    for attempt in range(WRITE_ATTEMPTS):
        temporary = temporary_path(path)
        try:
            make_folder(path.parent)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            try:
                for part in parts:
                    remaining = memoryview(part).cast("B")
                    while remaining:
                        remaining = remaining[os.write(descriptor, remaining) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            publish(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if isinstance(error, FileExistsError) and path.exists():
                raise
            # Another process mistook this process for dead and removed its temporary file (`remove_stale_files`).
            if not isinstance(error, FileNotFoundError) or attempt == WRITE_ATTEMPTS - 1:
                raise os_error(error, path) from error
        else:
            break
    fsync_folder(path.parent)


def temporary_path(path: Path) -> Path:
    """The name under which a file is written: `<name>.tmp-<process id>-<random hex>`.

    Processes in two containers can have the same id, and two threads of a process can write the same file.
    """
    return path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def temporary_process(path: Path) -> int | None:
    """The id of the process that wrote the temporary file `path`; None if `path` is not a temporary file.

    Names of the earlier form `<name>.tmp-<process id>` are recognized too.
    """
    match = TEMPORARY.fullmatch(path.suffix)
    return int(match[1]) if match else None


def os_error(error: OSError, path: Path | str, verb: str = "write") -> UnavailableError:
    """The UnavailableError that explains why `path` could not be written (if `verb` is "read": could not be read)."""
    if error.errno in OUT_OF_FILES:
        return UnavailableError(
            f"Too many files are open: {path} could not be opened. {describe_files_limit()} Raise the limit and run "
            "the same command again; everything committed is safe."
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UnavailableError(
            f"The disk is full: {path} could not be written. "
            "Free some space and run the same command again; everything committed is safe."
        )
    return UnavailableError(
        f"Cannot write {path}: {error.strerror or error}. Check the folder's permissions and that it is not read-only."
        if verb == "write"
        else f"Cannot read {path}: {error.strerror or error}. Check its permissions and the disk."
    )


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise UnavailableError if reading `path` raises OSError. This error does not mean that the file is damaged: it is
    also raised if, for example, too many files are open.
    """
    try:
        yield
    except OSError as error:
        raise os_error(error, path, "read") from error


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, each flushed so that it survives a power cut.

    Raises OSError (FileExistsError or NotADirectoryError if a file is in the way).
    """
    if not folder.exists():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


def fsync_folder(folder: Path) -> None:
    """Flush a folder, so that renames in it survive a power cut. Ignores file systems that refuse to flush folders.

    Raises UnavailableError if too many files are open.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:  # some network file systems refuse
        if error.errno in OUT_OF_FILES:
            raise os_error(error, folder) from error


def remove_stale_files(folder: Path) -> int:
    """Delete the temporary files that killed writers left under `folder`; returns how many.

    The caller must hold the folder's lock.
    """
    stale = [p for p in folder.rglob("*.tmp-*") if temporary_process(p) is not None and p.is_file()]
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


def remove(path: Path) -> None:
    """Delete a file, or a folder with everything in it. Files in the folder that cannot be deleted are skipped."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def utf8_path(path: Path) -> Iterator[str]:
    """A UTF-8 path of an existing file, for libraries such as safetensors that cannot open other paths.

    Raises OSError if the file cannot be opened.
    """
    with path.open("rb") as file:
        is_utf8 = str(path).encode(errors="replace").decode() == str(path)
        yield str(path) if is_utf8 else f"/dev/fd/{file.fileno()}"


# --- JSON and TOML ---------------------------------------------------------------------------------------------------

MAX_TOML = 1 << 18  # bytes; a configuration with every flag has about 10,000
MAX_DOTS_PER_LINE = 200
DELETE_HINT = "Delete it and run the command that wrote it again."


def read_file(path: Path, remedy: str = DELETE_HINT) -> bytes:
    """The bytes of a file.

    Raises DamagedError with the remedy if `path` is missing or is not a file, and UnavailableError if it cannot be
    read now because of permissions, too many open files, or a failing disk.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing. {remedy.replace('Delete it and run', 'Run', 1)}") from None
    except (IsADirectoryError, NotADirectoryError) as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror}. {remedy}") from error
    except OSError as error:
        raise os_error(error, path, "read") from error


def parse_json(data: bytes | str, source: Path | str, remedy: str = DELETE_HINT) -> Any:
    """Parse JSON. The error message names `source` as the place that `data` comes from.

    Raises DamagedError with the remedy if `data` is not UTF-8 or not JSON, is nested too deeply, or has an integer of
    thousands of digits.
    """
    try:
        return json.loads(data)
    except RecursionError:
        problem = "nested too deeply"
    except ValueError as error:
        problem = str(error)
    raise DamagedError(f"{source} cannot be read ({problem}): it was truncated or overwritten. {remedy}")


def parse_toml(data: bytes | str, source: Path | str) -> dict[str, Any]:
    """Parse TOML that a user gave. The error message names `source` as the place that `data` comes from.

    Raises UsageError if `data` is not UTF-8 or not TOML, is nested too deeply, has an integer of thousands of digits,
    or would take more than a few seconds to parse.
    """
    if len(data) > MAX_TOML:
        raise UsageError(f"{source} is too long: expected at most {MAX_TOML:,} bytes of TOML.")
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")  # some editors write a byte order mark
        if any(line.count(".") > MAX_DOTS_PER_LINE for line in text.splitlines()):
            problem = f"a line has more than {MAX_DOTS_PER_LINE} dots"  # the time is quadratic in the number of dots
        else:
            return tomllib.loads(text)
    except UnicodeDecodeError:
        problem = "the file is not UTF-8"
    except RecursionError:
        problem = "nested too deeply"
    except ValueError as error:
        problem = str(error)
    raise UsageError(f"{source} is not valid TOML: {problem}.")


def read_json(path: Path) -> Any:
    """The content of a JSON file. Records of this package are read by `records.RecordKind` instead.

    Raises DamagedError if the file is missing or not JSON, UnavailableError if it cannot be read now.
    """
    return parse_json(read_file(path), path)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file without a digest, atomically. Raises UnavailableError if the disk is full or not writable."""
    atomic_write(path, (json.dumps(content, indent=2) + "\n").encode())


def digest_of(content: Any) -> str:
    """sha256 (hex) of the canonical JSON of `content`: sorted keys, no whitespace."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# --- folders and space -----------------------------------------------------------------------------------------------


def sae_home() -> Path:
    """The folder that holds `activations/` and `runs/`: $SAE_HOME, or the working directory.

    Raises UsageError if SAE_HOME is an address.
    """
    return disk_path(os.environ.get("SAE_HOME", "."), "SAE_HOME")


def folder_bytes(folder: Path) -> int:
    """Total bytes of the files under `folder`; 0 if it does not exist. Files that vanish meanwhile are skipped."""
    size = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += os.stat(os.path.join(parent, name)).st_size
    return size


def existing_parent(folder: Path) -> Path:
    """`folder` if it exists, otherwise its nearest existing parent."""
    while not folder.exists():
        folder = folder.parent
    return folder


def free_space(folder: Path) -> int:
    """Free bytes on the disk that holds, or will hold, `folder`."""
    return shutil.disk_usage(existing_parent(folder)).free
