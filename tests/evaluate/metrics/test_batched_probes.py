"""Probes that are trained together equal those that `train_probe` trains one by one."""

import torch

from sae.evaluate.metrics.batched_probes import PROBE_SETTINGS, train_probes
from sae.evaluate.metrics.probes import ProbeTask, train_probe


def toy_tasks() -> tuple[torch.Tensor, list[ProbeTask], torch.Tensor, list[ProbeTask]]:
    """Three tasks, each with its own 40 training and 30 test texts. The label of task p is the sign of dimension p plus
    noise."""
    generator = torch.Generator().manual_seed(4)
    x_ND, x_test_ND = torch.randn(90, 6, generator=generator), torch.randn(60, 6, generator=generator)

    def tasks(x: torch.Tensor, size: int) -> list[ProbeTask]:
        rows = [torch.randperm(len(x), generator=generator)[:size] for _ in range(3)]
        return [
            ProbeTask(r, (x[r, p] + 0.3 * torch.randn(size, generator=generator) > 0).float())
            for p, r in enumerate(rows)
        ]

    return x_ND, tasks(x_ND, 40), x_test_ND, tasks(x_test_ND, 30)


def test_probes_trained_together_are_those_trained_alone():
    x_ND, tasks, x_test_ND, test_tasks = toy_tasks()
    together = train_probes(x_ND, tasks, x_test_ND, test_tasks, [torch.Generator().manual_seed(p) for p in range(3)])
    epochs = PROBE_SETTINGS["epochs"]
    for p, (task, test) in enumerate(zip(tasks, test_tasks, strict=True)):
        alone = train_probe(
            x_ND[task.rows],
            task.label,
            x_test_ND[test.rows],
            test.label,
            torch.Generator().manual_seed(p),
            lr=PROBE_SETTINGS["lr"],
            batch_size=PROBE_SETTINGS["batch"],
            epochs=epochs,
            patience=epochs,
            l1=PROBE_SETTINGS["l1"],
        )
        torch.testing.assert_close(together.weight_PD[p], alone.weight_D, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(together.bias_P[p], alone.bias[0], rtol=1e-4, atol=1e-6)
