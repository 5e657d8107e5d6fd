"""Objects behind an address such as s3://bucket/prefix: read, written and listed through obstore (extra `remote`).

s3, gs and az (Azure) can be read and written; https and http can only be read; file:///folder is a mounted file system.
All other settings come from the environment, under the names that each provider's own tools use: AWS_REGION,
AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME and so on. obstore
refreshes credentials that expire. An address that contains a credential is rejected, so that it is never recorded.

A failed request is tried again for three minutes, or up to six if the store never answers. Error messages contain the
address of the object and the store's error code, but never the request, which can contain a signature.
"""

import contextlib
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard, TypeVar
from urllib.parse import urlsplit

from ..common.addresses import SCHEMES, WRITABLE
from ..common.errors import DamagedError, UnavailableError, UsageError
from ..common.files import atomic_write, os_error
from ..common.packages import import_extra
from .machine_credentials import asks_the_machine, machine_answers
from .store_errors import MissingError, StoreWarning, TransientError, failure, without_credentials

Result = TypeVar("Result")

URL = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
WITHOUT_SLASHES = re.compile(rf"({'|'.join(SCHEMES)}):/?(?!/)", re.IGNORECASE)  # a Path turns s3:// into s3:/
PATIENCE = 180.0  # seconds after the first attempt within which further attempts begin
RETRY = {"max_retries": 10, "retry_timeout": timedelta(seconds=PATIENCE)}  # of obstore
# A timeout for whole requests would limit the size of objects on a slow link, so a request fails only after a pause
# without data.
CLIENT = {"connect_timeout": "10s", "read_timeout": "60s", "timeout": "1h"}
# Options of the HTTP client that the environment can set, for example as AWS_ALLOW_HTTP. obstore reads them only if it
# is given no options.
CLIENT_OPTIONS = (
    "allow_http",
    "allow_invalid_certificates",
    "proxy_url",
    "proxy_ca_certificate",
    "proxy_excludes",
    *CLIENT,
)
PREFIXES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
ATTEMPTS = 4  # for failures that obstore does not retry: a truncated body, a lost answer to a conditional write
PAUSE = 0.4  # seconds before the second attempt; doubled before each further one
PART_BYTES = 64 << 20  # of an upload; a chunk of activations is smaller, so it is one request
COALESCE_BYTES = 64 << 10  # largest gap between ranges that one request reads


def is_url(path: object) -> TypeGuard[str]:
    """Whether a path is an address with a scheme, such as s3://bucket/prefix, instead of a folder."""
    return isinstance(path, str) and URL.match(path) is not None


def folder_or_url(path: str | Path | None) -> str | Path | None:
    """Convert a user's path to a Path, unless it is an address, which is returned unchanged: a Path would drop one of
    its slashes. Raises UsageError for an address that has lost a slash.
    """
    if path is not None:
        check_slashes(path)
    return path if path is None or isinstance(path, Path) or is_url(path) else Path(path)


def check_slashes(path: object) -> None:
    """Raise UsageError for an address with too few slashes, since it would be taken for the name of a folder."""
    if match := WITHOUT_SLASHES.match(str(path)):
        slashes = ":///" if match[1].lower() == "file" else "://"
        raise UsageError(f"{path} is not an address: expected {match[1]}{slashes}{str(path)[match.end() :]}.")


def open_store(url: str, *, write: bool = False) -> "ObjectStore":
    """Open the objects under an address. No request is made, so a missing bucket is noticed only at the first use.

    Raises UsageError if the address is invalid, or if `write` is set and this kind of address can only be read. Raises
    UnavailableError if the extra `remote` is not installed or there is no source of credentials for s3.
    """
    address = check_url(url)
    scheme = address.split("://")[0]
    store = import_extra("remote", f"{scheme}://", "obstore.store")
    if asks_the_machine(scheme) and not machine_answers():
        raise without_credentials(address) from None
    options: dict[str, Any] = {"retry_config": RETRY, "client_options": client_options(scheme)}
    if scheme == "file":
        options = {"mkdir": True}
    try:
        opened = ObjectStore(address, store.from_url(address, **options))
    except (store.BaseError, ValueError) as error:
        raise failure(error, address) from None
    if write:
        opened.check_writable()
    return opened


def client_options(scheme: str) -> dict[str, Any]:
    """The options of the HTTP client: CLIENT, and those set in the environment."""
    prefix = PREFIXES.get(scheme)
    names = {name: f"{prefix}{name.upper()}" for name in CLIENT_OPTIONS if prefix}
    given = {name: os.environ[variable] for name, variable in names.items() if variable in os.environ}
    return CLIENT | ({"allow_http": "true"} if scheme == "http" else {}) | given


