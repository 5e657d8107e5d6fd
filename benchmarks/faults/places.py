"""Unusual output folders, locales, terminals and pipes; and `sae cache rm`."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from faults.command import BROKEN_PIPE, FAILED, HARVEST, INTERRUPTED, OK, OUTSIDE, SAE, TRAIN, USAGE, Outcome, sae
from faults.inputs import copy_folder, same_bytes, truncate
from faults.table import Matrix


def places(m: Matrix) -> None:
    m.head("The environment and the output folder")
    Path("thesis").mkdir()
    Path("thesis/chapter1.tex").write_text("years of work")
    m.row(
        "`--out` is a folder with other files",
        sae(*HARVEST, "--out", "thesis"),
        USAGE,
        "unchanged",
        Path("thesis/chapter1.tex").exists(),
    )
    m.row(
        "`--out` is a file",
        sae(*HARVEST, "--out", "thesis/chapter1.tex"),
        (USAGE, OUTSIDE),
        "unchanged",
        Path("thesis/chapter1.tex").is_file(),
    )
    m.row(
        "`--out` below a file",
        sae(*HARVEST, "--out", "thesis/chapter1.tex/x"),
        (USAGE, OUTSIDE),
        "unchanged",
        Path("thesis/chapter1.tex").is_file(),
    )
    strange = "Ünï cöde/mit Leer zeichen"
    outcome = sae(*HARVEST, "--out", strange)
    following = outcome.err.splitlines()[-1].removeprefix("next     sae ")
    import shlex

    m.row("spaces and letters beyond ASCII in `--out`", outcome, OK, "the same bytes", same_bytes(strange))
    words = shlex.split(following) + ["--steps", "2", "--batch-size", "64", "--out", "runs-strange"]
    m.row("... and the next command as it was printed", sae(*words), OK, "the printed command runs")
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    m.row(
        "a locale that is not UTF-8",
        sae(*HARVEST, "--out", strange + "2", env=plain, new_process=True),
        OK,
        "the same bytes",
        same_bytes(strange + "2"),
    )
    m.row(
        "... `cache info`",
        sae("cache", "info", strange, env=plain | {"PYTHONIOENCODING": "ascii:strict"}, new_process=True),
        OK,
        "the output is shown",
    )
    m.row(
        "... `cache verify`",
        sae("cache", "verify", strange, env=plain | {"PYTHONIOENCODING": "ascii:strict"}, new_process=True),
        OK,
        "the output is shown",
    )
    m.row(
        "HOME unset",
        sae(*HARVEST, "--out", "homeless", env={"HOME": None}, new_process=True),
        OK,
        "the same bytes",
        same_bytes("homeless"),
    )
    outcome = sae("harvest", "--model", "./tiny", "--layer", "99", env={"COLUMNS": "40"})
    m.row("a terminal of 40 columns", outcome, USAGE, "the message is not truncated")
    m.row(
        "... an option that does not exist",
        sae("harvest", "--tokns", 1, env={"COLUMNS": "40"}),
        USAGE,
        "the message is not truncated",
    )
    for name, words in (("cache info", ["cache", "info", "whole"]), ("variants", ["variants"])):
        script = " ".join(map(shlex.quote, [*SAE, *words])) + "; echo $? >&2"
        ran = subprocess.run(["bash", "-c", f"({script}) | head -n 1"], capture_output=True, text=True)
        *said, code = ran.stderr.strip().splitlines()
        m.row(
            f"`sae {name} \\| head -n 1`",
            Outcome(int(code), ran.stdout, "\n".join(said)),
            (OK, BROKEN_PIPE),
            "the first line is shown",
            ran.stdout.count("\n") == 1,
        )
    script = " ".join(map(shlex.quote, [*SAE, "cache", "info", "whole"])) + " > /dev/full"
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    m.row(
        "`sae cache info > /dev/full`",
        Outcome(ran.returncode, ran.stdout, ran.stderr),
        OUTSIDE,
        "nothing else is affected",
    )


def removal(m: Matrix) -> None:
    m.head("`sae cache rm`")
    Path("thesis").mkdir(exist_ok=True)
    Path("thesis/chapter1.tex").write_text("years of work")
    m.row(
        "a folder that holds no cache",
        sae("cache", "rm", "thesis", "--yes"),
        USAGE,
        "unchanged",
        Path("thesis/chapter1.tex").exists(),
    )
    m.row("... without --yes", sae("cache", "rm", "thesis"), USAGE, "unchanged", Path("thesis/chapter1.tex").exists())
    m.row("a path at which there is nothing", sae("cache", "rm", "nothing"), USAGE, "")
    copy_folder("doomed")
    m.row("the answer is n", sae("cache", "rm", "doomed", stdin="n\n"), OK, "unchanged", same_bytes("doomed"))
    m.row("nobody answers", sae("cache", "rm", "doomed"), (FAILED, INTERRUPTED), "unchanged", same_bytes("doomed"))
    m.row(
        "the answer is y",
        sae("cache", "rm", "doomed", stdin="y\n"),
        OK,
        "the cache is deleted",
        not Path("doomed").exists(),
    )


SHORT = [*TRAIN, "--steps", 5, "--device", "cpu"]


def neighbours(m: Matrix) -> None:
    """A cache that cannot be opened, next to a good one."""
    m.head("A damaged cache beside a good one")

    def attributes(**changed: object) -> Callable[[Path], None]:
        def overwrite(folder: Path) -> None:
            record = json.loads((folder / "zarr.json").read_text())
            record["attributes"] = record["attributes"] | changed
            record["attributes"].pop("content_digest", None)
            (folder / "zarr.json").write_text(json.dumps(record))

        return overwrite

    for number, (name, spoil) in enumerate(
        (
            ("its zarr.json is truncated", lambda folder: truncate(folder / "zarr.json")),
            ("its zarr.json is nested 100,000 deep", lambda folder: (folder / "zarr.json").write_text("[" * 100_000)),
            ("its identity is empty", attributes(identity={})),
            ("its number of rows is text", attributes(rows="many")),
            ("it holds an array of no layer", attributes(complete=["layer_x"])),
            ("its format is newer", attributes(format=99)),
        )
    ):
        home = Path(f"town{number}")
        for neighbour in ("good", "bad"):
            copy_folder(f"{home}/activations/{neighbour}")
        spoil(home / "activations" / "bad")
        env = {"SAE_HOME": str(home)}
        listed = sae("cache", "list", env=env)
        trained = sae(*SHORT, "--out", home / "runs", env=env)
        (run,) = (home / "runs").glob("topk-*")
        moved = (home / "activations" / "good").rename(home / "activations" / "moved")
        evaluated = sae("evaluate", run, "--suite", "core", "--tokens", 500, "--device", "cpu", env=env)
        notes = [line for line in trained.err.splitlines() if line.startswith("note") and "is left out" in line]
        m.row(
            f"{name}: `sae train` looks for a cache",
            trained._replace(err="".join(f"{note}\n" for note in notes)),
            OK,
            f"one note; exit codes: cache list {listed.code}, evaluate (the run's cache has moved) {evaluated.code}",
            len(notes) == 1,
            "activations/bad" in notes[0],
            listed.code == evaluated.code == OK,
            "bad   cannot be opened" in listed.out and f"{moved.parent}/good" in listed.out,
            "is left out" in evaluated.err,
        )


def files_limit(m: Matrix) -> None:
    """`ulimit -n`: few files may be open."""
    m.head("Too many open files")
    words = {
        "harvest": [*HARVEST, "--out", "few"],
        "train": [*SHORT, "--cache", "whole", "--out", "few-runs"],
        "cache verify": ["cache", "verify", "whole"],
        "evaluate": ["evaluate", "RUN", "--cache", "whole", "--suite", "core", "--tokens", 500, "--device", "cpu"],
    }
    for name, command in words.items():
        for limit in (64, 7):
            run = next(Path("few-runs").glob("topk-*"), None)
            here = [run if word == "RUN" else word for word in command]
            limited = ["bash", "-c", f'ulimit -n {limit}; exec "$@"', "limited"]
            outcome = sae(*here, prefix=limited)
            explained = "ulimit -n" in outcome.err and f"The limit is {limit}" in outcome.err
            again = sae(*here)
            m.row(
                f"`ulimit -n {limit}`: `sae {name}`",
                outcome,
                OK if limit == 64 else (OK, OUTSIDE),
                f"without the limit the same command ends with {again.code}",
                outcome.code == OK or explained,
                again.code == OK,
                name != "harvest" or same_bytes("few"),
            )


def plans(m: Matrix) -> None:
    """What `sae harvest --dry-run` prints about a folder that already contains rows."""
    m.head("Harvesting into what is there")
    for name, more, said in (
        (
            "`--dry-run` over a finished cache",
            [],
            "is finished: it holds layer 0, layer 1, 6,000 rows;",
        ),
        ("... for another site", ["--site", "mlp_out"], "are added: 6,000 rows to harvest"),
        ("... for another --max-norm", ["--max-norm", 5], "only the statistics are computed again"),
    ):
        outcome = sae(*HARVEST, *more, "--out", "whole", "--dry-run")
        m.row(name, outcome, OK, "unchanged", said in outcome.err, same_bytes("whole", "kept"))
