"""The baselines that every paper compares against."""

from collections.abc import Iterator

from ...common.errors import UsageError
from ..activations import BatchTopK, KeepTopK, TopK
from ..losses import L1, MSE, AuxK, MultiTopK
from ..mechanisms import AnnealK, BatchTopKThreshold, DeadLatents, UnitNormDecoder
from ..recipe import recipe
from ..sae import SAE
from ..schedules import warmup
from ..step import Mechanism
from ..variant import Optimization, RunConfig, Variant


@recipe("relu", paper="Bricken et al. 2023", width=1)
def relu(config: RunConfig, l1: float = 0.04, l1_warmup: int | None = None, pre_bias: bool = True) -> Variant:
    """ReLU latents, squared error and an L1 penalty: the standard SAE.

    `l1_warmup`: steps over which the penalty grows; None: a twentieth of the run.
    """
    return Variant(
        SAE(config.d_in, config.d_sae, pre_bias=pre_bias),
        {"mse": (1.0, MSE()), "l1": (warmup(l1, config.penalty_warmup(l1_warmup)), L1())},
        [UnitNormDecoder()],
        dead=DeadLatents(config.d_sae, config.dead_after_tokens),
    )


def rate_by_width(d_sae: int) -> float:
    """2e-4 / sqrt(d_sae / 2^14): smaller for wider dictionaries (Gao et al. 2024)."""
    return 2e-4 / (d_sae / 2**14) ** 0.5


def auxk(
    config: RunConfig,
    activation: KeepTopK,
    aux: float,
    aux_k: int | None,
    steps: int,
    start: float | None,
    *extra: Mechanism,
) -> Variant:
    """What topk and batchtopk share: no penalty, dead latents that model the residual, and a k that may be annealed."""
    begin = min(config.d_in, config.d_sae) if start is None else start
    if wrong := list(problems(config, activation.k, aux_k, steps, start, begin)):
        raise UsageError("\n".join(wrong))
    if steps:
        extra = (*extra, AnnealK(activation, begin, steps))
    dead = DeadLatents(config.d_sae, config.dead_after_tokens)
    return Variant(
        SAE(config.d_in, config.d_sae, [activation]),
        {"mse": (1.0, MSE()), "aux": (aux, AuxK(dead, max(1, config.d_in // 2) if aux_k is None else aux_k))},
        [*extra, UnitNormDecoder()],
        Optimization(lr=rate_by_width(config.d_sae)),
        dead=dead,
    )


def problems(
    config: RunConfig, k: float, aux_k: int | None, steps: int, start: float | None, begin: float
) -> Iterator[str]:
    """What is wrong with the options of `auxk`."""
    if aux_k is not None and aux_k < 1:
        yield f"aux_k={aux_k} is not positive. Without AuxK: aux=0."
    if start is not None and not steps:
        yield f"k_start={start} has no effect without k_anneal_steps: give both."
    if steps and not k <= begin <= config.d_sae:
        yield f"k cannot fall from k_start={begin} to k={k}: give a k_start from {k} to {config.d_sae}."


@recipe("topk", paper="Gao et al. 2024", equations="eq. 3, 5.3, A.2")
def topk(
    config: RunConfig,
    k: int = 32,
    aux: float = 1 / 32,
    aux_k: int | None = None,
    multi: float = 0.0,
    k_anneal_steps: int = 0,
    k_start: int | None = None,
) -> Variant:
    """The k largest latents of each token; dead latents are revived by AuxK. `aux_k`: None is d_in / 2.

    `multi`: the weight of the error with 4 k latents, Multi-TopK; the paper's is 1/8. `k_anneal_steps`: over so many
    steps k falls from `k_start` (None: d_in) to `k`.
    """
    variant = auxk(config, TopK(k), aux, aux_k, k_anneal_steps, k_start)
    if multi:
        variant.add_term("multi", multi, MultiTopK(min(4 * k, config.d_sae)))
    return variant


@recipe("batchtopk", paper="Bussmann et al. 2024")
def batchtopk(
    config: RunConfig,
    k: float = 32,
    aux: float = 1 / 32,
    aux_k: int | None = None,
    k_anneal_steps: int = 0,
    k_start: float | None = None,
) -> Variant:
    """The k largest latents a token on average over the batch; afterwards a threshold, so tokens are coded alone.

    `aux_k`: None is d_in / 2. `k_anneal_steps`: over so many steps k falls from `k_start` (None: d_in) to `k`.
    """
    activation = BatchTopK(k)
    return auxk(config, activation, aux, aux_k, k_anneal_steps, k_start, BatchTopKThreshold(activation))
