"""Several processes write the same bytes as one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def command(tiny_model: Path, sentences: Path, out: Path) -> list[str]:
    words = ["harvest", "--model", tiny_model, "--dataset", sentences, "--layer", 0, "--layer", 1, "--tokens", 3000]
    return [*map(str, words), "--context", "32", "--window", "256", "--batch-contexts", "8", "--out", str(out)]


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(tiny_model: Path, sentences: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "sae", *command(tiny_model, sentences, one)], check=True, env=environment)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "sae"]
    told = subprocess.run(
        [*launch, *command(tiny_model, sentences, two)], check=True, env=environment, capture_output=True, text=True
    )
    files = [
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file() and p.name[0] != "."} for f in (one, two)
    ]
    assert files[0] == files[1]
    assert told.stderr.count("done     3,000 rows") == 1  # the first process speaks for both
