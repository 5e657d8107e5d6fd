"""Every fault of cache and harvest, caused through the real command line: `python benchmarks/fault_matrix.py`.

A random Gemma 2 of two blocks harvests a small text; each fault is then caused to a process or to the files, and what
the command said, its exit code and what the next command made of it become a row of docs/faults.md. The script fails
when an exit code is not the expected one, when a traceback was printed, or when bytes are not those of an undisturbed
harvest. Commands run in processes forked from one that has torch imported already; those whose fault is in how a
process starts (signals to its parents, locale, pipes, limits) are started afresh.
"""

import argparse
import contextlib
import datetime
import gzip
import io
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
OK, FAILED, USAGE, DAMAGED, OUTSIDE, INTERRUPTED = 0, 1, 2, 3, 4, 130
KILLS, CTRL_CS = 50, 12
SAE = [sys.executable, "-m", "sae"]
TEXT = ["--dataset", "sentences.jsonl", "--tokens", 6000]
SHAPE = ["--context", 32, "--window", 256, "--batch-contexts", 8, "--device", "cpu"]
BOTH = ["--layer", 0, "--layer", 1]
HARVEST = ["harvest", "--model", "./tiny", *TEXT, *BOTH, *SHAPE]  # 24 windows of two layers
TRAIN = ["train", "--variant", "topk", "--layer", 0, "--batch-size", 64, "--width", 64, "--set", "k=4"]

context = multiprocessing.get_context("forkserver")


class Told(NamedTuple):
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """From the last sentence that begins with a word of ours on; else the last line, without the frame around it."""
        text = self.err.strip() or self.out.strip()
        framed = re.sub("[│╭╮╰╯─]|Error ─", "", text[text.find("╭") :]) if "╭" in text else text
        lines = [" ".join(framed.split())] if "╭" in text else text.splitlines()
        starts = [n for n, line in enumerate(lines) if re.match(r"(error|stopped|done) *:? ", line)]
        told = lines[starts[-1] :] if starts else lines[-1:]
        return " ".join(line.strip() for line in told if not line.startswith("next "))


