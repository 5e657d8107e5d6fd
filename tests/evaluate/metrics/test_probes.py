"""Binary tasks are drawn in SAEBench's order, and probes equal those of a plain PyTorch training loop."""

import math

import pytest
import torch
from torch import nn

from sae.common.errors import UsageError
from sae.evaluate.metrics.pooled_activations import TextRows, pool_latents
from sae.evaluate.metrics.probes import (
    ProbeTask,
    logistic_accuracy,
    make_generator,
    mean_difference,
    one_vs_rest_task,
    pool_unit_norm,
    top_features,
    train_probe,
    wilson_interval,
)
from sae.evaluate.statistics import proportion_interval
from sae.train.activation_functions import ReLU
from sae.train.sae import SAE

COUNTS = {"a": 10, "b": 7, "c": 9, "d": 12}  # b begins at 10, c at 17, d at 26


def test_a_task_has_all_of_its_class_and_even_parts_of_the_others():
    torch.manual_seed(42)
    drawn = torch.cat([start + torch.randperm(count)[:3] for start, count in ((0, 10), (17, 9), (26, 12))])
    negative = drawn[torch.randperm(9)[:7]]
    order = torch.randperm(14)
    expected = torch.cat([torch.arange(10, 17), negative])[order]

    rows, label = one_vs_rest_task(COUNTS, "b", make_generator("saebench"))
    assert torch.equal(rows, expected)
    assert torch.equal(label, (torch.arange(14) < 7)[order].float())
    assert sorted(rows[label > 0.5].tolist()) == list(range(10, 17))


def test_paired_draws_depend_on_their_names_alone():
    first = torch.randperm(99, generator=make_generator("paired", "set", "class", 2))
    torch.manual_seed(7)
    assert torch.equal(first, torch.randperm(99, generator=make_generator("paired", "set", "class", 2)))
    assert not torch.equal(first, torch.randperm(99, generator=make_generator("paired", "set", "class", 5)))
    with pytest.raises(UsageError, match="rng=fast is unknown. Expected paired"):
        make_generator("fast")


def two_clouds(count: int, width: int, distance: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    label = (torch.rand(count, generator=g) < 0.5).float()
    return torch.randn(count, width, generator=g) + distance * label[:, None], label


@pytest.mark.parametrize("l1", [0.0, 1e-2])
def test_a_probe_is_the_one_that_torch_s_own_parts_train(l1):
    (x, y), (test_x, test_y) = two_clouds(100, 6, 0.4, 0), two_clouds(60, 6, 0.4, 1)
    torch.manual_seed(42)
    linear = nn.Linear(6, 1)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=1e-2)
    best, since = (0.0, None), 0
    while since < 4:
        order = torch.randperm(100)
        for start in range(0, 100, 32):
            part = order[start : start + 32]
            loss = nn.BCEWithLogitsLoss()(linear(x[part]).flatten(), y[part]) + l1 * linear.weight.abs().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        right = ((linear(test_x).flatten() > 0) == (test_y > 0)).double().mean().item()
        best, since = ((right, linear.weight[0].tolist()), 0) if right > best[0] else (best, since + 1)

    draws = make_generator("saebench")
    probe = train_probe(x, y, test_x, test_y, draws, lr=1e-2, batch_size=32, epochs=100, patience=4, l1=l1)
    assert (probe.test_accuracy, probe.weight_D.tolist()) == (best[0], pytest.approx(best[1], abs=1e-6))
    assert probe.accuracy(test_x, test_y) == probe.test_accuracy
    assert torch.equal(draws.get_state(), torch.get_rng_state())  # no further draw or epoch


def test_of_equally_accurate_epochs_the_first_is_returned():
    """Clouds on either side of zero are separated from the first epoch on, so more epochs return the same probe."""
    (x, y), (test_x, test_y) = two_clouds(64, 3, 12.0, 0), two_clouds(64, 3, 12.0, 1)
    probes = [
        train_probe(
            x - 6, y, test_x - 6, test_y, make_generator("saebench"), lr=0.3, batch_size=8, epochs=n, patience=2
        )
        for n in (1, 6)
    ]
    assert probes[0].test_accuracy == probes[1].test_accuracy == 1
    assert torch.equal(probes[0].weight_D, probes[1].weight_D) and torch.equal(probes[0].bias, probes[1].bias)


def test_an_l1_penalty_takes_what_does_not_help():
    x, y = two_clouds(200, 8, 0, 0)
    x[:, 0] += 3 * y

    def weight(l1: float) -> torch.Tensor:
        draws = make_generator("paired", "l1")
        return train_probe(x, y, x, y, draws, lr=1e-2, batch_size=50, epochs=60, patience=60, l1=l1).weight_D.abs()

    assert weight(0.1)[1:].max() < 0.05 < weight(0)[1:].max()
    assert weight(0.1)[0] > 0.3


def test_the_columns_of_the_largest_difference_stand_in_their_own_order():
    feature = torch.tensor([[1.0, 0, 5, 2], [3, 0, 5, 0], [0, 9, 5, 0], [0, 0, 5, 4]])
    task = ProbeTask(torch.tensor([3, 0, 2, 1]), torch.tensor([0.0, 1, 0, 1]))
    difference = mean_difference(feature, task)
    assert difference.tolist() == [2, -4.5, 0, -1]
    assert top_features(difference.abs(), 2).tolist() == [0, 1]
    assert top_features(difference.abs(), 3).tolist() == [0, 1, 3]


def test_a_regression_separates_what_a_line_separates_and_guesses_what_does_not_vary():
    x, y = torch.tensor([[0.0], [1], [2], [3]]), torch.tensor([0.0, 0, 1, 1])
    assert logistic_accuracy(x, y, torch.tensor([[-5.0], [9], [0]]), torch.tensor([0.0, 1, 1])) == pytest.approx(2 / 3)
    assert logistic_accuracy(torch.ones(4, 2), y, torch.ones(4, 2), y) == 0.5


def test_wilson_s_interval():
    low, high = wilson_interval(0.5, 100)
    assert (low, high) == (pytest.approx(0.40383, abs=1e-5), pytest.approx(0.59617, abs=1e-5))
    assert wilson_interval(3 / 20, 20) == pytest.approx(proportion_interval(3, 20), abs=1e-6)
    low, high = wilson_interval(1.0, 50)
    assert (low, high) == (pytest.approx(1 / (1 + 1.959964**2 / 50)), pytest.approx(1))


def test_latents_are_those_of_unit_decoder_rows():
    torch.manual_seed(0)
    sae = SAE(6, 10, [ReLU()]).requires_grad_(False)
    sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    sae.b_enc.normal_()  # so that some latents fire on zeros
    rows = TextRows(torch.randn(7, 6), torch.tensor([3, 4]))
    unit, scaled = pool_unit_norm(sae, rows, torch.device("cpu"))
    assert not scaled and torch.equal(unit.sum_NF, pool_latents(sae, rows, torch.device("cpu")).sum_NF)
    factor = torch.linspace(0.2, 3, 10)
    sae.W_enc *= factor
    sae.b_enc *= factor
    sae.W_dec /= factor[:, None]
    folded, scaled = pool_unit_norm(sae, rows, torch.device("cpu"))
    assert scaled
    torch.testing.assert_close(folded.sum_NF, unit.sum_NF)
    torch.testing.assert_close(folded.zero_F, unit.zero_F)
    assert 0 < int((unit.zero_F > 0).sum()) < 10
    assert math.isclose(float(unit.mean_NF[1, 3]), float(unit.sum_NF[1, 3]) / 4, rel_tol=1e-6)
