"""SCR: scores computed by hand, the tasks of the quadrants, and a planted pair of latents."""

import pytest
import torch

from sae.evaluate.metrics.ablation import AblationProblem
from sae.evaluate.metrics.batched_probes import LinearProbes
from sae.evaluate.metrics.bootstrap import BootstrapWeights
from sae.evaluate.metrics.pooled_activations import PooledLatents
from sae.evaluate.metrics.probe_readout import ProbeReadout, mean_latent_differences
from sae.evaluate.metrics.scr import ATTRIBUTE, BIASED, CLASS, PROBES, Scr, pair_flags, quadrant_task, scr_scores


def one(accuracy: float) -> torch.Tensor:
    return torch.tensor([accuracy], dtype=torch.float64)


def scores_of(first: float, second: float, clean: float, after: float, mode: str = "0.6.0") -> dict[str, float]:
    """`first` and `second` are the accuracies of the biased probe on the class and on the attribute.

    `clean` is the accuracy of the unbiased probes, and `after` is what the biased probe gains by the ablation.
    """
    found = scr_scores(
        {CLASS: one(first), ATTRIBUTE: one(second)},
        {CLASS: one(clean), ATTRIBUTE: one(clean)},
        {CLASS: {10: one(first + after)}, ATTRIBUTE: {10: one(second + after)}},
        mode,
    )
    return {name.replace("_threshold_10", ""): float(score) for name, score in found.items()}


def test_a_score_is_the_share_of_the_lacking_accuracy_that_comes_back():
    found = scores_of(0.6, 0.7, 0.9, 0.05)
    assert found == pytest.approx({"scr_dir1": 1 / 6, "scr_dir2": 1 / 4, "scr_metric": 1 / 6})
    found = scores_of(
        0.7, 0.6, 0.9, 0.3
    )  # the attribute is the harder task, so the second direction counts; scores above 1 are allowed
    assert found == pytest.approx({"scr_dir1": 1.5, "scr_dir2": 1.0, "scr_metric": 1.0})
    assert scores_of(0.6, 0.7, 0.9, -0.1)["scr_metric"] == pytest.approx(-1 / 3)


def test_a_pair_without_a_harder_task_has_no_metric():
    assert scores_of(0.65, 0.65, 0.9, 0.05).keys() == {"scr_dir1", "scr_dir2"}


@pytest.mark.parametrize("lead", [-0.05, 0.0005])
def test_without_room_to_improve_a_score_is_0_and_was_a_quotient(lead):
    assert scores_of(0.7, 0.75, 0.7 + lead, 0.05)["scr_metric"] == 0
    assert scores_of(0.7, 0.75, 0.7 + lead, 0.05, "2024-12")["scr_metric"] == pytest.approx(0.05 / lead)


def test_what_is_0_by_0_is_absent_from_the_old_mode():
    assert scores_of(0.7, 0.75, 0.7, 0.0, "2024-12").keys() == {"scr_dir2"}
    assert scores_of(0.7, 0.75, 0.7, 0.0)["scr_metric"] == 0


def test_tasks_are_the_quadrants():
    quadrants = {"PP": range(4), "NN": range(4, 8), "NP": range(8, 10), "PN": range(10, 12)}
    expected = {
        ATTRIBUTE: ([0, 1, *quadrants["PN"]], [*quadrants["NP"], 4, 5]),
        CLASS: ([0, 1, *quadrants["NP"]], [*quadrants["PN"], 4, 5]),
        BIASED: (list(quadrants["PP"]), list(quadrants["NN"])),
    }
    for probe, (positive, negative) in expected.items():
        found = quadrant_task(2, probe)
        assert sorted(found.rows[found.label == 1].tolist()) == sorted(positive)
        assert sorted(found.rows[found.label == 0].tolist()) == sorted(negative)


