"""The tests of the metrics, run again with every measurement on the simulated GPU.

Their assertions are the same: planted answers, numbers worked out by hand, and numbers of SAEBench for the same inputs.
All arguments of `Metric.measure` (the model, the SAEs) are moved to the GPU first.
"""

import contextlib
import copy
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from sae.evaluate.metrics.base import Metric
from sae.evaluate.metrics.registry import METRICS
from sae.harvest.model import LanguageModel

from .functions import simulated_gpu
from .ledger import QUEUED, watch

TESTS = Path(__file__).parents[1] / "evaluate" / "metrics"


@dataclass
class Outcome:
    """The results of the tests, and the waits of the host in their measurements."""

    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # test -> its report
    measured: Counter[str] = field(default_factory=Counter)  # metric -> measurements on the GPU
    waits: Counter[str] = field(default_factory=Counter)  # entry of the ledger -> number of times

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed[report.nodeid] = report.longreprtext
        elif report.when == "call" and report.passed:
            self.passed.append(report.nodeid)


def run(files: Sequence[str], folder: Path, expression: str = "") -> dict[str, Any]:
    """Run the tests of some files of tests/evaluate/metrics."""
    outcome = Outcome()
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", f"--basetemp={folder}", "-k", expression, "-m", ""]
    with contextlib.ExitStack() as stack:
        for metric in {owner_of_measure(metric) for metric in METRICS.values()}:
            stack.enter_context(mock.patch.object(metric, "measure", on_gpu(metric.measure, outcome)))
        pytest.main([*options, *(str(TESTS / file) for file in files)], plugins=[outcome])
    return {name: getattr(outcome, name) for name in ("passed", "failed", "measured", "waits")}


def owner_of_measure(metric: type[Metric]) -> type[Metric]:
    return next(owner for owner in inspect.getmro(metric) if "measure" in vars(owner))


def on_gpu(measure: Callable[..., Any], outcome: Outcome) -> Callable[..., Any]:
    """Wrap `Metric.measure` so that its model and SAEs are on the simulated GPU."""

    @functools.wraps(measure)
    def measured(self: Metric, ctx: Any, targets: Sequence[Any], progress: Any) -> Any:
        if ctx.model.device.type == "cuda":
            return measure(self, ctx, targets, progress)
        outcome.measured[self.name] += 1
        with simulated_gpu():
            model = moved_model(ctx.model)
            moved = [replace(target, sae=moved_sae(target.sae)) for target in targets]
            there = replace(ctx, load_model=lambda: model, device="cuda")
            with watch() as seen:
                result = measure(self, there, moved, progress)
        outcome.waits.update(str(entry) for entry in seen.entries if entry.kind != QUEUED)
        return result

    return measured


def moved_model(model: LanguageModel) -> LanguageModel:
    return type(model)(copy.deepcopy(model.model).to("cuda"))


def moved_sae(sae: Any) -> Any:
    """A copy on the GPU of a test's SAE, which is a module or an object with tensors."""
    if isinstance(sae, nn.Module):
        return copy.deepcopy(sae).to("cuda")
    there = copy.copy(sae)
    for name, value in list(getattr(sae, "__dict__", {}).items()):
        if isinstance(value, torch.Tensor):
            setattr(there, name, value.to("cuda"))
        elif isinstance(value, nn.Module):
            setattr(there, name, copy.deepcopy(value).to("cuda"))
    return there
