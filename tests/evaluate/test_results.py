"""Results with other settings are archived, and concurrent replacements lose none of them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sae.common import locks
from sae.common.errors import UnavailableError
from sae.evaluate import results
from sae.evaluate.metrics.base import MetricResult
from sae.evaluate.metrics.core import Core
from sae.evaluate.results import read_result, result_file, write_result

METRIC = Core()


def settings(number: int) -> dict[str, Any]:
    return {"contexts": number}


def write(run: Path, number: int) -> None:
    write_result(run, METRIC, settings(number), MetricResult({"sparsity": {"l0": float(number)}}), {})


def l0_of(run: Path, number: int) -> float | None:
    found = read_result(run, METRIC, settings(number))
    return found and found.metrics["sparsity"]["l0"]


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no locks")

    monkeypatch.setattr(locks, "acquire", refuse)


@pytest.mark.parametrize("step", ["archive_other_settings", "archived_file", "atomic_write"])
@pytest.mark.parametrize("call", [0, 1, 2, 3])
def test_two_ranks_that_bring_a_result_back_lose_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, call: int
) -> None:
    """The second rank runs completely between two steps of the first, on a file system without locks."""
    write(tmp_path, 1)
    write(tmp_path, 2)
    without_locks(monkeypatch)
    original: Callable[..., Any] = getattr(results, step)
    calls: list[int] = []

    def second_between(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == call + 1:
            monkeypatch.setattr(results, step, original)
            assert l0_of(tmp_path, 1) == 1
        return original(*arguments)

    monkeypatch.setattr(results, step, second_between)
    assert l0_of(tmp_path, 1) == 1
    monkeypatch.setattr(results, step, original)
    assert [l0_of(tmp_path, number) for number in (2, 1, 2)] == [2, 1, 2]


def test_a_result_that_was_just_measured_is_not_replaced_by_one_that_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One command restores an archived result while another writes a new one; the second waits for the first."""
    write(tmp_path, 1)
    write(tmp_path, 2)
    archive, measured = results.archive_other_settings, []

    def measure_meanwhile(*arguments: Any) -> None:
        monkeypatch.setattr(results, "archive_other_settings", archive)
        archive(*arguments)
        measured.append(pool.submit(write, tmp_path, 3))
        with pytest.raises(TimeoutError):
            measured[0].result(timeout=0.1)

    monkeypatch.setattr(results, "archive_other_settings", measure_meanwhile)
    with ThreadPoolExecutor(1) as pool:
        assert l0_of(tmp_path, 1) == 1
    measured[0].result()
    assert [l0_of(tmp_path, number) for number in (1, 2, 3)] == [1, 2, 3]


def test_a_result_that_cannot_be_set_aside_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    (tmp_path / "evaluations" / "earlier").write_text("a file")
    with pytest.raises(UnavailableError, match="Cannot write"):
        write(tmp_path, 2)
    assert l0_of(tmp_path, 1) == 1 and result_file(tmp_path, METRIC).exists()


def test_a_result_that_is_measured_again_with_the_same_settings_is_not_archived(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 1)
    assert [path.name for path in (tmp_path / "evaluations").iterdir() if path.name[0] != "."] == ["core.json"]


def test_the_numbers_and_details_without_outlier_rows_are_read_back(tmp_path: Path) -> None:
    masked = MetricResult({"sparsity": {"l0": 1.0}}, [{"latent": 1}])
    result = MetricResult({"sparsity": {"l0": 2.0}}, [{"latent": 2}], masked=masked)
    write_result(tmp_path, METRIC, settings(1), result, {})
    assert read_result(tmp_path, METRIC, settings(1)) == result
