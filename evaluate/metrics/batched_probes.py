"""Linear probes of many tasks, trained together with batched matrix multiplications (SCR and TPP).

Shape suffixes: N texts, B texts of a task, b texts of a batch, D d_in, P probes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from .probes import ProbeTask

PROBE_SETTINGS = {"batch": 16, "epochs": 20, "lr": 1e-3, "l1": 1e-3}


@dataclass(frozen=True)
class LinearProbes:
    """One linear probe per task; a positive logit predicts the positive class."""

    weight_PD: Tensor
    bias_P: Tensor

    def logits(self, x_ND: Tensor) -> Tensor:
        return x_ND @ self.weight_PD.T + self.bias_P


def train_probes(
    x_ND: Tensor,
    tasks: Sequence[ProbeTask],
    x_test_ND: Tensor,
    test_tasks: Sequence[ProbeTask],
    generators: Sequence[torch.Generator],
) -> LinearProbes:
    """Train one probe per task, all in one batch. Each probe equals the result of `probes.train_probe` for its task.

    The loss is cross-entropy + 1e-3 |w|_1, minimized by AdamW in 20 epochs with batches of 16. Each probe is taken from
    the first epoch with its best test accuracy. All tasks have the same size. Each probe's generator draws, in this
    order, its weight, its bias, and one order per epoch.
    """
    # Paper: SAEBench trains in the model's dtype, bfloat16 for Gemma; these probes are trained in float32.
    rows_PB = torch.stack([task.rows for task in tasks])
    label_PB = torch.stack([task.label for task in tasks]).to(x_ND.dtype)
    bound = x_ND.shape[1] ** -0.5

    def initialize(width: int) -> Tensor:
        rows = [torch.empty(width).uniform_(-bound, bound, generator=generator) for generator in generators]
        return torch.stack(rows).to(x_ND.dtype).requires_grad_()

    weight_PD, bias_P1 = initialize(x_ND.shape[1]), initialize(1)
    optimizer = torch.optim.AdamW([weight_PD, bias_P1], lr=PROBE_SETTINGS["lr"], weight_decay=0.01)
    best_accuracy_P = torch.zeros(len(tasks), dtype=torch.float64)
    best = LinearProbes(weight_PD.detach().clone(), bias_P1.detach()[:, 0].clone())
    for _ in range(int(PROBE_SETTINGS["epochs"])):
        order_PB = torch.stack([torch.randperm(rows_PB.shape[1], generator=generator) for generator in generators])
        for batch_Pb in order_PB.split(int(PROBE_SETTINGS["batch"]), 1):
            with torch.enable_grad():
                x_PbD, label_Pb = x_ND[rows_PB.gather(1, batch_Pb)], label_PB.gather(1, batch_Pb)
                logit_Pb = (x_PbD @ weight_PD[:, :, None])[:, :, 0] + bias_P1
                loss_Pb = binary_cross_entropy_with_logits(logit_Pb, label_Pb, reduction="none")
                optimizer.zero_grad()
                (loss_Pb.mean(1).sum() + PROBE_SETTINGS["l1"] * weight_PD.abs().sum()).backward()
            optimizer.step()
        current = LinearProbes(weight_PD.detach(), bias_P1.detach()[:, 0])
        logit_NP = current.logits(x_test_ND)
        accuracy_P = torch.stack([is_correct(logit_NP[:, p], task).mean() for p, task in enumerate(test_tasks)])
        better_P = accuracy_P > best_accuracy_P
        best_accuracy_P[better_P] = accuracy_P[better_P]
        best.weight_PD[better_P], best.bias_P[better_P] = current.weight_PD[better_P], current.bias_P[better_P]
    return best


def is_correct(logit_N: Tensor, task: ProbeTask) -> Tensor:
    """1.0 where the logit has the sign of its label, else 0.0: (B,) float64."""
    return ((logit_N[task.rows] > 0) == (task.label > 0.5)).double()
