"""Tell transformers that every context is one sequence.

If transformers is given positions but no mask, it searches the positions for several sequences in one context, and the
host waits for the GPU to read the result. In this package, every context has a single sequence of positions.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from transformers import masking_utils

FINDER = "find_packed_sequence_indices"
_whole: ContextVar[bool] = ContextVar("whole", default=False)  # per thread


@contextlib.contextmanager
def whole_contexts() -> Iterator[None]:
    """A context manager: in this thread, transformers does not check whether a context has several sequences."""
    find = getattr(masking_utils, FINDER, None)  # internal to transformers: if missing, there is nothing to avoid
    if find is not None and not hasattr(find, "__wrapped__"):
        setattr(masking_utils, FINDER, unless_whole(find))
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


def unless_whole(find: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(find)
    def found(*args: Any, **keywords: Any) -> Any:
        return None if _whole.get() else find(*args, **keywords)

    return found
