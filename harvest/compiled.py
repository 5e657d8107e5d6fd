"""`sae harvest --compile`: compile the blocks of a model with torch.compile.

Each block's `forward` is compiled, so hooks on a whole block, such as resid_post, are called outside of compiled code.
A block with a hook inside is not compiled. Shapes are compiled as dynamic, so the bits of a window do not depend on
what was computed before it. A compiled block rounds differently from an eager one.
"""

from collections.abc import Sequence

import torch

from ..cache.hooks import Hook
from ..common.errors import UsageError, first_line
from .model import LanguageModel

BACKEND = "inductor"
RECOMPILE_LIMIT = 1 << 10  # for one function of transformers, which all blocks share
MOST_APART = 0.1  # norm of the difference, relative to the norm of the activations


def compile_blocks(model: LanguageModel, hooks: Sequence[Hook]) -> None:
    """Compile the blocks that have no hook inside, and try them on a few tokens.

    Raises UsageError if the compiler of this machine fails, or if the activations differ by more than rounding.
    """
    name = type(model.model).__name__
    last = max(hook.layer for hook in hooks)
    inside = {hook.layer for hook in hooks if not hook.is_outside and model.site(hook).path}
    ids_NS = model.probe_ids()
    eager = model.capture(ids_NS, [last])[last].float()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    try:
        for layer, block in enumerate(model.blocks):
            if layer not in inside:
                block.forward = torch.compile(block.forward, dynamic=True, backend=BACKEND)
        compiled = model.capture(ids_NS, [last])[last].float()
    except Exception as error:  # the compilers of this machine raise errors of any type
        reason = first_line(getattr(error, "inner_exception", error))  # the compiler's error, not torch's wrapper
        raise UsageError(f"The blocks of {name} cannot be compiled here ({reason}). Leave out --compile.") from error
    apart = float((compiled - eager).norm() / eager.norm())
    if not apart <= MOST_APART:
        raise UsageError(
            f"The compiled blocks of {name} are wrong: their activations differ by {apart:.0%} from those of the "
            "uncompiled model. Leave out --compile."
        )