def planted(size: int = 50) -> tuple[ProbeReadout, torch.Tensor, AblationProblem]:
    """Texts whose activations are their class and their attribute. Latents 0 and 1 read these; the others are noise."""
    signs = {"PP": (1, 1), "NN": (-1, -1), "NP": (1, -1), "PN": (-1, 1)}
    counts = {"PP": 2 * size, "NN": 2 * size, "NP": size, "PN": size}
    both_N2 = torch.tensor([signs[name] for name, count in counts.items() for _ in range(count)], dtype=torch.float32)
    probes = LinearProbes(
        torch.tensor([[0.0, 1], [1, 0], [1, 3]]), torch.zeros(3)
    )  # the biased probe depends more on the attribute
    noise_NF = torch.rand(len(both_N2), 3, generator=torch.Generator().manual_seed(0))
    x_ND = torch.cat([both_N2, torch.zeros(len(both_N2), 1)], 1)
    W_dec_FD = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1], [0, 0, 1]])
    probes = LinearProbes(torch.cat([probes.weight_PD, torch.zeros(3, 1)], 1), probes.bias_P)
    pooled = PooledLatents(torch.cat([both_N2, noise_NF], 1), torch.ones(len(both_N2)), torch.zeros(5))
    problem = AblationProblem("planted", {"test": {name: [""] * count for name, count in counts.items()}}, PROBES,
                      lambda split, probe, _: quadrant_task(size, probe))  # fmt: skip
    difference_PF = mean_latent_differences(pooled, [quadrant_task(size, probe) for probe in range(3)])
    return ProbeReadout.of(probes, x_ND, pooled, W_dec_FD, 1), difference_PF, problem


def test_ablating_the_attribute_s_own_latent_frees_the_probe_of_it():
    readout, difference_PF, problem = planted()
    metric = Scr(thresholds=(1, 2))
    effect_PF = metric.effects(difference_PF, readout.align_FP)
    torch.testing.assert_close(effect_PF[:2], torch.tensor([[0.0, 2, 0, 0, 0], [2, 0, 0, 0, 0]]))
    found = metric.scores(
        problem,
        readout,
        effect_PF,
        problem.fixed_tasks("test").__getitem__,
        BootstrapWeights.of([100, 100, 50, 50], replicates=20),
        "0.6.0",
    )
    # The biased probe gets the class wrong where class and attribute differ, which is in half of the texts.
    assert found.extra == {
        "class": {"own_probe": 1.0, "biased_probe": 0.5},
        "attribute": {"own_probe": 1.0, "biased_probe": 1.0},
    }
    scores = {name: float(score_R[0]) for name, score_R in found.values.items()}
    assert scores["scr_dir1_threshold_1"] == scores["scr_metric_threshold_1"] == 1
    assert scores["scr_dir1_threshold_2"] == 1  # no other latent has an effect
    assert scores["scr_dir2_threshold_1"] == 0  # accuracy cannot rise
    assert found.flags == []


def test_effects_do_not_ask_for_a_sign():
    effect_PF = Scr().effects(torch.tensor([[2.0, -3, 1]]), torch.tensor([[1.0], [2], [-4]]))
    assert effect_PF.tolist() == [[2, 6, 4]]


def test_a_difference_that_may_be_none_is_flagged():
    accuracies = torch.tensor([0.62, 0.5, 0.7, 0.66], dtype=torch.float64)
    (flag,) = pair_flags(
        {CLASS: one(0.6).expand(4), ATTRIBUTE: one(0.8).expand(4)}, {CLASS: accuracies, ATTRIBUTE: one(0.9).expand(4)}
    )
    assert "at the class, the biased probe is not clearly worse" in flag
    assert "by 0.020" in flag
    assert (
        pair_flags(
            {CLASS: one(0.6).expand(4), ATTRIBUTE: one(0.8).expand(4)},
            {CLASS: one(0.9).expand(4), ATTRIBUTE: one(0.9).expand(4)},
        )
        == []
    )
    (flag,) = pair_flags({CLASS: one(0.6), ATTRIBUTE: one(0.6)}, {CLASS: one(0.9), ATTRIBUTE: one(0.9)})
    assert "no scr_metric" in flag
