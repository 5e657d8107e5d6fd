"""benchmarks/bench_decorrelation_scaling.py: the fitted exponent, the page, and the timing of both systems."""

import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

from sae.train.variant import RunConfig

FOLDER = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> dict:
    sys.path.insert(0, str(FOLDER))
    try:
        return runpy.run_path(str(FOLDER / "bench_decorrelation_scaling.py"))
    finally:
        sys.path.remove(str(FOLDER))


def test_the_exponent_of_a_power_is_that_power(script) -> None:
    sizes = [512, 1024, 4096]
    assert script["exponent"](sizes, [3e-3 * n**1.7 for n in sizes]) == pytest.approx(1.7)
    assert math.isnan(script["exponent"](sizes, [1.0, 0.0, 2.0]))


def test_the_page_has_the_medians_and_their_exponents(script) -> None:
    """A step takes 2 and 4 ms, and 3 and 8 ms with the penalty, which therefore adds 1 and 4 ms (p = 2).

    Of these, the search takes 0.5 and 1 ms (p = 1).
    """
    times = [
        script["Times"]([2.0, 1.0, 9.0], [3.0, 2.0, 12.0], [0.5] * 3),
        script["Times"]([4.0] * 3, [8.0] * 3, [1.0] * 3),
    ]
    page = script["page"]([512, 1024], times, 256, 2048, "cpu", 3)
    assert "| 512 | 500.0 | 333.3 | 1.50 | 1.0 (1.0 to 3.0) | 0.5 (0.5 to 0.5) |" in page
    assert "| 1024 | 250.0 | 125.0 | 2.00 | 4.0 (4.0 to 4.0) | 1.0 (1.0 to 1.0) |" in page
    for name, p in (("step without the penalty", 1), ("time added by the penalty", 2), ("search for pairs", 1)):
        assert f"| {name} | {p:.2f} | {p:.2f} |" in page


def test_it_times_the_penalty_against_the_same_system_without_it(script, monkeypatch) -> None:
    config = RunConfig(8, 32, 100, 16)
    times = script["measure"](config, "cpu", rounds=2, repeats=1)
    assert [len(values) for values in times] == [2, 2, 2] and min(times.plain + times.full + times.search) > 0
    x_BD = torch.randn(16, 8)
    full, plain = (script["make_trainer"](name, config, "cpu", x_BD) for name in ("decorrelation", "relu"))
    assert set(full.variant.terms) - set(plain.variant.terms) == {"decorrelation"}
    assert full.variant.sae.pre_bias is plain.variant.sae.pre_bias is False
    timed = {"relu": [1.0], "decorrelation": [3.0], "search": [0.5]}
    scripted = script["measure"].__globals__
    monkeypatch.setitem(scripted, "in_rounds", lambda ways, rounds: {name: timed[name] for name in ways})
    times = script["measure"](config, "cpu", rounds=1, repeats=1)
    assert (times.plain, times.full, times.added, times.search) == ([1.0], [3.0], [2.0], [0.5])
    penalty = script["search"](full, x_BD)()
    assert not penalty.requires_grad
    assert float(0.1 * penalty) == pytest.approx(float(full.forward_losses(x_BD)[1]["decorrelation"].detach()))
