"""Update a variant's weights with train/kernels, and keep the copies that matrix products read up to date."""

import torch
from torch import Tensor

from .dense_ops import COPY
from .kernels.update_operator import update
from .optimizer import WeightUpdate
from .variant import Variant


class KernelUpdate(WeightUpdate):
    """Updates all weights of a variant with the operator `update`, which also keeps bfloat16 copies of the matrices.

    The kernels use the optimizer's own moments, so checkpoints have the same form with and without kernels. Matrix
    products in bfloat16 read the copies instead of rounding the weights in every step, and return gradients in
    bfloat16. Any other code that writes weights has to call `renew_copies` afterwards.

    Args:
        variant: the variant, on the device. Its `updates_at_once` has to be true.
        optimizer: the optimizer from `make_optimizer`.
        steps: number of steps of the run.
        copies: whether matrix products are in bfloat16.
        sums: whether gradients are summed over parts of a batch. The sums are in float32.
    """

    def __init__(
        self, variant: Variant, optimizer: torch.optim.Optimizer, steps: int, copies: bool, sums: bool
    ) -> None:
        self.settings, self.optimizer = variant.optimization, optimizer
        sae, groups = variant.sae, optimizer.param_groups
        self.weights = list(variant.parameters())  # starts with W_dec and W_enc
        self.decays = {weight: group["weight_decay"] for group in groups for weight in group["params"]}
        self.unit = {sae.W_dec} if variant.normalizes_at_once else set()
        self.copied = [sae.W_dec, sae.W_enc] if copies else []
        self.copies: dict[Tensor, Tensor] = {}  # created in the first step, like the moments
        device = variant.sae.W_enc.device
        self.rates_S = self.settings.lr_at(torch.arange(steps + 1), steps).to(device)
        step_S = torch.arange(1, steps + 2, dtype=torch.float64)
        betas = self.settings.beta1, self.settings.beta2
        rest_S1, rest_S2 = (-torch.expm1(step_S * torch.tensor(beta, dtype=torch.float64).log()) for beta in betas)
        self.corrections_S2 = torch.stack([rest_S1, rest_S2.sqrt()], dim=1).float().to(device)
        if not sums and hasattr(torch.Tensor, "grad_dtype"):  # since torch 2.10; earlier versions round to float32
            for weight in self.copied:
                weight.grad_dtype = None  # accept a gradient in the dtype of the matrix product

    @torch.no_grad()
    def make_copies(self) -> None:
        for weight in self.copied:
            if weight not in self.copies:
                self.copies[weight] = weight.detach().bfloat16()
                setattr(weight, COPY, self.copies[weight])

    @torch.no_grad()
    def renew_copies(self) -> None:
        for weight, copy in self.copies.items():
            copy.copy_(weight)  # in place, because the graph of a captured step reads this memory

    def without_copies(self) -> None:
        """Keep no copies; matrix products then round the weights in every step. Call this before the first step."""
        self.copied = []

    def step(self, loss: Tensor, i: Tensor, failed_at: Tensor) -> Tensor:
        settings, weights = self.settings, [weight for weight in self.weights if weight.grad is not None]
        states = [self.state(weight) for weight in weights]
        steps = [state["step"] for state in states]
        norm, updated = update(
            weights,
            [weight.grad for weight in weights if weight.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            steps,
            [self.copies[weight] for weight in weights if weight in self.copies],
            [weight in self.unit for weight in weights],
            [self.decays[weight] for weight in weights],
            loss,
            i,
            failed_at,
            self.rates_S,
            self.corrections_S2,
            settings.clip,
            settings.beta1,
            settings.beta2,
            settings.eps,
            settings.weight_decay_form == "coupled",
        )
        torch._foreach_add_(steps, [updated] * len(steps))
        return norm

    def state(self, weight: Tensor) -> dict[str, Tensor]:
        """Adam's state for a weight. Its moments start at zero."""
        state: dict[str, Tensor] = self.optimizer.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        return state
