"""Several processes write the same bytes as one."""

import json
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
    # Not `accelerate launch --cpu`, which starts one process whatever --num_processes says.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "sae"]
    told = subprocess.run(
        [*launch, *command(tiny_model, sentences, two)], check=True, env=environment, capture_output=True, text=True
    )
    files = [
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file() and p.name[0] != "."} for f in (one, two)
    ]
    records = [json.loads(of_one.pop(Path("harvest.json"))) for of_one in files]
    variables = [record["environment"].pop("variables") for record in records]
    assert variables[1] == variables[0] | {"WORLD_SIZE": "2"}  # so there were two
    for record in records:
        del record["content_digest"]
    assert files[0] == files[1] and records[0] == records[1]
    assert not list(two.glob(".rank*"))
    assert told.stderr.count("done     3,000 rows") == 1  # the first process speaks for both
