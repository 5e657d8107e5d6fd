"""TPP: scores computed by hand, and a planted latent for every class."""

from dataclasses import replace

import pytest
import torch

from sae.evaluate.metrics.ablation import AblationProblem
from sae.evaluate.metrics.batched_probes import LinearProbes
from sae.evaluate.metrics.bootstrap import BootstrapWeights
from sae.evaluate.metrics.pooled_activations import PooledLatents
from sae.evaluate.metrics.probe_readout import ProbeReadout, mean_latent_differences
from sae.evaluate.metrics.probes import ProbeTask
from sae.evaluate.metrics.tpp import Tpp, class_scores


def one(accuracy: float) -> torch.Tensor:
    return torch.tensor([accuracy], dtype=torch.float64)


def test_of_a_class_what_its_probe_loses_beyond_the_others():
    clean = [one(0.9), one(0.8), one(0.7)]
    found = class_scores(1, clean, {5: [one(0.8), one(0.5), one(0.72)]})
    assert {name: float(score) for name, score in found.items()} == pytest.approx(
        {
            "tpp_threshold_5_total_metric": 0.3 - 0.04,
            "tpp_threshold_5_intended_diff_only": 0.3,
            "tpp_threshold_5_unintended_diff_only": 0.04,
        }
    )


def test_effects_of_latents_that_are_rarer_in_a_class_are_none():
    effect_PF = Tpp().effects(torch.tensor([[2.0, -3, 1]]), torch.tensor([[1.0], [2], [-4]]))
    assert effect_PF.tolist() == [[2, 0, -4]]


def test_a_latent_for_every_class_is_all_that_its_probe_loses():
    """There are three classes, each with one latent and one dimension."""
    label_N = torch.arange(3).repeat_interleave(20)
    x_ND = torch.nn.functional.one_hot(label_N, 3).float()
    probes = LinearProbes(torch.eye(3), torch.full((3,), -0.5))
    pooled = PooledLatents(x_ND, torch.ones(60), torch.zeros(3))
    tasks = [ProbeTask(torch.arange(60), (label_N == c).float()) for c in range(3)]
    problem = AblationProblem(
        "planted", {"test": {str(c): [""] * 20 for c in range(3)}}, ("0", "1", "2"), lambda s, p, _: tasks[p]
    )
    readout = ProbeReadout.of(probes, x_ND, pooled, torch.eye(3), 1)
    metric = Tpp(thresholds=(1, 3))
    effect_PF = metric.effects(mean_latent_differences(pooled, tasks), readout.align_FP)
    torch.testing.assert_close(effect_PF, torch.eye(3))
    found = metric.scores(
        problem, readout, effect_PF, tasks.__getitem__, BootstrapWeights.of([20] * 3, replicates=20), "0.6.0"
    )
    for n in (1, 3):
        assert float(found.values[f"tpp_threshold_{n}_intended_diff_only"][0]) == pytest.approx(1 / 3)  # 20 of 60 texts
        assert float(found.values[f"tpp_threshold_{n}_unintended_diff_only"][0]) == 0
    assert found.extra["2"]["clean_accuracy"] == 1
    assert found.flags == []
    blind = replace(readout, logit_NP=-readout.logit_NP)
    flags = metric.scores(
        problem, blind, effect_PF, tasks.__getitem__, BootstrapWeights.of([20] * 3, replicates=20), "0.6.0"
    ).flags
    assert flags == [f"the probe of {c} has an accuracy of 0.000, so it has little to lose." for c in range(3)]
