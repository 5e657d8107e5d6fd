"""The decorrelation loss, against its definition."""

import pytest
import torch

from sae.train.step import Step
from sae.train.variants.decorrelation import Decorrelation


def decorrelation_reference(f_BF: torch.Tensor, fraction: float, tau: float | None = None):
    """(2) to (4) in float64 with loops over pairs and a full sort."""
    n = f_BF.shape[1]
    alive = [i for i in range(n) if f_BF[:, i].any()]
    pairs = {
        (i, j): (f_BF[:, i] @ f_BF[:, j]) / (f_BF[:, i].norm() * f_BF[:, j].norm())
        for i in alive
        for j in alive
        if i < j
    }
    values = torch.stack(list(pairs.values())).detach()
    mean, sd = float(values.mean()), float(values.std(correction=0))
    tau = mean + sd if tau is None else tau
    chosen = max(1, round(fraction * n * (n - 1) / 2))
    largest = sorted(pairs.values(), key=lambda c: c.item(), reverse=True)[:chosen]
    return sum((c - tau).relu() for c in largest if c.item() > 0) / chosen, mean, tau


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 1.0])
def test_decorrelation_is_its_definition(fraction: float) -> None:
    """Value, mean, tau and gradient, with dead columns; at fraction 1 fewer pairs fire than the fraction allows."""
    torch.manual_seed(0)
    f_BF = (torch.randn(40, 24) * (torch.rand(40, 24) < 0.3)).relu().double()
    f_BF[:, [0, 5, 23]] = 0
    exact_BF = f_BF.clone().requires_grad_()
    value, mean, tau = decorrelation_reference(exact_BF, fraction)
    value.backward()
    latents_BF = f_BF.float().requires_grad_()
    step = Step(torch.tensor(0), None, None, latents_BF, latents_BF, latents_BF, latents_BF)
    found = Decorrelation(fraction)(step)
    found.backward()
    assert float(step.metrics["mean_correlation"]) == pytest.approx(mean, rel=1e-4)
    assert float(step.metrics["tau"]) == pytest.approx(tau, rel=1e-4)
    assert float(step.metrics["sd_correlation"]) == pytest.approx(tau - mean, rel=1e-4)  # the reference's sd
    assert found.item() == pytest.approx(value.item(), rel=1e-4)
    torch.testing.assert_close(latents_BF.grad.double(), exact_BF.grad, rtol=1e-3, atol=1e-6)
    assert not latents_BF.grad[:, [0, 5, 23]].any()


def test_decorrelation_of_silence_is_zero() -> None:
    latents_BF = torch.zeros(8, 6, requires_grad=True)
    value = Decorrelation(0.5)(Step(torch.tensor(0), None, None, latents_BF, latents_BF, latents_BF, latents_BF))
    value.backward()
    assert value.item() == 0 and not latents_BF.grad.any()
