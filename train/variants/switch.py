"""Switch SAE (Mudide et al. 2024): the latents are divided into experts, and a router sends each token to one.

    p     = softmax((x - b_router) W_router),     e = argmax p
    f     = TopK(p_e ReLU(z)) among the latents of expert e
    L     = |x - x_hat|^2 + balance E sum_j F_j P_j

F_j is the share of tokens sent to expert j, and P_j is the expert's mean probability. The sum is smallest, 1/E, if all
experts have equal shares. The encoder is computed for every expert, so routing saves work neither here nor in the
authors' code.
"""

import torch
from torch import Tensor, nn

from ...common.errors import UsageError
from ..activation_functions import Activation
from ..losses import MSE
from ..mechanisms import DeadLatents, UnitNormDecoder
from ..optimization import Optimization
from ..recipe import recipe
from ..sae import SAE
from ..step import LossTerm, Step
from ..variant import RunConfig, Variant
from .baselines import lr_for_width


class Switch(Activation, name="switch"):
    """TopK within the expert to which a token is routed.

    The expert's latents are multiplied by the router's probability.
    """

    sees_input = True

    def __init__(self, d_in: int, experts: int, k: int) -> None:
        super().__init__(d_in=d_in, experts=experts, k=k)
        self.experts, self.k = experts, k
        self.W_router = nn.Parameter(torch.randn(d_in, experts) / d_in**0.5)
        self.b_router = nn.Parameter(torch.zeros(d_in))

    def probabilities(self, x_BD: Tensor) -> Tensor:
        """p (B, E)."""
        return (x_BD @ self.W_router - self.b_router @ self.W_router).float().softmax(-1)

    def forward(self, z_BF: Tensor, x_BD: Tensor) -> Tensor:
        p_B, expert_B = self.probabilities(x_BD).max(-1)
        z_BES = z_BF.unflatten(-1, (self.experts, -1)).relu()
        at_B11 = expert_B[..., None, None]
        z_BS = z_BES.take_along_dim(at_B11, dim=-2).squeeze(-2) * p_B[..., None]
        top = z_BS.topk(self.k, dim=-1, sorted=False)
        f_BS = torch.zeros_like(z_BS).scatter(-1, top.indices, top.values)
        chosen_BE1 = torch.arange(self.experts, device=z_BF.device)[:, None] == at_B11
        return (f_BS[..., None, :] * chosen_BE1).flatten(-2)

    def rescale_(self, factor: float) -> None:
        self.W_router.div_(factor)
        self.b_router.mul_(factor)

    def recenter_(self, mean_D: Tensor) -> None:
        self.b_router.add_(mean_D)


class LoadBalanceLoss(LossTerm):
    """E sum_j F_j P_j: 1 if tokens are spread evenly over the experts, E if one expert gets all of them."""

    undivided = ""

    def __init__(self, switch: Switch) -> None:
        super().__init__()
        self.switch = switch

    def shares(self, p_BE: Tensor) -> Tensor:
        """F (E), without a gradient."""
        return torch.zeros_like(p_BE).scatter(-1, p_BE.detach().argmax(-1, keepdim=True), 1.0).mean(0)

    def forward(self, step: Step) -> Tensor:
        p_BE = self.switch.probabilities(step.x_BD)
        share_E = self.shares(p_BE if step.part_of is None else self.switch.probabilities(step.whole.x_BD))
        step.metrics["busiest_expert"] = share_E.max()
        return self.switch.experts * (share_E * p_BE.mean(0)).sum()


@recipe("switch", paper="Mudide et al. 2024")
def switch(config: RunConfig, k: int = 32, experts: int | None = None, balance: float = 0.1) -> Variant:
    """A router picks one expert per token; TopK selects within the expert.

    Paper: weights the balance loss by 3 d_in, for inputs with another scale; `balance` assumes E|x|^2 = 1.

    Args:
        k: Active latents per token.
        experts: Number of experts, each with an equal share of the latents. None: 16, or fewer if d_sae is less than
            16 times k.
        balance: Strength of the loss that spreads tokens evenly over the experts.
    """
    if experts is None:
        experts = next(e for e in (16, 8, 4, 2, 1) if config.d_sae % e == 0 and config.d_sae // e >= k)
    if experts < 1 or config.d_sae % experts or k > config.d_sae // experts:
        raise UsageError(
            f"{config.d_sae} latents cannot be divided into {experts} equal experts of at least k={k} latents: "
            "set fewer experts, a smaller k, or another --width."
        )
    activation = Switch(config.d_in, experts, k)
    return Variant(
        SAE(config.d_in, config.d_sae, [activation]),
        {"mse": (1.0, MSE()), "balance": (balance, LoadBalanceLoss(activation))},
        [UnitNormDecoder()],
        # The authors initialize b_dec and b_router to the data's center, which is equivalent to a centered input.
        Optimization(lr=lr_for_width(config.d_sae), center=True),
        dead=DeadLatents(config.d_sae, config.dead_after_tokens),
    )
