"""A recipe for this comparison: a plain top-k within groups, which is paper 000's winner-take-all without its other
mechanisms."""

from sae.common.errors import UsageError
from sae.train.activation_functions import ReLU, activation_chain
from sae.train.losses import MSE, AuxK
from sae.train.mechanisms import DeadLatents, UnitNormDecoder
from sae.train.optimization import Optimization
from sae.train.recipe import recipe
from sae.train.sae import SAE
from sae.train.variant import RunConfig, Variant
from sae.train.variants.baselines import lr_for_width
from sae.train.variants.collapse.groups import WinnerTakeAll


@recipe("group-topk", paper="benchmarks/papers", width=1)
def group_topk(config: RunConfig, l0: float = 32, groups: int = 16, aux: float = 1 / 32) -> Variant:
    """`topk` whose latents compete within equal groups: each group keeps its l0 / groups largest.

    Args:
        l0: Latents kept per token, a multiple of `groups`.
        groups: Equal groups of contiguous latents.
        aux: Weight of AuxK, which trains dead latents to model the residual.
    """
    if l0 % groups or config.d_sae % groups:
        raise UsageError(f"l0={l0:g} and {config.d_sae} latents have to be multiples of groups={groups}.")
    winners = WinnerTakeAll(config.d_sae, groups, int(l0) // groups, inhibition="off")
    dead = DeadLatents(config.d_sae, config.dead_after_tokens)
    return Variant(
        SAE(config.d_in, config.d_sae, activation_chain([ReLU(), winners])),
        {"mse": (1.0, MSE()), "aux": (aux, AuxK(dead, max(1, config.d_in // 2)))},
        [UnitNormDecoder()],
        Optimization(lr=lr_for_width(config.d_sae)),
        dead=dead,
    )