class Command:
    """`sae` with these words, begun in the working directory."""

    def __init__(
        self,
        *words: Any,
        afresh: bool = False,
        stdin: str = "",
        env: dict[str, str | None] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.words = [str(word) for word in words]
        self.files = [Path(tempfile.mkstemp()[1]) for _ in range(3)]
        self.files[0].write_text(stdin)
        if afresh or prefix:
            environment = {k: v for k, v in (os.environ | (env or {})).items() if v is not None}
            streams = [open(file, mode) for file, mode in zip(self.files, ("r", "w", "w"), strict=True)]
            self.process: Any = subprocess.Popen(
                [*prefix, *SAE, *self.words], stdin=streams[0], stdout=streams[1], stderr=streams[2], env=environment
            )
            self.code = self.process.wait
        else:
            self.process = context.Process(target=forked, args=(self.words, self.files, env or {}))
            self.process.start()
            self.code = self._join
        self.pid = self.process.pid

    def _join(self, timeout: float) -> int:
        self.process.join(timeout)
        return self.process.exitcode

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def running(self) -> bool:
        return (self.process.poll() is None) if isinstance(self.process, subprocess.Popen) else self.process.is_alive()

    @property
    def begun(self) -> bool:
        """Whether Python has come as far as our first line."""
        return not self.files[0].exists()

    @property
    def err(self) -> str:
        return self.files[2].read_text(errors="replace")

    def told(self) -> Told:
        """Wait for its end."""
        code = self.code(timeout=200)
        told = Told(code, self.files[1].read_text(errors="replace"), self.err)
        for file in self.files:
            file.unlink(missing_ok=True)
        return told


def forked(words: list[str], files: list[Path], env: dict[str, str]) -> None:
    """`sae` in a process that has imported everything: the same entry point, with the streams of a process of its own."""
    for number, (file, flags) in enumerate(zip(files, (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY), strict=True)):
        os.dup2(os.open(file, flags), number)
    sys.stdin, sys.argv = open(0), ["sae", *words]
    os.environ |= env
    from sae.cli.main import app

    files[0].unlink()
    app(prog_name="sae")


def sae(*words: Any, **how: Any) -> Told:
    return Command(*words, **how).told()


class Matrix:
    """The rows of the table, and what broke the rule."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str, str]] = []
        self.broken: list[str] = []

    def head(self, title: str) -> None:
        self.rows.append((title, "", "", ""))

    def row(self, fault: str, told: Told, code: int | tuple[int, ...], after: str, *holds: bool) -> None:
        """A fault, what was seen, the exit code it has to have, what is left or comes next, and what has to hold."""
        codes = (code,) if isinstance(code, int) else code
        problems = []
        if told.code not in codes:
            problems.append(f"exit code {told.code}, expected {code}")
        if "Traceback" in told.out + told.err or "Exception ignored" in told.err:
            problems.append("a traceback")
        if told.code and len(told.last) < 20:
            problems.append(f"no sentence: {told.last!r}")
        if not all(holds):
            problems.append("the bytes or the folder are not as they should be")
        if problems:
            self.broken.append(f"{fault}: {', '.join(problems)}\n{told.err[-3000:] or told.out[-3000:]}")
        self.rows.append((fault, shown(told.last), str(told.code), after + (" **BROKEN**" if problems else "")))
        print(
            f"{'BROKEN' if problems else 'ok':7s}{told.code:4d}  {fault}: {shown(told.last)[:160]} | {after}",
            flush=True,
        )


def shown(text: str) -> str:
    """Without what is of this machine and moment."""
    text = text.replace(f"{os.getcwd()}/", "").replace(os.getcwd(), ".")
    text = re.sub(r"process \d+ on \S+", "process N on HOST", text)
    text = re.sub(r"since [\d-]+ [\d:]+", "since TIME", text)
    text = re.sub(r"in \d+ s;", "in N s;", text)
    return text.replace("|", "\\|").replace("<", "&lt;")


# --- folders and files ----------------------------------------------------------------------------------------------


def bytes_of(folder: Path | str) -> dict[str, bytes]:
    """Every file but the lock."""
    folder = Path(folder)
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "."}


def same(folder: Path | str, as_: str = "whole") -> bool:
    return bytes_of(folder) == bytes_of(as_)


def copy_of(name: str, as_: str = "whole") -> Path:
    shutil.rmtree(name, ignore_errors=True)
    return Path(shutil.copytree(as_, name))


def commits(folder: Path) -> int:
    return len(list(folder.glob("commits/*.json")))


def wait_until(command: Command, reached: Callable[[], bool]) -> bool:
    while not reached():
        if not command.running:
            return False
        time.sleep(0.0005)
    return True


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 16
    path.write_bytes(raw)


@contextlib.contextmanager
def disk(name: str, size: str) -> Iterator[Path | None]:
    """A small disk of its own; None where mounting is not permitted."""
    Path(name).mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", name]
    if subprocess.run(words, capture_output=True).returncode:
        yield None
        return
    try:
        yield Path(name)
    finally:
        subprocess.run(["umount", name], check=True)


def remount(name: str, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", name], check=True)


def make_model(folder: str, seed: int) -> None:
    """A random Gemma 2 of two blocks with gemma-2-mini's tokenizer, as in tests/conftest.py."""
    import torch
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    from sae.harvest.mini import WEIGHTS

    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=8192,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    model = Gemma2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3 if "embed" in name else 0.2)
    if folder == "nan":
        model.model.layers[1].mlp.down_proj.weight.data[3, 3] = float("nan")
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(WEIGHTS).save_pretrained(folder)


def spoil_weights() -> None:
    import safetensors.torch

    Path("bare/model.safetensors").unlink()
    truncate(Path("torn/model.safetensors"))
    weights = safetensors.torch.load_file("lacking/model.safetensors")
    del weights["model.layers.0.mlp.down_proj.weight"]
    safetensors.torch.save_file(weights, "lacking/model.safetensors", metadata={"format": "pt"})
    config = json.loads(Path("wide/config.json").read_text())
    Path("wide/config.json").write_text(json.dumps(config | {"hidden_size": 48}))


