"""Damage to the records of a run: sae.json, run.json, state.json, and results."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.command import DAMAGED, OK, TRAIN, USAGE, Outcome, sae
from faults.table import Matrix

CORE = ["--suite", "core", "--tokens", 200, "--device", "cpu", "--no-references"]


def records_of_runs(m: Matrix) -> None:
    m.head("Damage to the records of a run")
    train = [*TRAIN, "--cache", "whole", "--device", "cpu", "--steps", 8, "--checkpoint-every", 3]
    assert sae(*train, "--seed", 0, "--seed", 1, "--out", "recorded").code == OK
    run, other = sorted(Path("recorded").glob("topk-*"))
    for folder in (run, other):
        assert sae("evaluate", folder, *CORE).code == OK
    verbs: dict[str, Callable[[Path], Outcome]] = {
        "evaluate": lambda folder: sae("evaluate", folder, *CORE),
        "compare": lambda folder: sae("compare", folder),
        "train --resume": lambda folder: sae("train", "--resume", folder, "--device", "cpu"),
        "export": lambda folder: sae("export", folder, "--to", "saelens", "--out", folder / "out"),
    }
    deep = '{"a":' * 50_000 + "1" + "}" * 50_000
    readers_of_sae, readers_of_run = list(verbs), list(verbs)
    cases: list[tuple[str, str, Callable[[str], str], list[str]]] = [
        ("the layer in sae.json changed from 0 to 1", "sae.json", swap('"layer": 0', '"layer": 1'), readers_of_sae),
        ("pre_bias in sae.json changed", "sae.json", swap('"pre_bias": true', '"pre_bias": false'), readers_of_sae),
        ("sae.json truncated", "sae.json", lambda text: text[:100], readers_of_sae),
        ("the seed in run.json changed", "run.json", swap('"seed": 0', '"seed": 8'), readers_of_run),
        ("run.json nested 50,000 deep", "run.json", lambda text: deep, readers_of_run),
        (
            "a number of 8,000 digits in run.json", "run.json", swap('"seed": 0', f'"seed": {"9" * 8000}'),
            readers_of_run,
        ),
        ("a number in a result changed", "evaluations/core.json", swap('"l0": 4', '"l0": 5'), ["evaluate", "compare"]),
        (
            "the type of a field in a result changed", "evaluations/core.json",
            swap('"flags": [', '"flags": {}, "x": ['), ["compare"],
        ),
    ]  # fmt: skip
    for number, (name, file, change, readers) in enumerate(cases):
        folder = copy(run, f"record{number}")
        path = folder / file
        path.write_text(change(path.read_text()))
        found = {verb: verbs[verb](folder) for verb in readers}
        codes = ", ".join(f"{verb} {outcome.code}" for verb, outcome in found.items())
        bad = [outcome for outcome in found.values() if outcome.code != DAMAGED or "Traceback" in outcome.err]
        m.row(name, bad[0] if bad else found[readers[0]], DAMAGED, f"{codes}; nothing is written")
    files_of_another_run(m, run, other)
    checkpoints(m, run)
    remedies(m, run)


def files_of_another_run(m: Matrix, run: Path, other: Path) -> None:
    folder = copy(run, "mixed-sae")
    for name in ("sae.json", "sae.safetensors"):
        shutil.copy(other / name, folder)
    m.row(
        "both files of the SAE come from another run",
        sae("evaluate", folder, *CORE),
        DAMAGED,
        "the error names the field that differs",
    )
    train = [*TRAIN, "--cache", "whole", "--device", "cpu", "--steps", 8, "--set", "lr=2e-3", "--out", "recorded-lr"]
    assert sae(*train).code == OK
    (alike,) = Path("recorded-lr").glob("topk-*")
    folder = copy(run, "mixed-alike")
    for name in ("sae.json", "sae.safetensors"):
        shutil.copy(alike / name, folder)
    m.row("both files of the SAE come from a run that differs only in one option", sae("evaluate", folder, *CORE),
          DAMAGED, "the options in sae.json and run.json are compared",
          "is of another run" in sae("evaluate", folder, *CORE).err)  # fmt: skip
    folder = copy(run, "mixed-weights")
    shutil.copy(alike / "sae.safetensors", folder)
    m.row(
        "only the weights come from another run",
        sae("evaluate", folder, *CORE),
        DAMAGED,
        "the weights are compared with sae.json",
    )
    folder = copy(run, "mixed-run")
    shutil.copy(other / "run.json", folder)
    m.row(
        "run.json comes from another run",
        sae("train", "--resume", folder),
        DAMAGED,
        "run.json is compared with the folder's name",
    )
    folder = copy(run, "mixed-result")
    shutil.copy(other / "evaluations" / "core.json", folder / "evaluations")
    again = sae("evaluate", folder, *CORE)
    m.row("a result comes from another run", sae("compare", copy(folder, "mixed-result2")), (DAMAGED, OK),
          f"evaluate {again.code}: the result is set aside and measured again")  # fmt: skip


def checkpoints(m: Matrix, run: Path) -> None:
    whole = (run / "sae.safetensors").read_bytes()
    for name, step in (
        ("the step in state.json is one too small", 5),
        ("the step in state.json is beyond the end of the run", 60),
    ):
        folder = copy(run, f"step{step}")
        shutil.rmtree(folder / "checkpoints" / "step-00000008")
        (folder / "sae.json").unlink()
        state = folder / "checkpoints" / "step-00000006" / "state.json"
        state.write_text(state.read_text().replace('"step": 6', f'"step": {step}'))
        resumed = sae("train", "--resume", folder, "--device", "cpu")
        same = (folder / "sae.safetensors").exists() and (folder / "sae.safetensors").read_bytes() == whole
        m.row(
            name,
            resumed,
            OK,
            "that checkpoint is skipped; the run ends with the same weights",
            same,
            "Skipping" in resumed.err,
        )


def remedies(m: Matrix, run: Path) -> None:
    whole = {name: (run / name).read_bytes() for name in ("sae.json", "sae.safetensors")}
    folder = copy(run, "mended")
    (folder / "sae.json").unlink()
    resumed = sae("train", "--resume", folder, "--device", "cpu")
    same = all((folder / name).exists() and (folder / name).read_bytes() == data for name, data in whole.items())
    m.row(
        "sae.json deleted, as the message says",
        resumed,
        OK,
        "sae.json and the weights are written again, with the same bytes",
        same,
    )
    folder = copy(run, "no-run-json")
    (folder / "run.json").unlink()
    m.row("run.json deleted, as the message says", sae("evaluate", folder, *CORE), OK, "a finished SAE is evaluated")
    (folder / "sae.json").unlink()
    kept = sorted(folder.rglob("checkpoints/*/*"))
    m.row("run.json of an unfinished run deleted", sae("train", "--resume", folder), USAGE, "checkpoints are kept",
          sorted(folder.rglob("checkpoints/*/*")) == kept)  # fmt: skip
    folder = copy(run, "edited")
    content: dict[str, Any] = json.loads((folder / "sae.json").read_text())
    del content["content_digest"]
    (folder / "sae.json").write_text(json.dumps(content))
    read = sae("evaluate", folder, *CORE)
    m.row("sae.json without a digest, as earlier versions wrote it", read, OK, "it is read, with a note",
          "has no content_digest" in read.err)  # fmt: skip


def swap(old: str, new: str) -> Callable[[str], str]:
    """A function that replaces the first `old` in a text, which must contain it."""

    def change(text: str) -> str:
        assert old in text, old
        return text.replace(old, new, 1)

    return change


def copy(run: Path, name: str) -> Path:
    """A copy of a run in the folder `name`. The copy keeps the run's name, so that the digest in that name is
    checked."""
    return Path(shutil.copytree(run, Path(name) / run.name))