def check_url(url: str) -> str:
    """The address without a trailing slash. Raises UsageError if the address is invalid; the message repeats no
    credentials.
    """
    if (match := URL.match(url)) is None:
        raise UsageError(f"{url} is not an address: expected one such as s3://bucket/prefix.")
    scheme = match[1].lower()
    if scheme not in SCHEMES:
        raise UsageError(f"unknown scheme {scheme}://: expected {', '.join(f'{one}://' for one in SCHEMES)}.")
    try:
        parts = urlsplit(url)
    except ValueError:  # brackets, which hold an IPv6 address
        raise UsageError(f"invalid address {scheme}://...: expected {scheme}://bucket/prefix.") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError(
            f"The {scheme}:// address contains a user name, a password, a query or a fragment. Give credentials in the "
            f"environment, for example as AWS_ACCESS_KEY_ID, and the address as {scheme}://bucket/prefix."
        )
    if not parts.netloc and scheme != "file":
        raise UsageError(f"{url} names no bucket: expected {scheme}://bucket/prefix.")
    if scheme == "file" and (parts.netloc or not parts.path.strip("/")):
        raise UsageError(f"{url} names no folder: expected file:///folder.")
    if (path := parts.path.strip("/")) and {"", ".", ".."} & set(path.split("/")):
        raise UsageError(f"invalid address {url}: expected {scheme}://bucket/prefix, without //, . or .. in it.")
    return f"{scheme}://{parts.netloc}{parts.path.rstrip('/')}"


