"""What `sae train` shows: the groups of its flags, and the runs that its progress names."""

import re
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from sae.cli.main import app
from sae.cli.train import progress_note

METRICS = {"loss": 0.51234, "l0": 32.0, "explained_variance": 0.75, "dead": 0.125, "waited_for_data": 0.0}
NUMBERS = "loss 0.5123, L0 32.0, EV 0.750, dead 12.5%"


@pytest.mark.parametrize(
    ("names", "live", "note"),
    [
        (["topk-a"], True, NUMBERS),
        (["topk-a"], False, NUMBERS),
        (["topk-a", "relu-b"], True, ""),  # the table under the bar has them all
        (["topk-a", "relu-b"], False, f"topk-a: {NUMBERS}"),
    ],
)
def test_progress_names_the_run_that_it_shows(names: list[str], live: bool, note: str) -> None:
    runs = [SimpleNamespace(name=name) for name in names]
    assert progress_note(dict.fromkeys(names, METRICS), runs, live) == note


def test_progress_without_metrics_has_no_note() -> None:
    assert progress_note({}, [SimpleNamespace(name="topk-a")], False) == ""


def test_the_first_group_of_flags_is_short_and_the_others_are_named() -> None:
    text = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).stdout
    titles = re.findall(r"─ ([A-Z][^─]*?) ─", text)
    assert titles == [
        "Options", "Data and batches", "Harvesting while training (with --stream)", "Checkpoints and logging",
        "Machine",
    ]  # fmt: skip
    first = text.partition("Data and batches")[0]
    assert len(re.findall(r"^│ +--", first, re.M)) <= 13  # with --config and --help
    assert "--literal" not in text and "--order-seed" not in text