def make_text() -> list[dict[str, str]]:
    words = "the quick brown fox jumps over a lazy dog while seven zebras quietly read their yellow books".split()
    rng = random.Random(0)
    rows = [{"text": " ".join(rng.choices(words, k=rng.randrange(20, 200)))} for _ in range(120)]
    Path("sentences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("long.txt").write_text("\n\n".join(" ".join(rng.choices(words, k=30_000)) for _ in range(4)))
    return rows


# --- the faults -----------------------------------------------------------------------------------------------------
# A fault is a line.
# fmt: off


def full_disks(m: Matrix) -> None:
    m.head("The disk")
    with disk("small", "400k") as found:
        if found is None:
            m.rows.append(("a full or read-only disk", "not tried here: mounting is not permitted", "", ""))
            return
        told = sae(*HARVEST, "--out", "small/cache")
        left = [p.name for p in Path("small").rglob("*") if p.is_file() and p.name[0] != "."]
        m.row("disk too small, seen before", told, OUTSIDE, "nothing is written", not left)
    for number, size in enumerate(range(1000, 2000, 140)):
        with disk(f"full{number}", f"{size}k"):
            out = Path(f"full{number}/cache")
            told = sae(*HARVEST, "--out", out)
            where = "complete" if told.code == OK else f"{commits(out)} commits"
            remount(f"full{number}", "size=10m")
            again = sae(*HARVEST, "--out", out)
            holds = (again.code == OK, same(out))
            if told.code or not all(holds):
                after = f"{where}; after space was freed the same command ended with {again.code} and the same bytes"
                m.row(f"disk of {size} kB, full in the middle", told, OUTSIDE, after, *holds)
    with disk("locked", "10m"):
        copy_of("locked/cache")
        remount("locked", "ro")
        for words, code in (
            (["cache", "info", "locked/cache"], OK),
            (["cache", "verify", "locked/cache"], OK),
            (["cache", "list"], OK),
            ([*TRAIN, "--cache", "locked/cache", "--steps", 5, "--out", "runs-elsewhere"], OK),
            ([*TRAIN, "--cache", "locked/cache", "--steps", 5, "--out", "locked/runs"], OUTSIDE),
            ([*HARVEST, "--out", "locked/cache"], OUTSIDE),
            ([*HARVEST, "--out", "locked/new"], OUTSIDE),
            (["cache", "repair", "locked/cache"], OUTSIDE),
            (["cache", "rm", "locked/cache", "--yes"], OUTSIDE),
        ):
            told = sae(*words)
            name = " ".join(map(str, words[: 2 if words[0] == "cache" else 1]))
            into = "" if words[0] == "cache" else f" {words[-2]} {words[-1]}"
            m.row(f"read-only disk: `sae {name}{into}`", told, code, "unchanged", same("locked/cache"))
        remount("locked", "rw")


def phase_of(folder: Path) -> str:
    """What a killed harvest was at, from what it left."""
    if not (folder / "tokens" / "commit.json").exists():
        return "cutting text"
    if not commits(folder) and not any(folder.glob("layer_*/c*")):
        return "before the first window"
    if (folder / "zarr.json").exists() and json.loads((folder / "zarr.json").read_text())["attributes"]["complete"]:
        return "done"
    if commits(folder) == 48:
        return "sealing"
    strays = any(folder.rglob("*.tmp-*"))
    loose = {p.name.split(".")[1] for p in folder.glob("layer_00/c.*")} - {str(int(p.name.split(".")[0])) for p in folder.glob("commits/*layer_00.json")}
    return "writing" if strays or loose else "computing"


def kills(m: Matrix) -> None:
    m.head("Kill -9, signals")
    rng, phases, wrong = random.Random(0), Counter[str](), 0
    for number in range(KILLS):
        out = Path(f"killed{number}")
        command = Command(*HARVEST, "--out", out)
        stage = number % 10
        if stage < 2:  # while the text is read and cut
            wait_until(command, out.exists)
            time.sleep(rng.uniform(0, 0.03))
        elif stage < 9:
            at = rng.randrange(0, 48)
            wait_until(command, lambda: commits(out) > at)  # noqa: B023
            time.sleep(rng.uniform(0, 0.008))
        else:
            wait_until(command, lambda: commits(out) == 48)  # noqa: B023
            time.sleep(rng.uniform(0, 0.01))
        command.send(signal.SIGKILL)
        killed = command.told()
        phases["too late: it was done" if killed.code == OK else phase_of(out) if out.exists() else "no folder yet"] += 1
        again = sae(*HARVEST, "--out", out)
        wrong += again.code != OK or not same(out) or "Traceback" in again.err
        shutil.rmtree(out)
    found = ", ".join(f"{count} {phase}" for phase, count in phases.most_common())
    told = Told(-9, "", f"nothing: the process is gone ({found})")
    after = f"the same command ended with 0 and the bytes of an undisturbed harvest {KILLS - wrong} of {KILLS} times"
    m.row(f"kill -9 at {KILLS} instants of 24 windows x 2 layers", told, -9, after, wrong == 0)

    rows = [("SIGTERM", [signal.SIGTERM]), ("Ctrl-C", [signal.SIGINT]), ("Ctrl-C twice", [signal.SIGINT] * 2)]
    for name, numbers in rows:
        out = Path(name.replace(" ", "-"))
        command = Command(*HARVEST, "--batch-contexts", 1, "--out", out)
        wait_until(command, lambda: commits(out) >= 4)  # noqa: B023
        for number in numbers:
            command.send(number)
            time.sleep(0.002)
        told = command.told()
        left = f"{commits(out)} of 48 commits"
        again = sae(*HARVEST, "--batch-contexts", 1, "--out", out)
        verified = sae("cache", "verify", out)
        m.row(
            name,
            told,
            INTERRUPTED,
            f"{left}; the same command goes on and ends with {again.code}",
            again.code == OK,
            verified.code == OK,
            not list(out.glob(".lock.holder")),
            same(out, "single"),
        )
    codes, broken, swallowed, worst = Counter[int](), 0, 0, Told(INTERRUPTED, "", "")
    for number in range(CTRL_CS):
        out = Path(f"ctrl-c{number}")
        command = Command(*HARVEST, "--out", out, afresh=number % 4 == 0)
        if number % 4 == 0:  # while torch and transformers are imported
            time.sleep(rng.uniform(0.4, 3))
        else:
            wait_until(command, lambda: command.begun)  # noqa: B023
            time.sleep(rng.uniform(0.01, 1))
        for _ in range(1 + number % 2):
            command.send(signal.SIGINT)
            time.sleep(rng.uniform(0, 0.003))
        told = command.told()
        codes[told.code] += 1
        # Python itself reports, and loses, an interrupt that falls into a callback of its garbage collection.
        quiet = re.sub(r"Exception ignored in: .*\nTraceback(.*\n)*?KeyboardInterrupt:? *\n", "", told.err)
        swallowed += quiet != told.err
        wrong = told.code not in (OK, INTERRUPTED) or "Traceback" in quiet
        if wrong or (told.code == INTERRUPTED and not worst.err):
            worst = told._replace(err=quiet)
        again = sae(*HARVEST, "--out", out)
        broken += again.code != OK or not same(out)
    after = (
        f"exit codes {dict(codes)}; the same command ended in the same bytes {CTRL_CS - broken} of {CTRL_CS} times; "
        f"Python lost an interrupt in its own garbage collection {swallowed} times"
    )
    m.row(f"Ctrl-C at {CTRL_CS} random instants, every other time twice", worst, INTERRUPTED, after, broken == 0)


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(word) for word in found.split()]