class ObjectStore:
    """The objects under one address. Keys are relative to it. Threads can share it.

    Every method raises UnavailableError if the store cannot be reached, refuses the credentials or has no such bucket.
    """

    def __init__(self, url: str, store: Any) -> None:
        self.url = url
        self.store = store  # the store object of obstore, which zarr can open too
        exceptions = import_extra("remote", url, "obstore.exceptions")
        self.errors = (exceptions.BaseError, FileNotFoundError)
        self.already_exists, self.precondition = exceptions.AlreadyExistsError, exceptions.PreconditionError
        self.is_folder = url.startswith("file:")
        self.can_list = not url.startswith(("http:", "https:"))

    def __repr__(self) -> str:
        return f"ObjectStore({self.url!r})"

    def address(self, key: str) -> str:
        """The address of an object."""
        return f"{self.url}/{key}" if key else self.url

    def get(self, key: str) -> bytes:
        """The content of an object. Raises DamagedError if the object is missing or shorter than its recorded size."""

        def read() -> bytes:
            result = self.store.get(key)
            data = bytes(result.bytes())
            self._check_length(key, len(data), result.meta["size"])
            return data

        return self._try(read, key)

    def get_to(self, key: str, path: Path) -> None:
        """Download an object to a file, which appears whole or not at all. Raises like `get`."""
        atomic_write(path, self.get(key))

    def put(self, key: str, content: bytes | memoryview | Path) -> None:
        """Write an object atomically, from bytes or a file. Replaces an existing object."""
        self.check_writable()
        if isinstance(content, Path):
            try:
                content.stat()
            except OSError as error:
                raise os_error(error, content, "read") from error
        self._try(lambda: self.store.put(key, content, chunk_size=PART_BYTES, max_concurrency=2), key)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Atomically write an object unless its key exists; returns whether the object now holds `data`.

        The answer to a successful write can be lost, so an object with the same bytes counts as written by this call.
        Writers that must be distinguished have to write different bytes.
        """
        self.check_writable()

        def write() -> bool:
            try:
                self.store.put(key, data, mode="create")
                return True
            except self.already_exists:
                return False

        return self._try(write, key) or self.find(key) == data

    def replace(self, key: str, data: bytes, seen: bytes) -> bool:
        """Atomically replace an object if it still holds `seen`; returns whether it now holds `data`. If the object is
        missing, it is not created.

        On a mounted file system (file://) the check and the write are not atomic.
        """
        self.check_writable()

        def write() -> bool:
            result = self.store.get(key)
            if bytes(result.bytes()) != seen:
                return False
            try:
                self.store.put(key, data, **({} if self.is_folder else {"mode": version_of(result.meta)}))
                return True
            except self.precondition:
                return False

        try:
            return self._try(write, key) or self.find(key) == data
        except MissingError:
            return False

    def check_conditional_writes(self, key: str) -> None:
        """Check that the store enforces the conditions of writes: "only if there is no such object" and "only if the
        object is unchanged". Raises UnavailableError if it does not. `key` is the key of a temporary object. Makes five
        requests.
        """
        if self.is_folder:
            return

        def write(data: bytes, mode: Any) -> dict[str, Any] | None:
            """The version that was written; None if the store refused the write."""

            def put() -> dict[str, Any] | None:
                try:
                    return version_of(self.store.put(key, data, mode=mode))
                except (self.already_exists, self.precondition):
                    return None

            return self._try(put, key)

        try:
            # If an answer was lost, the second attempt is refused.
            first = write(b"1", "create") or self._try(lambda: version_of(self.store.head(key)), key)
            refused = write(b"2", "create") is None and (
                (write(b"3", first) is not None or self.get(key) == b"3") and write(b"4", first) is None
            )
        finally:
            self.delete([key])
        if not refused:
            raise UnavailableError(
                f"{self.url}: the store ignores the conditions of conditional writes (If-None-Match, If-Match), so "
                "workers would overwrite each other's results. Use a store that supports them, such as S3, Google "
                "Cloud Storage, Azure, R2 or a current version of MinIO, or harvest into a folder and upload it."
            )

    def find(self, key: str) -> bytes | None:
        """The content of an object, or None if it is missing."""
        try:
            return self.get(key)
        except MissingError:
            return None

    def get_ranges(self, key: str, starts: Sequence[int], lengths: Sequence[int]) -> Sequence[bytes]:
        """Parts of an object; parts that lie close to each other are read in one request. Raises like `get`."""

        def read() -> Sequence[bytes]:
            parts = self.store.get_ranges(key, starts=starts, lengths=lengths, coalesce=COALESCE_BYTES)
            for part, length in zip(parts, lengths, strict=True):
                self._check_length(key, len(part), length)
            return [bytes(part) for part in parts]

        return self._try(read, key) if len(starts) else []

    def exists(self, key: str) -> bool:
        """Whether there is an object with this key."""
        try:
            self.size(key)
            return True
        except MissingError:
            return False

    def size(self, key: str) -> int:
        """The bytes of an object. Raises DamagedError if the object is missing."""
        return self._try(lambda: self.store.head(key)["size"], key)

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """(key, bytes) of each object in a folder such as "commits", or of all objects. The list can be out of date.

        Raises UsageError if the store is a web server, which cannot list objects.
        """
        self._check_can_list()
        found = self._try(lambda: self.store.list(prefix or None).collect(), prefix)
        return iter([(one["path"], one["size"]) for one in found])

    def children(self, prefix: str = "") -> Sequence[str]:
        """The names of the folders and objects directly in a folder, sorted. The list can be out of date.

        Raises UsageError if the store is a web server, which cannot list objects.
        """
        self._check_can_list()

        def read() -> list[str]:
            found = self.store.list_with_delimiter(prefix or None)
            return sorted(path.rsplit("/", 1)[-1] for path in [*found["common_prefixes"], *paths(found["objects"])])

        return self._try(read, prefix)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects. A key without an object is not an error."""
        self.check_writable()
        keys = list(keys)
        for some in [[key] for key in keys] if self.is_folder else [keys] if keys else []:
            self._try(partial(self._delete, some), some[0])

    def _delete(self, keys: Sequence[str]) -> None:
        with contextlib.suppress(FileNotFoundError):  # raised only if the store is a folder; ends the deletion
            self.store.delete(keys)

    def check(self) -> None:
        """Raise UnavailableError unless the bucket exists and may be listed. Makes one request."""
        self._try(lambda: next(iter(self.store.list(None, chunk_size=1)), None), "")

    def check_writable(self) -> None:
        """Raise UsageError if this kind of address can only be read. Makes no request."""
        scheme = self.url.split("://")[0]
        if scheme not in WRITABLE:
            writable = ", ".join(f"{one}://" for one in WRITABLE)
            raise UsageError(f"{self.url} can only be read. To write, use one of {writable}.")

    def _check_can_list(self) -> None:
        if not self.can_list:
            raise UsageError(
                f"{self.url} is on a web server, which cannot list its files. Give the address of a cache."
            )

    def _check_length(self, key: str, length: int, expected: int) -> None:
        if length != expected:
            raise DamagedError(f"Received only {length:,} of the {expected:,} bytes of {self.address(key)}. Try again.")

    def _try(self, action: Callable[[], Result], key: str) -> Result:
        """Run a request. After a failure that may be temporary, try again: ATTEMPTS times at most, within PATIENCE."""
        started = time.monotonic()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return action()
            except DamagedError as error:  # too short
                problem: Exception = error
            except self.errors as error:
                problem = failure(error, self.address(key))
                if not isinstance(problem, TransientError):
                    raise problem from None
            if attempt == ATTEMPTS or time.monotonic() - started >= PATIENCE:
                break
            if attempt == 1 and isinstance(problem, TransientError):
                warnings.warn(f"{self.url}: {problem.what}. Trying again.", StoreWarning, stacklevel=2)
            time.sleep(PAUSE * 2 ** (attempt - 1))
        raise problem from None


def version_of(written: Mapping[str, Any]) -> dict[str, Any]:
    """The version for a conditional write: S3 and Azure compare the ETag of the content, and Google Cloud Storage
    compares the object's generation.
    """
    return {name: written[name] for name in ("e_tag", "version") if written[name] is not None}


def paths(objects: Iterable[Any]) -> list[str]:
    return [one["path"] for one in objects]
