"""The learning rate over a run."""

import pytest
import torch

from sae.train.optimization import Optimization


def test_the_learning_rate_rises_stays_and_falls() -> None:
    """lr (t+1)/w up to w = 10, lr until 0.8 of 100 steps, then lr (T - t)/20: the last step still moves."""
    how = Optimization(lr=2.0, warmup=10, decay_start=0.8)
    expected = {0: 0.2, 9: 2.0, 10: 2.0, 80: 2.0, 90: 1.0, 99: 0.1}
    assert {t: float(how.lr_at(torch.tensor(t), 100)) for t in expected} == pytest.approx(expected, rel=1e-5)


def test_the_defaults_are_those_of_the_runs_that_exist() -> None:
    """A run that is older than an option is resumed with the option's default, so no default may change."""
    assert vars(Optimization()) == {
        "lr": 3e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "weight_decay_on": "encoder",
        "weight_decay_form": "decoupled", "warmup": None, "decay_start": 0.8, "clip": 1.0, "normalize": "unit_ms",
        "center": False, "b_dec_init": "mean",
    }  # fmt: skip
    assert [Optimization().warmup_steps(steps) for steps in (9, 4882, 10_000, 30_000)] == [0, 488, 1000, 1000]
    assert Optimization(warmup=7).warmup_steps(30_000) == 7


def test_a_warm_up_is_noted_if_it_is_longer_than_the_run() -> None:
    assert list(Optimization(warmup=100).notes(100)) == list(Optimization().notes(100)) == []
    (note,) = Optimization(warmup=125, decay_start=1.0).notes(100)
    assert note == "warmup=125 is longer than the run of 100 steps: the learning rate reaches 80% of 0.0003"


@pytest.mark.parametrize(
    ("name", "refused", "taken", "said"),
    [
        ("lr", (0.0, -1.0), (1e-9,), "not positive"),
        ("beta1", (-0.1, 1.0), (0.0, 0.99), "out of range"),
        ("beta2", (-0.1, 1.0), (0.0, 0.99), "out of range"),
        ("eps", (-1e-8,), (0.0,), "negative"),
        ("weight_decay", (-0.1,), (0.0,), "negative"),
        ("clip", (0.0, -1.0), (None, 1e-3), "would zero every gradient"),
        ("warmup", (-1,), (0, None, 1000), "negative"),
        ("decay_start", (-0.1, 1.1), (0.0, 1.0), "out of range"),
    ],
)
def test_a_value_out_of_range_is_refused_and_the_edges_are_not(name: str, refused, taken, said: str) -> None:
    for value in refused:
        (error,) = Optimization(**{name: value}).validation_errors(100)
        assert error.startswith(f"{name}={value:g} ") and said in error
    for value in taken:
        assert list(Optimization(**{name: value}).validation_errors(100)) == []