def launched(m: Matrix) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "sae"]
    words = [*launch, *map(str, HARVEST), "--out", "pair"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and commits(Path("pair")) < 6:
        time.sleep(0.002)
    if pair := children(process.pid):
        os.kill(pair[-1], signal.SIGKILL)
    said = process.communicate(timeout=120)[0]
    left = commits(Path("pair"))
    again = subprocess.run(words, capture_output=True, text=True, timeout=120)
    # torch's launcher prints a traceback of its own about the child that was lost; what counts is what our process says.
    ours = [line for line in said.splitlines() if re.match("(error|stopped): ", line)]
    told = Told(process.returncode, "", (ours or ["nothing of ours: the launcher ends the other process and reports the lost one"])[-1])
    m.row(
        "kill -9 of one of two processes under `accelerate launch`",
        told,
        1,
        f"{left} of 48 commits; the same command ended with {again.returncode} and the same bytes",
        bool(pair),
        again.returncode == 0,
        same("pair"),
        "/sae/terminal.py" not in said,
    )


def damage(m: Matrix) -> None:
    m.head("Damage to the files of a whole cache")
    cases: list[tuple[str, str, Callable[[Path], None], str]] = [
        ("chunk deleted", "layer_00/c.7.0", delete, "whole"),
        ("chunk truncated", "layer_00/c.7.0", truncate, "whole"),
        ("one bit of a chunk flipped", "layer_00/c.7.0", flip, "whole"),
        ("one bit of a compressed chunk flipped", "layer_00/c.7.0", flip, "packed"),
        ("compressed chunk truncated", "layer_00/c.7.0", truncate, "packed"),
        ("one bit of the norms flipped", "layer_00.row_norm/c.3", flip, "whole"),
        ("one bit of the moments flipped", "layer_00.moments/c.3.0.0", flip, "whole"),
        ("tokens truncated", "tokens/ids/c.0.0", truncate, "whole"),
        ("one bit of the tokens flipped", "tokens/ids/c.0.0", flip, "whole"),
        ("manifest.json truncated", "manifest.json", truncate, "whole"),
        ("manifest.json deleted", "manifest.json", delete, "whole"),
        ("a commit truncated", "commits/000003.layer_00.json", truncate, "whole"),
        ("a commit deleted", "commits/000003.layer_00.json", delete, "whole"),
        ("zarr.json truncated", "zarr.json", truncate, "whole"),
        ("zarr.json deleted", "zarr.json", delete, "whole"),
        ("zarr.json of a layer truncated", "layer_00/zarr.json", truncate, "whole"),
        ("tokens/commit.json truncated", "tokens/commit.json", truncate, "whole"),
        ("harvest.json truncated", "harvest.json", truncate, "whole"),
        ("harvest.json lost", "harvest.json", delete, "whole"),
    ]
    for number, (name, file, hurt, kind) in enumerate(cases):
        folder = copy_of(f"hurt{number}", kind)
        hurt(folder / file)
        found = {
            "verify": sae("cache", "verify", folder),
            "info": sae("cache", "info", folder),
            "train": sae(*TRAIN, "--cache", folder, "--out", f"runs{number}"),
        }
        again = copy_of(f"again{number}", str(folder))
        packed = ["--compress"] if kind == "packed" else []
        found["harvest"] = sae(*HARVEST, *packed, "--out", again)
        same_again = same(again, kind)
        repaired = sae("cache", "repair", folder)
        mended = same(folder, kind)
        codes = ", ".join(f"{command} {told.code}" for command, told in found.items())
        after = f"{codes}{' (mended)' if same_again else ''}; repair {repaired.code}{', the same bytes' if mended else ''}"
        seen = next((told for told in found.values() if told.code), found["verify"])
        bad = [t for t in found.values() if "Traceback" in t.err or t.code not in (OK, USAGE, DAMAGED)]
        recovers = mended or (same_again and repaired.code in (USAGE, DAMAGED))
        m.row(name, bad[0] if bad else seen, (DAMAGED, USAGE, OK), after, recovers, "Traceback" not in repaired.err)


def writers(m: Matrix) -> None:
    m.head("Somebody else")
    out = Path("shared")
    holder = Command(*HARVEST, "--batch-contexts", 1, "--out", out)
    wait_until(holder, lambda: commits(out) >= 4)
    holder.send(signal.SIGSTOP)
    for words in ([*HARVEST, "--out", out], ["cache", "repair", out], ["cache", "rm", out, "--yes"]):
        name = " ".join(map(str, words[: 2 if words[0] == "cache" else 1]))
        m.row(f"another process writes: `sae {name}`", sae(*words), OUTSIDE, "the other's cache is untouched", commits(out) >= 4)
    for words in (["cache", "info", out], ["cache", "verify", out], [*TRAIN, "--cache", out]):
        name = " ".join(map(str, words[: 2 if words[0] == "cache" else 1]))
        m.row(f"half written: `sae {name}`", sae(*words), USAGE, "untouched")
    holder.send(signal.SIGKILL)
    holder.told()
    told = sae(*HARVEST, "--batch-contexts", 1, "--out", out)
    note = next((line for line in told.err.splitlines() if "its lock was taken over" in line), "")
    m.row("a dead writer's lock", told._replace(err=note + "\n"), OK, "taken over; the same bytes", bool(note), same(out, "single"))

    m.row("train on a cache of another model", sae(*TRAIN, "--cache", "whole", "--model", "gemma-2-mini"), USAGE, "nothing is written")
    m.row("train on a layer it lacks", sae(*TRAIN, "--cache", "whole", "--layer", 7), USAGE, "nothing is written")
    m.row("train on several caches, not told which", sae(*TRAIN, env={"SAE_HOME": "homes"}), USAGE, "nothing is written")
    for name, words in (
        ("another model", ["harvest", "--model", "./other", *TEXT, *BOTH, *SHAPE]),
        ("other windows", [*HARVEST, "--window", 512]),
        ("compression", [*HARVEST, "--compress"]),
        ("another seed", [*HARVEST, "--seed", 1]),
    ):
        m.row(f"harvest of {name} into this cache", sae(*words, "--out", "whole"), USAGE, "unchanged", same("whole", "kept"))
    newer = copy_of("newer")
    record = json.loads((newer / "zarr.json").read_text())
    record["attributes"]["format"] = 2
    (newer / "zarr.json").write_text(json.dumps(record))
    before = bytes_of(newer)
    for words in ([*TRAIN, "--cache", newer], [*HARVEST, "--out", newer], ["cache", "info", newer], ["cache", "verify", newer], ["cache", "repair", newer]):
        name = " ".join(map(str, words[: 2 if words[0] == "cache" else 1]))
        m.row(f"cache of a newer format: `sae {name}`", sae(*words), USAGE, "unchanged", bytes_of(newer) == before)


def texts(m: Matrix, rows: list[dict[str, str]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    m.head("The text and the model")
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), table, row_group_size=10)
    packed = gzip.compress(lines, mtime=0)
    Path("cut.parquet").write_bytes(table.getvalue()[: len(table.getvalue()) * 2 // 3])
    Path("cut.jsonl.gz").write_bytes(packed[: len(packed) * 2 // 3])
    Path("whole.jsonl.gz").write_bytes(packed)
    squeezed = zstandard.compress(lines * 40)
    Path("cut.jsonl.zst").write_bytes(squeezed[: len(squeezed) * 2 // 3])
    Path("cut.jsonl").write_bytes(lines[: len(lines) * 2 // 3])
    Path("broken.jsonl").write_bytes(lines.replace(b'{"text"', b'{"text', 60).replace(b'{"text', b'{"text"', 59))
    Path("empty.jsonl").write_bytes(b"")
    Path("blank.jsonl").write_text('{"text": ""}\n{"text": "  "}\n{"text": null}\n')
    Path("latin.txt").write_bytes("Käse und Brot".encode("latin-1"))
    Path("directory").mkdir()
    ids = pa.table({"input_ids": [[5, 6, 7], [8, 99_999]]})
    pq.write_table(ids, "ids.parquet")
    pq.write_table(ids.slice(0, 0), "norows.parquet")
    import datasets

    datasets.DatasetDict({"test": datasets.Dataset.from_list(rows[:3])}).save_to_disk("saved")
    for name, words, code in (
        ("dataset too short", ["--tokens", "1M"], USAGE),
        ("column missing", ["--text-column", "content"], USAGE),
        ("empty file", ["--dataset", "empty.jsonl"], USAGE),
        ("only empty documents", ["--dataset", "blank.jsonl"], USAGE),
        ("table without rows", ["--dataset", "norows.parquet", "--text-column", "input_ids"], USAGE),
        ("empty folder", ["--dataset", "./directory"], USAGE),
        ("no such file", ["--dataset", "./nothing.jsonl"], USAGE),
        ("a dataset of the Hub, without network", ["--dataset", "some/set"], OUTSIDE),
        ("ids of another tokenizer", ["--dataset", "ids.parquet", "--text-column", "input_ids"], USAGE),
        ("Parquet cut in the middle", ["--dataset", "cut.parquet"], USAGE),
        ("gz cut in the middle", ["--dataset", "cut.jsonl.gz", "--tokens", "11k"], USAGE),
        ("zst cut in the middle", ["--dataset", "cut.jsonl.zst", "--tokens", "200k"], USAGE),
        ("JSONL cut in the middle of a line", ["--dataset", "cut.jsonl", "--tokens", "11k"], USAGE),
        ("JSONL with a broken line", ["--dataset", "broken.jsonl"], USAGE),
        ("text that is not UTF-8", ["--dataset", "latin.txt"], USAGE),
        ("unknown split", ["--dataset", "saved", "--split", "dev"], USAGE),
        ("a model that is no folder", ["--model", "./nothing"], USAGE),
        ("a model folder without weights", ["--model", "./bare"], OUTSIDE),
        ("truncated weights", ["--model", "./torn"], DAMAGED),
        ("weights that lack a matrix", ["--model", "./lacking"], DAMAGED),
        ("weights of another width than the configuration's", ["--model", "./wide"], DAMAGED),
        ("gated model without access", ["--model", "google/gemma-2-2b"], OUTSIDE),
        ("NaN in a weight of layer 1", ["--model", "./nan"], FAILED),
    ):
        out = Path("text-" + name.replace(" ", "-"))
        told = sae(*HARVEST, *words, "--out", out)
        m.row(name, told, code, "nothing is committed", commits(out) == 0)
    whole = sae(*HARVEST, "--dataset", "whole.jsonl.gz", "--out", "from-gz")
    m.row("gz that is whole", whole, OK, "the rows of the same lines, not compressed", rows_of("from-gz") == rows_of("whole"))
    limited = ["bash", "-c", 'ulimit -v 2200000; exec "$@"', "limited"]
    big = ["harvest", "--model", "./tiny", "--dataset", "long.txt", "--layer", 0, "--device", "cpu", "--out"]
    told = sae(*big, "halved", "--tokens", 20_000, "--context", 3000, "--batch-contexts", 64, "--window", 24_576, prefix=limited)
    halved = [line for line in told.err.splitlines() if "too small" in line]
    m.row("memory too small for a pass", told._replace(err="\n".join(halved) + "\n"), OK, "halved until it fits", bool(halved))
    told = sae(*big, "toobig", "--tokens", 40_000, "--context", 40_000, "--window", 40_960, prefix=limited)
    m.row("memory too small for one context", told, OUTSIDE, "nothing is committed", commits(Path("toobig")) == 0)


def rows_of(folder: str) -> dict[str, bytes]:
    """The activations, where they come from, and the text."""
    return {file: raw for file, raw in bytes_of(folder).items() if file.startswith(("layer_", "row_", "tokens/"))}


def numbers(m: Matrix) -> None:
    m.head("What makes no sense")
    for number, words in enumerate(
        (
            ["--tokens", 0],
            ["--tokens", -5],
            ["--tokens", "many"],
            ["--tokens", "1e30"],
            ["--tokens", "1e12"],
            ["--window", -256],
            ["--window", 0],
            ["--window", 2**53],
            ["--window", 2**33],
            ["--context", 1],
            ["--context", 70_000],
            ["--layer", 99],
            ["--layer", -1],
            ["--layer", "twelve"],
            ["--site", "resid_pre"],
            ["--max-norm", 0],
            ["--max-norm", "nan"],
            ["--device", "toaster"],
            ["--device", "cuda:7"],
            ["--dtype", "float8"],
            ["--attention", "nonsense"],
            ["--held-out", 1],
            ["--held-out", "nan"],
            ["--seed", -1],
            ["--storage-dtype", "int4"],
            ["--batch-contexts", 0],
            ["--dataset", ""],
            ["--model", ""],
            ["--frobnicate", 1],
        )
    ):
        out = Path(f"senseless{number}")
        told = sae(*HARVEST, *words, "--out", out)
        code = OUTSIDE if words in (["--tokens", "1e12"], ["--device", "cuda:7"]) else USAGE
        left = [p for p in out.rglob("*") if p.is_file() and p.name[0] != "."]
        m.row(f"`{words[0]} {words[1]}`" if words[1] != "" else f'`{words[0]} ""`', told, code, "nothing is written", not left)


def places(m: Matrix) -> None:
    m.head("Where it runs, and into what")
    Path("thesis").mkdir()
    Path("thesis/chapter1.tex").write_text("years of work")
    m.row("`--out` is a folder of other things", sae(*HARVEST, "--out", "thesis"), USAGE, "untouched", Path("thesis/chapter1.tex").exists())
    m.row("`--out` is a file", sae(*HARVEST, "--out", "thesis/chapter1.tex"), (USAGE, OUTSIDE), "untouched", Path("thesis/chapter1.tex").is_file())
    m.row("`--out` below a file", sae(*HARVEST, "--out", "thesis/chapter1.tex/x"), (USAGE, OUTSIDE), "untouched", Path("thesis/chapter1.tex").is_file())
    strange = "Ünï cöde/mit Leer zeichen"
    told = sae(*HARVEST, "--out", strange)
    following = told.err.splitlines()[-1].removeprefix("next     sae ")
    import shlex

    m.row("spaces and letters beyond ASCII in `--out`", told, OK, "the same bytes", same(strange))
    words = shlex.split(following) + ["--steps", "2", "--batch-size", "64", "--out", "runs-strange"]
    m.row("... and the next command as it was printed", sae(*words), OK, "it runs")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    m.row("a locale that is not UTF-8", sae(*HARVEST, "--out", strange + "2", env=plain, afresh=True), OK, "the same bytes", same(strange + "2"))
    m.row("... `cache info`", sae("cache", "info", strange, env=plain | {"PYTHONIOENCODING": "ascii:strict"}, afresh=True), OK, "it is shown")
    m.row("... `cache verify`", sae("cache", "verify", strange, env=plain | {"PYTHONIOENCODING": "ascii:strict"}, afresh=True), OK, "it is shown")
    m.row("HOME unset", sae(*HARVEST, "--out", "homeless", env={"HOME": None}, afresh=True), OK, "the same bytes", same("homeless"))
    told = sae("harvest", "--model", "./tiny", "--layer", "99", env={"COLUMNS": "40"})
    m.row("a terminal of 40 columns", told, USAGE, "sentences are not cut")
    m.row("... an option that does not exist", sae("harvest", "--tokns", 1, env={"COLUMNS": "40"}), USAGE, "sentences are not cut")
    for name, words in (("cache info", ["cache", "info", "whole"]), ("variants", ["variants"])):
        script = " ".join(map(shlex.quote, [*SAE, *words])) + "; echo $? >&2"
        ran = subprocess.run(["bash", "-c", f"({script}) | head -n 1"], capture_output=True, text=True)
        *said, code = ran.stderr.strip().splitlines()
        m.row(f"`sae {name} \\| head -n 1`", Told(int(code), ran.stdout, "\n".join(said)), (OK, OUTSIDE), "the line is shown", ran.stdout.count("\n") == 1)
    script = " ".join(map(shlex.quote, [*SAE, "cache", "info", "whole"])) + " > /dev/full"
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    m.row("`sae cache info > /dev/full`", Told(ran.returncode, ran.stdout, ran.stderr), OUTSIDE, "nothing else happens")


def removal(m: Matrix) -> None:
    m.head("`sae cache rm`")
    m.row("of a folder that is no cache", sae("cache", "rm", "thesis", "--yes"), USAGE, "untouched", Path("thesis/chapter1.tex").exists())
    m.row("... without --yes", sae("cache", "rm", "thesis"), USAGE, "untouched", Path("thesis/chapter1.tex").exists())
    m.row("of nothing", sae("cache", "rm", "nothing"), USAGE, "")
    copy_of("doomed")
    m.row("the answer is n", sae("cache", "rm", "doomed", stdin="n\n"), OK, "untouched", same("doomed"))
    m.row("nobody answers", sae("cache", "rm", "doomed"), (FAILED, INTERRUPTED), "untouched", same("doomed"))
    m.row("the answer is y", sae("cache", "rm", "doomed", stdin="y\n"), OK, "gone", not Path("doomed").exists())


# fmt: on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="groups by name, with commas between; nothing is written then")
    only = parser.parse_args().only
    started, where = time.monotonic(), os.getcwd()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    os.environ.pop("SAE_HOME", None)
    context.set_forkserver_preload(
        [
            "sae.harvest.repair",
            "sae.train.run",
            "sae.train.variants",
            "datasets",
            "transformers.models.gemma2.modeling_gemma2",
        ]
    )
    m = Matrix()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for name, seed in (("tiny", 0), ("other", 1), ("nan", 0)):
                make_model(name, seed)
            for name in ("bare", "torn", "lacking", "wide"):
                shutil.copytree("tiny", name)
            spoil_weights()
            rows = make_text()
            for name, more in (("whole", []), ("packed", ["--compress"]), ("single", ["--batch-contexts", 1])):
                told = sae(*HARVEST, *more, "--out", name)
                assert told.code == OK, told
            copy_of("kept")
            for name in ("one", "two"):
                copy_of(f"homes/activations/{name}")
            groups = (full_disks, kills, launched, damage, writers, lambda m: texts(m, rows), numbers, places, removal)
            names = ("disks", "kills", "launched", "damage", "writers", "texts", "numbers", "places", "removal")
            for name, group in zip(names, groups, strict=True):
                if not only or name in only.split(","):
                    begun = time.monotonic()
                    group(m)
                    print(f"        {name} took {time.monotonic() - begun:.0f} s")
        finally:
            os.chdir(where)
    spent = time.monotonic() - started
    if not only:
        (ROOT / "docs" / "faults.md").write_text(page(m, spent))
    print(f"{len(m.rows)} rows, {len(m.broken)} broken, {spent:.0f} s")
    if m.broken:
        sys.exit("\n\n".join(m.broken))


def page(m: Matrix, spent: float) -> str:
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "datasets", "zarr"))
    lines = [
        "# What the careless see",
        "",
        f"Made by `python benchmarks/fault_matrix.py` on {datetime.date.today()} at commit {commit.strip()}, Python {platform.python_version()}, "
        f"{packages}, {os.cpu_count()} cores, {spent:.0f} s. The script fails when an exit code is another than the expected one, when a "
        "traceback is printed, or when a cache is not the same bytes as an undisturbed one.",
        "",
        "Exit codes: 0 ok, 1 failed, 2 bad usage, 3 damaged data, 4 something outside is missing, 130 interrupted.",
        "",
    ]
    for fault, said, code, after in m.rows:
        if not code and not said:
            lines += [
                "",
                f"## {fault}",
                "",
                "| fault | what the user sees | code | what is left, what comes next |",
                "|---|---|---|---|",
            ]
        else:
            lines.append(f"| {fault} | {said} | {code} | {after} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
