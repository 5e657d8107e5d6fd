"""The scripts in docs/scripts: a shell can parse them, and the commands that they call accept their arguments."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from torch.distributed.run import get_args_parser

from sae.cli.main import app

SCRIPTS = sorted((Path(__file__).parents[1] / "docs" / "scripts").glob("*.sh"))
SLURM = {
    "SLURM_ARRAY_TASK_ID": "2",
    "SLURM_ARRAY_TASK_COUNT": "3",
    "SLURM_CPUS_PER_TASK": "1",
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NODELIST": "node[1-4]",
    "SLURM_JOB_NUM_NODES": "4",
}
# Stand-ins for the real programs, which record their arguments. Those for srun and torchrun also start their command.
CALLED = """#!{python}
import json, os, sys
words = sys.argv[1:]
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *words]) + "\\n")
name = os.path.basename(sys.argv[0])
if name == "scontrol":
    print("node1\\nnode2")
elif name == "srun":
    os.execvp(words[0], words)
elif name == "torchrun":
    os.execvp("sae", ["sae", *words[words.index("-m") + 2 :]])
"""


def run_script(script: Path, folder: Path) -> list[list[str]]:
    """The commands that a script called, as words."""
    programs, calls = folder / "bin", folder / "calls"
    programs.mkdir()
    for name in ("sae", "torchrun", "srun", "scontrol"):
        (programs / name).write_text(CALLED.format(python=sys.executable))
        (programs / name).chmod(0o755)
    environment = SLURM | {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(calls)}
    done = subprocess.run(["bash", str(script)], env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in calls.read_text().splitlines()]


def check_sae(words: list[str]) -> None:
    """Fail unless the command line accepts these words."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    assert not hasattr(command, "commands"), words
    command.make_context("sae", list(words))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_a_script_calls_takes_what_it_says(script: Path, tmp_path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    called = run_script(script, tmp_path)
    assert any(name == "sae" for name, *_ in called)
    for name, *words in called:
        if name == "sae":
            check_sae(words)
        elif name == "torchrun":
            launched = get_args_parser().parse_args(words)
            assert launched.module and launched.training_script == "sae"


def test_there_are_scripts_and_a_page_names_each() -> None:
    page = (SCRIPTS[0].parents[1] / "how-to" / "several-gpus.md").read_text()
    assert len(SCRIPTS) >= 4 and all(f"(../scripts/{script.name})" in page for script in SCRIPTS)


@pytest.mark.slow
def test_the_array_script_harvests_in_any_order(tiny_model: Path, sentences: Path, tmp_path: Path, launcher) -> None:
    """Three tasks run the real `sae`, the last one first, and write the same files as a harvest in one process."""
    script = next(path for path in SCRIPTS if path.name == "slurm-array.sh")
    (tmp_path / "sae").write_text(
        f'#!/bin/bash\nexec {sys.executable} -P -m sae "$@" --dataset {sentences} --window 256\n'
    )
    (tmp_path / "sae").chmod(0o755)
    out = tmp_path / "cache"
    settings = {"MODEL": str(tiny_model), "OUT": str(out), "LAYER": "1", "TOKENS": "2100"}
    complete = []
    for task in (2, 0, 1):
        more = {"SLURM_ARRAY_TASK_ID": str(task), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", str(script)], env=os.environ | SLURM | settings | more, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        complete.append((out / "manifest.json").exists())
    assert complete == [False, False, True]
    alone = tmp_path / "alone"
    words = ["harvest", "--model", tiny_model, "--dataset", sentences, "--layer", "1", "--tokens", "2100"]
    words += ["--window", "256", "--out", alone]
    for command in (["cache", "verify", out], words):
        asked = {"words": ["0", *map(str, command)], "folder": tmp_path, "environment": dict(os.environ)}
        code, _, told = launcher("forked_ranks.launch", **asked)
        assert code == 0, told
    files = [{path.name: path.read_bytes() for path in (one / "layer_01").iterdir()} for one in (out, alone)]
    assert len(files[0]) > 1 and files[0] == files[1]
