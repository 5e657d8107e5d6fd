"""The limit on a process's open files: raise it where allowed, and explain it when it is reached.

Every memory map of a chunk keeps a file open. The usual soft limit is 1,024 on Linux and 256 on macOS.
"""

import contextlib
import errno
from collections.abc import Iterator

from .errors import Interrupted, UnavailableError

OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)
ENOUGH_FILES = 4096


def files_limits() -> tuple[int, int]:
    """The number of files that this process may have open, and the highest value to which it may raise this limit."""
    try:
        import resource
    except ImportError:  # Windows
        return ENOUGH_FILES, ENOUGH_FILES
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (ENOUGH_FILES if limit == resource.RLIM_INFINITY else limit for limit in limits)
    return soft, max(soft, hard)


def raise_files_limit() -> None:
    """Raise this process's limit to ENOUGH_FILES, or as close to it as the system allows."""
    soft, hard = files_limits()
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        if soft < min(hard, ENOUGH_FILES):
            _, unchanged = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, ENOUGH_FILES), unchanged))


def describe_files_limit() -> str:
    """A sentence about the limit and where it is set."""
    limit = files_limits()[0]
    return f"The limit is {limit} open files: `ulimit -n` shows it, and `ulimit -n {ENOUGH_FILES}` raises it."


def ran_out_of_files(error: BaseException) -> bool:
    """Whether too many open files caused an error, directly or wrapped in an error of a library."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in OUT_OF_FILES:
            return True
        if "Too many open files" in str(chain):  # from a library in Rust or C++, without an errno
            return True
        chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)
    return False


@contextlib.contextmanager
def explaining_files_limit() -> Iterator[None]:
    """Turn any error about too many open files into UnavailableError, with the limit in its message."""
    try:
        yield
    except (Interrupted, UnavailableError):
        raise
    except Exception as error:
        if not ran_out_of_files(error):
            raise
        raise UnavailableError(
            f"Too many files are open. {describe_files_limit()} Raise the limit and run the same command again; "
            "everything committed is safe."
        ) from error
