"""Each flag of core appears on one side of its threshold only. See test_misleading_numbers.py for measured SAEs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sae.evaluate.metrics.core_flags import core_flags

D_IN, TOKENS = 10, 1000


def flags_of(
    density: list[float], l0: float, *, fve: float = 0.8, scale: float = 1.0, cost: float = 1.0, not_finite: int = 0,
    reference: bool = False,
) -> list[str]:  # fmt: skip
    density_F = torch.tensor(density, dtype=torch.float64)
    stats: Any = SimpleNamespace(
        density=lambda: density_F,
        tokens=TOKENS,
        pairs=SimpleNamespace(latents=1024),
        sums={"x": torch.zeros(D_IN), "not_finite": float(not_finite)},
    )
    metrics = {
        "sparsity": {"l0": l0},
        "reconstruction_quality": {"fve": fve},
        "shrinkage": {"relative_reconstruction_bias": scale},
        "model_performance_preservation": {"ce_loss_without_sae": 2.0, "ce_loss_with_ablation": 2.0 + cost},
    }
    target: Any = SimpleNamespace(reference=reference)
    return core_flags(target, metrics, stats)


GOOD = [0.2] * 10


@pytest.mark.parametrize(
    ("beyond", "within", "sentence"),
    [
        (dict(density=[0.0] * 10, l0=0.0), dict(density=GOOD, l0=2.0), "L0 is 0: no latent ever fires"),
        (dict(density=[0.0] * 6 + [0.5] * 4, l0=2.0), dict(density=[0.0] * 5 + [0.4] * 5, l0=2.0),
         "60% of the latents never fire on this text."),
        (dict(density=[0.9] * 10, l0=9.0), dict(density=[0.89] * 10, l0=8.9), "mere rotation reconstructs everything"),
        (dict(density=[1.0, 1.0] + [0.1] * 8, l0=2.8), dict(density=[0.98, 0.98] + [0.1] * 8, l0=2.76),
         "Most of the L0 of 2.8 comes from 2 latents that fire at over 99% of the tokens"),
        (dict(density=[1.0] + [0.05] * 10, l0=1.5), dict(density=[1.0] + [0.2] * 10, l0=3.0), "like a PCA"),
        (dict(fve=0.04), dict(fve=0.06), "0.040: the SAE is hardly better than the mean of the text. KL and CE"),
        (dict(fve=-0.5), dict(fve=0.06), "-0.500: the mean of the text alone would reconstruct better. KL and CE"),
        (dict(scale=0.79), dict(scale=0.81), "Reconstructions are 0.79 times as long"),
        (dict(scale=1.26), dict(scale=1.24), "Reconstructions are 1.26 times as long"),
        (dict(cost=0.019), dict(cost=0.021), "Zeroing the layer costs the model only 0.019 nats"),
        (dict(cost=-0.1), dict(cost=0.021), "Zeroing the layer costs the model only -0.100 nats"),
        (dict(not_finite=1), dict(not_finite=0), "NaN or infinite at 1 of 1,000 tokens"),
    ],
)  # fmt: skip
def test_a_flag_appears_beyond_its_threshold_only(beyond: dict, within: dict, sentence: str) -> None:
    usual = {"density": GOOD, "l0": 2.0}
    (flag,) = flags_of(**usual | beyond)
    assert sentence in flag
    assert flags_of(**usual | within) == []
    assert flags_of(**usual | beyond, reference=True) == []
