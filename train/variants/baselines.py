"""The baselines that every paper compares against."""

from ..coefficients import warmup
from ..mechanisms import DeadLatents, Threshold, UnitNormDecoder
from ..recipe import Optimization, Setting, Variant, recipe
from ..sae import SAE, BatchTopK, TopK
from ..step import Mechanism
from ..terms import L1, MSE, AuxK


@recipe("relu", paper="Bricken et al. 2023", width=1)
def relu(run: Setting, l1: float = 0.04, l1_warmup: int | None = None, pre_bias: bool = True) -> Variant:
    """ReLU latents, squared error and an L1 penalty: the standard SAE.

    `l1_warmup`: steps over which the penalty grows; None: a twentieth of the run.
    """
    return Variant(
        SAE(run.d_in, run.d_sae, pre_bias=pre_bias),
        {"mse": (1.0, MSE()), "l1": (warmup(l1, run.steps // 20 if l1_warmup is None else l1_warmup), L1())},
        [UnitNormDecoder()],
        dead=DeadLatents(run.d_sae, run.dead_tokens),
    )


def rate_by_width(d_sae: int) -> float:
    """2e-4 / sqrt(d_sae / 2^14): smaller for wider dictionaries (Gao et al. 2024)."""
    return 2e-4 / (d_sae / 2**14) ** 0.5


def auxk(run: Setting, activation: TopK | BatchTopK, aux: float, aux_k: int | None, *extra: Mechanism) -> Variant:
    """What topk and batchtopk share: no penalty, and dead latents that model the residual."""
    dead = DeadLatents(run.d_sae, run.dead_tokens)
    return Variant(
        SAE(run.d_in, run.d_sae, [activation]),
        {"mse": (1.0, MSE()), "aux": (aux, AuxK(dead, aux_k or run.d_in // 2))},
        [*extra, UnitNormDecoder()],
        Optimization(lr=rate_by_width(run.d_sae)),
        dead=dead,
    )


@recipe("topk", paper="Gao et al. 2024", equations="eq. 3, A.2")
def topk(run: Setting, k: int = 32, aux: float = 1 / 32, aux_k: int | None = None) -> Variant:
    """The k largest latents of each token; dead latents are revived by AuxK. `aux_k`: None is d_in / 2."""
    return auxk(run, TopK(k), aux, aux_k)


@recipe("batchtopk", paper="Bussmann et al. 2024")
def batchtopk(run: Setting, k: float = 32, aux: float = 1 / 32, aux_k: int | None = None) -> Variant:
    """The k largest latents a token on average over the batch; afterwards a threshold, so tokens are coded alone."""
    activation = BatchTopK(k)
    return auxk(run, activation, aux, aux_k, Threshold(activation))
