"""The lines of metrics.jsonl that a resumed run keeps."""

import json
import warnings
from pathlib import Path

import pytest

from sae.common.errors import LeftOutWarning
from sae.train.run_folder import append_metrics, last_metrics, truncate_metrics


def test_lines_of_steps_that_will_be_taken_again_are_dropped(tmp_path: Path) -> None:
    """Lines up to and including the checkpoint's step are kept.

    A line that a kill cut off is dropped without a warning.
    """
    for step in (2, 4, 6):
        append_metrics(tmp_path, {"step": step, "loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        truncate_metrics(tmp_path, 4)
        truncate_metrics(tmp_path / "absent", 4)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]


def test_lines_without_a_step_are_dropped_and_counted(tmp_path: Path) -> None:
    text = '{"step": 1}\n{"loss": 1}\n{"step": "2"}\n{"step": true}\n{"step": 3.0}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.warns(LeftOutWarning, match="3 lines of .* that cannot be parsed"):
        truncate_metrics(tmp_path, 9)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 3.0}\n'


def test_the_last_whole_line_of_metrics_is_read_while_another_process_writes(tmp_path: Path) -> None:
    assert last_metrics(tmp_path) is None
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1')
    assert last_metrics(tmp_path) is None
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    assert last_metrics(tmp_path) == {"step": 2, "loss": 1.0}
    path.write_text('{"step": 1, "loss": 2.0}\n{"st#p": 2}\n')
    assert last_metrics(tmp_path) == {"step": 1, "loss": 2.0}
    path.write_text("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in range(10_000)))
    assert last_metrics(tmp_path) == {"step": 9999, "loss": 1.0}
