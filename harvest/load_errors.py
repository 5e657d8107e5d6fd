"""What loading a model can throw, as sentences that say what to do."""

import contextlib
import errno
from collections.abc import Iterator

from safetensors import SafetensorError

from ..common.errors import DamagedError, SaeError, UnavailableError, UsageError
from . import mini
from .dataset_reader import is_network_error


@contextlib.contextmanager
def translate_load_errors(name: str) -> Iterator[None]:
    """Turn what loading can throw into a sentence."""
    try:
        yield
    except SafetensorError as error:
        raise DamagedError(f"The weights of {name} are damaged: {error}. Get its files again.") from error
    except Exception as error:
        if sentence := load_error(error, name):
            raise sentence from error
        if not isinstance(error, (OSError, ValueError, ImportError, RuntimeError)):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnavailableError(
            f"The model {name} could not be loaded: {first} Give a Hub id, a folder, or --model {mini.NAME}."
        ) from error


def load_error(error: Exception, name: str) -> SaeError | None:
    """The sentence for a model that the Hub has not or does not give, no network, or a full disk; None for the rest.

    transformers raises an OSError for each, from the error that says which it is.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)

    def found(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    licence = f"accept its licence at https://huggingface.co/{name}, then run `hf auth login`."
    if found(GatedRepoError):
        return UnavailableError(
            f"{name} could not be loaded. It is gated: {licence} To try everything without it: --model {mini.NAME}"
        )
    if found(RepositoryNotFoundError):
        return UnavailableError(
            f"There is no model {name} on the Hub that you can read. Check the name; if it is private, run `hf auth login`. "
            f"Or give a folder, or --model {mini.NAME}."
        )
    if found(RevisionNotFoundError):
        return UsageError(f"The model {name} has no such revision. Give a commit of it with --revision.")
    if any(isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) for cause in causes):
        return UnavailableError(
            f"The model {name} could not be loaded: the disk is full. Make room, or set HF_HOME to a folder of another disk."
        )
    if found(LocalEntryNotFoundError) or any(
        isinstance(cause, Exception) and is_network_error(cause) for cause in causes
    ):
        gated = f" If it has not been done yet: {licence}" if name.startswith("google/gemma") else ""
        return UnavailableError(
            f"The model {name} could not be loaded: the Hub cannot be reached, and not all of its files are on this machine. "
            f"Check the network, and that HF_HUB_OFFLINE is not set.{gated} To try everything without it: --model {mini.NAME}"
        )
    return None
