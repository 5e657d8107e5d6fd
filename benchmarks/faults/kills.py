"""Processes that are killed or interrupted."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from faults.command import HARVEST, INTERRUPTED, OK, TRAIN, Command, Outcome, sae
from faults.inputs import count_commits, same_bytes, wait_until
from faults.table import Matrix

KILLS, CTRL_CS = 50, 12


def phase_of(folder: Path) -> str:
    """The phase that a killed harvest was in, judged by the files it left."""
    if not (folder / "tokens" / "commit.json").exists():
        return "cutting text"
    if not count_commits(folder) and not any(folder.glob("layer_*/c*")):
        return "before the first window"
    if (folder / "zarr.json").exists() and json.loads((folder / "zarr.json").read_text())["attributes"]["complete"]:
        return "done"
    if count_commits(folder) == 48:
        return "sealing"
    strays = any(folder.rglob("*.tmp-*"))
    loose = {p.name.split(".")[1] for p in folder.glob("layer_00/c.*")} - {
        str(int(p.name.split(".")[0])) for p in folder.glob("commits/*layer_00.json")
    }
    return "writing" if strays or loose else "computing"


def kills(m: Matrix) -> None:
    m.head("Kill -9, signals")
    rng, phases, wrong = random.Random(0), Counter[str](), 0
    for number in range(KILLS):
        out = Path(f"killed{number}")
        command = Command(*HARVEST, "--out", out)
        stage = number % 10
        if stage < 2:  # while the text is read and cut into contexts
            wait_until(command, out.exists)
            time.sleep(rng.uniform(0, 0.03))
        elif stage < 9:
            at = rng.randrange(0, 48)
            wait_until(command, lambda: count_commits(out) > at)  # noqa: B023
            time.sleep(rng.uniform(0, 0.008))
        else:
            wait_until(command, lambda: count_commits(out) == 48)  # noqa: B023
            time.sleep(rng.uniform(0, 0.01))
        command.send(signal.SIGKILL)
        killed = command.wait()
        phases[
            "too late: it was done" if killed.code == OK else phase_of(out) if out.exists() else "no folder yet"
        ] += 1
        again = sae(*HARVEST, "--out", out)
        wrong += again.code != OK or not same_bytes(out) or "Traceback" in again.err
        shutil.rmtree(out)
    found = ", ".join(f"{count} {phase}" for phase, count in phases.most_common())
    outcome = Outcome(-9, "", f"nothing: the process is gone ({found})")
    after = f"the same command ended with 0 and the bytes of an undisturbed harvest {KILLS - wrong} of {KILLS} times"
    m.row(f"kill -9 at {KILLS} instants of 24 windows x 2 layers", outcome, -9, after, wrong == 0)

    rows = [("SIGTERM", [signal.SIGTERM]), ("Ctrl-C", [signal.SIGINT]), ("Ctrl-C twice", [signal.SIGINT] * 2)]
    for name, numbers in rows:
        out = Path(name.replace(" ", "-"))
        command = Command(*HARVEST, "--batch-contexts", 1, "--out", out)
        wait_until(command, lambda: count_commits(out) >= 4)  # noqa: B023
        for number in numbers:
            command.send(number)
            time.sleep(0.002)
        outcome = command.wait()
        left = f"{count_commits(out)} of 48 commits"
        again = sae(*HARVEST, "--batch-contexts", 1, "--out", out)
        verified = sae("cache", "verify", out)
        m.row(
            name,
            outcome,
            INTERRUPTED,
            f"{left}; the same command goes on and ends with {again.code}",
            again.code == OK,
            verified.code == OK,
            not list(out.glob(".lock.holder")),
            same_bytes(out, "single"),
        )
    codes, broken, swallowed, worst = Counter[int](), 0, 0, Outcome(INTERRUPTED, "", "")
    for number in range(CTRL_CS):
        out = Path(f"ctrl-c{number}")
        command = Command(*HARVEST, "--out", out, new_process=number % 4 == 0)
        if number % 4 == 0:  # while torch and transformers are imported
            time.sleep(rng.uniform(0.4, 3))
        else:
            wait_until(command, lambda: command.started)  # noqa: B023
            time.sleep(rng.uniform(0.01, 1))
        for _ in range(1 + number % 2):
            command.send(signal.SIGINT)
            time.sleep(rng.uniform(0, 0.003))
        outcome = command.wait()
        codes[outcome.code] += 1
        # Python itself reports and then drops an interrupt that arrives during a callback of its garbage collector.
        quiet = re.sub(r"Exception ignored in: .*\nTraceback(.*\n)*?KeyboardInterrupt:? *\n", "", outcome.err)
        swallowed += quiet != outcome.err
        # If the signal arrives in C code while torch is imported, the signal ends Python directly. A shell shows the
        # exit code 130 for a process that SIGINT ended.
        if outcome.code == -signal.SIGINT:
            outcome = outcome._replace(code=INTERRUPTED)
        wrong = outcome.code not in (OK, INTERRUPTED) or "Traceback" in quiet
        if wrong or (outcome.code == INTERRUPTED and not worst.err):
            worst = outcome._replace(err=quiet)
        again = sae(*HARVEST, "--out", out)
        broken += again.code != OK or not same_bytes(out)
    after = (
        f"exit codes {dict(codes)}; the same command ended in the same bytes {CTRL_CS - broken} of {CTRL_CS} times; "
        f"Python lost an interrupt in its own garbage collection {swallowed} times"
    )
    m.row(f"Ctrl-C at {CTRL_CS} random instants, every other time twice", worst, INTERRUPTED, after, broken == 0)


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(word) for word in found.split()]


def launched(m: Matrix) -> None:
    # `accelerate launch --cpu` starts one process for any value of --num_processes.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "sae"]
    words = [*launch, *map(str, HARVEST), "--out", "pair"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and count_commits(Path("pair")) < 6:
        time.sleep(0.002)
    if pair := children(process.pid):
        os.kill(pair[-1], signal.SIGKILL)
    said = process.communicate(timeout=120)[0]
    left = count_commits(Path("pair"))
    again = subprocess.run(words, capture_output=True, text=True, timeout=120)
    # torch's launcher prints its own traceback about the lost child; only the messages of our process count.
    ours = [line for line in said.splitlines() if re.match("(error|stopped): ", line)]
    outcome = Outcome(
        process.returncode,
        "",
        (ours or ["nothing of ours: the launcher ends the other process and reports the lost one"])[-1],
    )
    m.row(
        "kill -9 of one of two processes under `torchrun`",
        outcome,
        1,
        f"{left} of 48 commits; the same command ended with {again.returncode} and the same bytes",
        len(pair) == 2,
        again.returncode == 0,
        same_bytes("pair", leaving_out="harvest.json"),  # this file records the OMP_NUM_THREADS that torchrun sets
        "/sae/cli/console.py" not in said,
    )


def dealt(m: Matrix) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "sae"]
    words = [*TRAIN, "--cache", "whole", "--seed", 0, "--seed", 1, "--steps", 2000, "--checkpoint-every", 50]
    words += ["--device", "cpu"]
    whole = sae(*words, "--out", "trained-alone")
    command = [*launch, *map(str, words), "--out", "trained"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def checkpoints() -> list[Path]:
        return list(Path("trained").glob("*/checkpoints/*/state.json"))

    while process.poll() is None and len({path.parents[2] for path in checkpoints()}) < 2:
        time.sleep(0.002)
    if pair := children(process.pid):
        os.kill(pair[-1], signal.SIGKILL)
    said = process.communicate(timeout=120)[0]
    left = sorted(int(path.parent.name[5:]) for path in checkpoints())
    finished = len(list(Path("trained").glob("*/sae.json")))
    again = sae(*words, "--out", "trained")
    weights = [
        {path.parent.name: path.read_bytes() for path in Path(out).glob("*/sae.safetensors")}
        for out in ("trained", "trained-alone")
    ]
    lines = said.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("stopped: ")]
    ours = " ".join(lines[starts[0] : starts[0] + 2]) if starts else "nothing of ours"
    m.row(
        "kill -9 of one of two processes of `sae train` under `torchrun`",
        Outcome(process.returncode, "", ours),
        1,
        f"checkpoints to step {left[-1]}; the same command in one process ended with {again.code} and the same bytes",
        whole.code == OK,
        len(pair) == 2,
        finished == 0,
        "died before it had finished" in ours,
        again.code == OK,
        len(weights[0]) == 2 and weights[0] == weights[1],
        "/sae/cli/console.py" not in said,
    )
