"""The end of a training names the runs that missed their L0."""

from sae.train.l0_control import missed_targets


def test_runs_over_a_tenth_from_their_target_are_named() -> None:
    metrics = {"near": {"l0": 35.1}, "far": {"l0": 35.3}, "low": {"l0": 28.7}, "free": {"l0": 900.0}}
    targets = {"near": 32, "far": 32, "low": 32, "free": None, "not logged": 32}
    far, low = missed_targets(targets, metrics)
    assert far.startswith("far ended at L0 35.3, +10% from its target 32.")
    assert low.startswith("low ended at L0 28.7, -10% from its target 32.")
