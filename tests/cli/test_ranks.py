"""What each of several launched processes prints: the first reports for all, the others prefix their rank."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from sae.cli import console
from sae.cli.main import app
from sae.cli.train import execute
from sae.common.errors import DamagedError, ReportedElsewhere, SaeError
from sae.train import loggers
from sae.train.progress import Overview, TrainProgress

LINE = {"loss": 0.25, "l0": 8.0, "explained_variance": 0.75, "dead": 0.5, "waited_for_data": 0.0, "step": 4.0}


def plan_of(*names: str) -> SimpleNamespace:
    config = SimpleNamespace(l0=None)
    runs = [SimpleNamespace(name=name, folder=Path(name), config=config, cache_folders=[]) for name in names]
    return SimpleNamespace(runs=runs, config=SimpleNamespace(log=()))


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    """This is the process of rank 1."""
    monkeypatch.setattr(console, "RANK", 1)
    monkeypatch.setattr(console, "QUIET", True)


def test_the_first_process_shows_the_runs_of_all(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A logger gets the runs of its own process. A log line of an earlier version does not appear in the table."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    logged: list[str] = []
    monkeypatch.setattr(loggers.Loggers, "log", lambda self, metrics: logged.extend(metrics))
    monkeypatch.setattr(console, "SECONDS_PER_LINE", -1)

    def run(progress: TrainProgress) -> None:
        progress.step(4, 8, {"mine": LINE})
        progress.overview(Overview(8, 24, frozenset({"other"}), 3, {"other": LINE, "old": {"step": 2.0}}))
        progress.overview(Overview(20, 24, frozenset({"other", "mine"}), 3, {"other": LINE, "mine": LINE}))
        progress.say_problem("mine: the loss was not finite")

    execute(plan_of("mine", "other", "old"), run)
    shown = capsys.readouterr()
    assert logged == ["mine"]
    assert [line.split()[0] for line in shown.out.splitlines()] == ["trained", "run", "other", "mine"]
    first, second, problem, done = shown.err.splitlines()
    assert first.startswith("train 8/24 33.3% ") and "1 of 3 runs finished" in first
    assert second.startswith("train 20/24 83.3% ") and "2 of 3 runs finished" in second
    assert problem == "mine: the loss was not finite" and done.startswith("done     in ")


def test_another_process_prints_its_problems_alone(second: None, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(console, "SECONDS_PER_LINE", -1)

    def run(progress: TrainProgress) -> None:
        progress.step(4, 8, {"mine": LINE})
        progress.say("mine resumes from step 2.")
        progress.say_problem("mine: the loss was not finite")

    execute(plan_of("mine"), run)
    assert tuple(capsys.readouterr()) == ("", "rank 1: mine: the loss was not finite\n")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (SaeError("One failed."), 1, "rank 1: error: One failed.\n"),
        (DamagedError("It is short."), 3, "rank 1: error: It is short.\n"),
        (OSError(28, "No space left on device"), 4, "rank 1: error: No space left on device. Free some space"),
        (MemoryError("no room"), 4, "rank 1: error: Out of memory: no room."),
        (ReportedElsewhere(3, "It is short."), 3, ""),
    ],
)
def test_an_error_names_its_process_or_is_left_to_another(second: None, capsys, error, code: int, line: str) -> None:
    @console.cli_command
    def fail() -> None:
        raise error

    with pytest.raises(typer.Exit) as ended:
        fail()
    said = capsys.readouterr().err
    assert ended.value.exit_code == code and (said.startswith(line) if line else said == "")


def test_an_error_that_is_said_before_a_process_leaves_is_printed_once(second: None, capsys) -> None:
    error = DamagedError("2 of 3 runs are not finished.")

    def run(progress: TrainProgress) -> None:
        progress.end(error)
        assert capsys.readouterr().err == f"rank 1: error: {error}\n"
        raise error

    with pytest.raises(typer.Exit) as ended:
        console.cli_command(lambda: execute(plan_of("mine"), run))()
    assert ended.value.exit_code == 3 and capsys.readouterr().err == ""


def test_a_dry_run_shows_the_deal(tiny_cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes agree on the plan. Here one process stands for two."""
    monkeypatch.setattr("sae.train.plan.rank_and_count", lambda: (0, 2))
    words = ["train", "--cache", str(tiny_cache.folder), "--layer", "1", "--variant", "relu", "--steps", "4"]
    words += ["--seed", "0", "--seed", "1", "--batch-size", "64", "--width", "2x", "--device", "cpu", "--dry-run"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "runs")], catch_exceptions=False)
    assert done.exit_code == 0
    dealt = [line for line in done.stderr.splitlines() if line.startswith(("deal", "rank"))]
    assert dealt[0].startswith("deal     2 runs to 2 processes") and [line[:16] for line in dealt[1:]] == [
        "rank 0   1 run i", "rank 1   1 run i",
    ]  # fmt: skip
    assert "time " not in done.stderr and not (tmp_path / "runs").exists()
