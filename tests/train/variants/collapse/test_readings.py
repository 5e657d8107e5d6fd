"""Paper 000: runs built from its file have the readings, systems and counters that the file declares."""

from collections.abc import Callable

import pytest
import torch

from sae.evaluate.papers.claims import PaperSystem, Reading
from sae.evaluate.papers.parse import load_paper
from sae.train.loop import Trainer
from sae.train.recipe import find_recipe
from sae.train.variant import RunConfig

PAPER = load_paper("000")
READINGS = {reading.name: reading for reading in PAPER.readings}
SYSTEMS = [system for name, system in PAPER.systems.items() if name not in ("runs", "model")]
each_reading = pytest.mark.parametrize("reading", READINGS.values(), ids=READINGS)


def trainer_of(system: PaperSystem, reading: Reading, trained: Callable[..., Trainer], steps: int = 2) -> Trainer:
    (name,) = system.recipes
    recipe, printed = find_recipe(name), PAPER.setup.optimization() if reading.is_papers else {}
    known = {key: value for key, value in reading.options.items() if key in recipe.option_types()}
    torch.manual_seed(0)
    config = RunConfig(32, 64, 20, 64, None, reading.literal)
    return trained(recipe.make(config, {**printed, **known, **system.options}), steps)


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return list(trainer.variant.sae.state_dict().values())


def test_the_papers_readings_train_its_budget_and_the_field_s_a_hundred_times_as_much() -> None:
    tokens = {name: reading.steps * reading.batch_size for name, reading in READINGS.items()}
    assert tokens == {"evidence": 100_000, "field": 9_998_336, "literal": 100_000}
    assert {READINGS[name].batch_size for name in ("evidence", "literal")} == {125}


@each_reading
def test_every_system_logs_its_counter(reading: Reading, trained: Callable[..., Trainer]) -> None:
    for system in SYSTEMS:
        metrics = trainer_of(system, reading, trained).pop_metrics()
        assert not system.counter or system.counter in metrics, system.id
        assert all(system.counter != other.counter or other is system for other in SYSTEMS if other.counter)


def test_a_system_adds_to_the_one_before() -> None:
    chain = ["baseline", *[f"run-{n:02d}" for n in range(1, 9)], "run-09-no-inhibition", "run-09", "run-10"]
    assert [PAPER.systems[name].adds_to for name in chain[1:]] == chain[:-1]
    assert [system.recipes[0] for system in SYSTEMS if system.id in chain] == sorted(
        (s.recipes[0] for s in SYSTEMS), key=lambda name: (name != "collapse-baseline", name)
    )
    assert list(PAPER.systems["runs"].recipes) == [PAPER.systems[f"run-{n:02d}"].recipes[0] for n in range(1, 11)]


@each_reading
def test_monitors_change_nothing_and_what_follows_them_does(reading: Reading, trained: Callable[..., Trainer]) -> None:
    """Run 1 equals the baseline in every reading. In the literal reading, run 3 equals run 2, and its counter is 0."""
    made = {name: trainer_of(PAPER.systems[name], reading, trained, 4) for name in ("baseline", "run-01", "run-02",
            "run-03", "run-08", "run-09-no-inhibition")}  # fmt: skip
    found = {name: weights(trainer) for name, trainer in made.items()}

    def same(one: str, other: str) -> bool:
        return all(torch.equal(a, b) for a, b in zip(found[one], found[other], strict=True))

    assert same("run-01", "baseline")
    assert same("run-03", "run-02") == reading.literal
    assert (made["run-03"].pop_metrics()["penalty_moved"] == 0) == reading.literal
    assert not torch.equal(found["run-09-no-inhibition"][0], found["run-08"][0])
    assert made["run-09-no-inhibition"].pop_metrics()["outcompeted"] > 0
