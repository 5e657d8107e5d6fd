"""Copies that run in parallel with the steps are ordered correctly, however late streams run."""

import pytest

from sae.cache.reader import Cache

from .gpu import SimulatedGPU

ORDERS = 20


def test_a_step_reads_its_own_batch_however_late_the_copies_run(gpu: SimulatedGPU) -> None:
    assert gpu("copies.wrong_batches", orders=ORDERS) == []


@pytest.mark.parametrize(
    "wait", ["copy waits for the step", "step waits for the copy", "reader waits for the copy"]
)  # fmt: skip
def test_without_one_of_the_loaders_waits_a_step_reads_another_batch(gpu: SimulatedGPU, wait: str) -> None:
    assert gpu("copies.wrong_batches", orders=10, without=wait)


def test_the_batches_of_a_loader_are_right_for_steps_that_run_long_after(gpu: SimulatedGPU, tiny_cache: Cache) -> None:
    assert gpu("copies.wrong_batches_of_a_loader", folder=tiny_cache.folder, count=40) == []


def test_a_window_gets_its_own_rows_however_late_the_copies_run(gpu: SimulatedGPU) -> None:
    assert gpu("copies.wrong_windows", orders=ORDERS) == []


@pytest.mark.parametrize("wait", ["copy waits for the pass", "host waits for the copy", "memory is kept"])
def test_without_one_of_the_harvests_waits_a_window_gets_other_rows(gpu: SimulatedGPU, wait: str) -> None:
    assert gpu("copies.wrong_windows", orders=10, without=wait)


def test_a_window_of_the_gpu_arrives_whole_however_late_its_copy_runs(gpu: SimulatedGPU) -> None:
    """With the norms and moments that the CPU finds, bit for bit."""
    assert gpu("copies.wrong_windows_of_a_gpu", orders=5) == []


@pytest.mark.parametrize(
    "wait", ["placing waits for the copy", pytest.param("host waits for the copy", marks=pytest.mark.slow)]
)
def test_without_one_of_its_waits_another_window_arrives(gpu: SimulatedGPU, wait: str) -> None:
    assert gpu("copies.wrong_windows_of_a_gpu", orders=5, without=wait)


def test_a_checkpoint_has_the_state_of_its_step_however_late_the_copies_run(gpu: SimulatedGPU) -> None:
    assert gpu("copies.wrong_checkpoints", orders=ORDERS) == []


@pytest.mark.parametrize(
    "wait", ["thread waits for the copies", "next waits for the one before", "copies are on the stream of training"]
)
def test_without_one_of_these_a_checkpoint_has_another_state(gpu: SimulatedGPU, wait: str) -> None:
    assert gpu("copies.wrong_checkpoints", orders=10, without=wait)


@pytest.mark.slow
def test_three_thousand_orders(gpu: SimulatedGPU) -> None:
    assert gpu("copies.wrong_batches", orders=3000) == gpu("copies.wrong_windows", orders=3000) == []
    assert gpu("copies.wrong_windows_of_a_gpu", orders=300) == gpu("copies.wrong_checkpoints", orders=1000) == []
