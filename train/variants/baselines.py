"""The baselines that every paper compares with: ReLU with L1, TopK and BatchTopK."""

from ...common.errors import UsageError
from ..activation_functions import BatchTopK, KeepTopK, TopK
from ..losses import L1, MSE, AuxK, MultiTopK
from ..mechanisms import AnnealK, BatchTopKThreshold, DeadLatents, UnitNormDecoder
from ..optimization import Optimization
from ..recipe import recipe
from ..sae import SAE
from ..schedules import warmup
from ..step import Mechanism
from ..variant import RunConfig, Variant

AUX_OPTIONS = {"aux_k": ("aux", (0,))}  # aux_k has no effect if AuxK is off


@recipe("relu", paper="Bricken et al. 2023", width=1)
def relu(config: RunConfig, l1: float = 0.04, l1_warmup: int | None = None, pre_bias: bool = True) -> Variant:
    """ReLU latents, squared error and an L1 penalty: the standard SAE.

    Args:
        l1: Strength of the L1 penalty.
        l1_warmup: Steps over which the L1 penalty rises from zero. None: a twentieth of the run.
        pre_bias: Subtract b_dec from the encoder's input.
    """
    return Variant(
        SAE(config.d_in, config.d_sae, pre_bias=pre_bias),
        {"mse": (1.0, MSE()), "l1": (warmup(l1, config.penalty_warmup(l1_warmup)), L1())},
        [UnitNormDecoder()],
        dead=DeadLatents(config.d_sae, config.dead_after_tokens),
    )


def lr_for_width(d_sae: int) -> float:
    """2e-4 / sqrt(d_sae / 2^14): smaller for wider dictionaries (Gao et al. 2024)."""
    return 2e-4 / (d_sae / 2**14) ** 0.5


def topk_variant(
    config: RunConfig,
    activation: KeepTopK,
    aux: float,
    aux_k: int | None,
    k_anneal_steps: int,
    k_start: float | None,
    *mechanisms: Mechanism,
) -> Variant:
    """The variant for `topk` and `batchtopk`: no penalty, AuxK for dead latents, and optional annealing of k."""
    start = min(config.d_in, config.d_sae) if k_start is None else k_start
    k, errors = activation.k, []
    if aux_k is not None and aux_k < 1:
        errors.append(f"invalid aux_k={aux_k}: expected 1 or more. To turn AuxK off set aux=0.")
    if k_start is not None and not k_anneal_steps:
        errors.append(f"k_start={k_start} has no effect without k_anneal_steps: set both.")
    if k_anneal_steps and not k <= start <= config.d_sae:
        errors.append(f"k cannot fall from k_start={start} to k={k}: set k_start from {k} to {config.d_sae}.")
    if errors:
        raise UsageError("\n".join(errors))
    if k_anneal_steps:
        mechanisms = (*mechanisms, AnnealK(activation, start, k_anneal_steps))
    dead = DeadLatents(config.d_sae, config.dead_after_tokens)
    return Variant(
        SAE(config.d_in, config.d_sae, [activation]),
        {"mse": (1.0, MSE()), "aux": (aux, AuxK(dead, max(1, config.d_in // 2) if aux_k is None else aux_k))},
        [*mechanisms, UnitNormDecoder()],
        Optimization(lr=lr_for_width(config.d_sae)),
        dead=dead,
    )


@recipe("topk", paper="Gao et al. 2024", equations="eq. 3, 5.3, A.2", switched_off=AUX_OPTIONS)
def topk(
    config: RunConfig,
    k: int = 32,
    aux: float = 1 / 32,
    aux_k: int | None = None,
    multi: float = 0.0,
    k_anneal_steps: int = 0,
    k_start: int | None = None,
) -> Variant:
    """The k largest latents of each token; AuxK revives dead latents.

    Args:
        k: Active latents per token.
        aux: Weight of AuxK, which trains dead latents to model the residual (A.2).
        aux_k: Dead latents that AuxK uses per token. None: d_in / 2.
        multi: Weight of Multi-TopK, the error with 4 k latents (5.3). 0: off. The paper uses 1/8.
        k_anneal_steps: Steps over which k falls from `k_start` to `k`. 0: k is constant.
        k_start: k at the first step of the annealing. None: d_in.
    """
    variant = topk_variant(config, TopK(k), aux, aux_k, k_anneal_steps, k_start)
    if multi:
        variant.add_term("multi", multi, MultiTopK(min(4 * k, config.d_sae)))
    return variant


@recipe("batchtopk", paper="Bussmann et al. 2024", switched_off=AUX_OPTIONS)
def batchtopk(
    config: RunConfig,
    k: float = 32,
    aux: float = 1 / 32,
    aux_k: int | None = None,
    k_anneal_steps: int = 0,
    k_start: float | None = None,
) -> Variant:
    """The k largest latents per token, on average over a batch.

    The B * k largest latents in a batch of B tokens are kept. After training, a threshold replaces this selection, so
    that each token is encoded independently.

    Args:
        k: Active latents per token, on average over the batch.
        aux: Weight of AuxK, which trains dead latents to model the residual.
        aux_k: Dead latents that AuxK uses per token. None: d_in / 2.
        k_anneal_steps: Steps over which k falls from `k_start` to `k`. 0: k is constant.
        k_start: k at the first step of the annealing. None: d_in.
    """
    activation = BatchTopK(k)
    return topk_variant(config, activation, aux, aux_k, k_anneal_steps, k_start, BatchTopKThreshold(activation))
