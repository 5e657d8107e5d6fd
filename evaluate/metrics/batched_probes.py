"""Linear probes that are trained side by side, one per task, in one batched matrix product."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from .probes import ProbeTask

PROBE_SETTINGS = {"batch": 16, "epochs": 20, "lr": 1e-3, "l1": 1e-3}


@dataclass(frozen=True)
class LinearProbes:
    """Linear probes: a positive logit says yes."""

    weight_PD: Tensor
    bias_P: Tensor

    def logits(self, x_ND: Tensor) -> Tensor:
        return x_ND @ self.weight_PD.T + self.bias_P


def train_probes(
    x_ND: Tensor,
    tasks: Sequence[ProbeTask],
    x_test_ND: Tensor,
    test_tasks: Sequence[ProbeTask],
    draws: Sequence[torch.Generator],
) -> LinearProbes:
    """One probe per task, as `train_probe` makes them one by one, in one batched product; the tasks are of one size.

    Cross-entropy + 1e-3 |w|_1, AdamW, 20 epochs of batches of 16; of each probe the first epoch of the best accuracy on
    the test texts is kept. Draws from the generator of a probe: weight, bias, one order per epoch.
    """
    # Paper: SAEBench trains in the model's dtype, bfloat16 for Gemma; this is float32.
    rows_PB = torch.stack([task.rows for task in tasks])
    label_PB = torch.stack([task.label for task in tasks]).to(x_ND.dtype)
    bound = x_ND.shape[1] ** -0.5

    def start(width: int) -> Tensor:
        drawn = [torch.empty(width).uniform_(-bound, bound, generator=one) for one in draws]
        return torch.stack(drawn).to(x_ND.dtype).requires_grad_()

    weight_PD, bias_P1 = start(x_ND.shape[1]), start(1)
    optimizer = torch.optim.AdamW([weight_PD, bias_P1], lr=PROBE_SETTINGS["lr"], weight_decay=0.01)
    best_P = torch.zeros(len(tasks), dtype=torch.float64)
    kept = LinearProbes(weight_PD.detach().clone(), bias_P1.detach()[:, 0].clone())
    for _ in range(int(PROBE_SETTINGS["epochs"])):
        order_PB = torch.stack([torch.randperm(rows_PB.shape[1], generator=one) for one in draws])
        for batch_Pb in order_PB.split(int(PROBE_SETTINGS["batch"]), 1):
            with torch.enable_grad():
                x_PbD, label_Pb = x_ND[rows_PB.gather(1, batch_Pb)], label_PB.gather(1, batch_Pb)
                logit_Pb = (x_PbD @ weight_PD[:, :, None])[:, :, 0] + bias_P1
                loss_Pb = binary_cross_entropy_with_logits(logit_Pb, label_Pb, reduction="none")
                optimizer.zero_grad()
                (loss_Pb.mean(1).sum() + PROBE_SETTINGS["l1"] * weight_PD.abs().sum()).backward()
            optimizer.step()
        now = LinearProbes(weight_PD.detach(), bias_P1.detach()[:, 0])
        logit_NP = now.logits(x_test_ND)
        reached_P = torch.stack([is_correct(logit_NP[:, p], task).mean() for p, task in enumerate(test_tasks)])
        better_P = reached_P > best_P
        best_P[better_P] = reached_P[better_P]
        kept.weight_PD[better_P], kept.bias_P[better_P] = now.weight_PD[better_P], now.bias_P[better_P]
    return kept


def is_correct(logit_N: Tensor, task: ProbeTask) -> Tensor:
    """1 where the logit has the sign of its label, 0 elsewhere (B,), in float64."""
    return ((logit_N[task.rows] > 0) == (task.label > 0.5)).double()
