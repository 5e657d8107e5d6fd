"""benchmarks/gpu: every part runs on the simulated GPU, and the report shows their results."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sae.train import variants  # noqa: F401  (registers the recipes)
from sae.train.recipe import RECIPES

from .gpu import SimulatedGPU

ROOT = Path(__file__).parents[2]
PAGE = """| recipe | latents |
| `topk` | 2304 | 2048 | 138 | 0.1 | 2.0 | 0.7 | 0.6 | 0.75 | 0.2 | 3.0 |
"""


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "gpu_report.py"))


def record(**parts: Any) -> dict[str, Any]:
    return {"date": "2026-12-01", "simulated": False, "parts": parts}


def test_a_page_has_modelled_beside_measured_and_says_what_is_incomplete(report, tmp_path: Path) -> None:
    (tmp_path / "2026-11-29-step-budget.md").write_text(PAGE.replace("0.75", "9.99"))
    (tmp_path / "2026-11-30-step-budget.md").write_text(PAGE)  # the newest counts
    modelled = report["modelled_ms"](tmp_path)
    assert modelled == {"topk 2304x2048": 0.75}
    found = {"topk 2304x2048": {"eager_ms": 1.5, "captured_ms": None}}
    page = report["page"](record(steps={"found": found, "error": "stopped after 150 s"}), modelled)
    assert "| topk 2304x2048 | 1.5 | refused | 0.75 |" in page and "incomplete: stopped after 150 s" in page


def test_the_constants_are_those_that_were_measured(report) -> None:
    """At the border both take equally long. Here it is the midpoint of 64 and 256 on a logarithmic scale."""
    ceilings = {
        "product bfloat16": {"flops": 7e14},
        "memory": {"bytes_per_s": 4e12},
        "launch": {"host_s": 1, "s": 3e-6},
    }
    border = {"64": {"sparse_ms": 4.0, "dense_ms": 2.0}, "256": {"sparse_ms": 1.0, "dense_ms": 2.0}}
    parts = {"ceilings": {"found": ceilings}, "border": {"found": border}}
    constants = report["constants"](parts)
    assert constants.pop('SPARSE_FROM["cuda"]["bfloat16"]') == pytest.approx(128)
    assert constants == {"FLOPS_BFLOAT16": 7e14, "BANDWIDTH": 4e12, "LAUNCH": 3e-6}
    assert report["constants"]({}) == {}


@pytest.mark.slow
def test_every_part_runs_on_the_simulated_gpu(gpu: SimulatedGPU, tmp_path: Path) -> None:
    """The test uses `gpu` only to be skipped where there is none. The script simulates its own GPU."""
    out, page = tmp_path / "gpu.json", tmp_path / "page.md"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in (
        ["benchmarks/gpu/run.py", "--simulated", "--seconds", "1500", "--out", str(out)],
        ["benchmarks/gpu_report.py", str(out), "--out", str(page)],
    ):
        subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)
    parts = json.loads(out.read_text())["parts"]
    assert [name for name, part in parts.items() if "error" in part] == []
    errors = {name: [f for f in part["found"].values() if "error" in f] for name, part in parts.items()}
    assert not any(errors.values()), errors
    assert set(parts["recipes"]["found"]) == set(RECIPES)
    assert all(one["apart"] == [] for one in parts["resume"]["found"].values())
    assert all(one["wrong"] == 0 for name, one in parts["kernels"]["found"].items() if name != "refused")
    assert parts["harvest"]["found"]["gemma 2 2b, random weights"]["waits"] == []
    assert "the code was tried, and nothing was measured" in page.read_text()
