"""Unusual output folders, locales, terminals and pipes; and `sae cache rm`."""

import subprocess
from pathlib import Path

from faults.command import FAILED, HARVEST, INTERRUPTED, OK, OUTSIDE, SAE, USAGE, Outcome, sae
from faults.inputs import copy_folder, same_bytes
from faults.table import Matrix


def places(m: Matrix) -> None:
    m.head("Where it runs, and into what")
    Path("thesis").mkdir()
    Path("thesis/chapter1.tex").write_text("years of work")
    m.row(
        "`--out` is a folder of other things",
        sae(*HARVEST, "--out", "thesis"),
        USAGE,
        "untouched",
        Path("thesis/chapter1.tex").exists(),
    )
    m.row(
        "`--out` is a file",
        sae(*HARVEST, "--out", "thesis/chapter1.tex"),
        (USAGE, OUTSIDE),
        "untouched",
        Path("thesis/chapter1.tex").is_file(),
    )
    m.row(
        "`--out` below a file",
        sae(*HARVEST, "--out", "thesis/chapter1.tex/x"),
        (USAGE, OUTSIDE),
        "untouched",
        Path("thesis/chapter1.tex").is_file(),
    )
    strange = "Ünï cöde/mit Leer zeichen"
    outcome = sae(*HARVEST, "--out", strange)
    following = outcome.err.splitlines()[-1].removeprefix("next     sae ")
    import shlex

    m.row("spaces and letters beyond ASCII in `--out`", outcome, OK, "the same bytes", same_bytes(strange))
    words = shlex.split(following) + ["--steps", "2", "--batch-size", "64", "--out", "runs-strange"]
    m.row("... and the next command as it was printed", sae(*words), OK, "it runs")
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
        "it is shown",
    )
    m.row(
        "... `cache verify`",
        sae("cache", "verify", strange, env=plain | {"PYTHONIOENCODING": "ascii:strict"}, new_process=True),
        OK,
        "it is shown",
    )
    m.row(
        "HOME unset",
        sae(*HARVEST, "--out", "homeless", env={"HOME": None}, new_process=True),
        OK,
        "the same bytes",
        same_bytes("homeless"),
    )
    outcome = sae("harvest", "--model", "./tiny", "--layer", "99", env={"COLUMNS": "40"})
    m.row("a terminal of 40 columns", outcome, USAGE, "sentences are not cut")
    m.row(
        "... an option that does not exist",
        sae("harvest", "--tokns", 1, env={"COLUMNS": "40"}),
        USAGE,
        "sentences are not cut",
    )
    for name, words in (("cache info", ["cache", "info", "whole"]), ("variants", ["variants"])):
        script = " ".join(map(shlex.quote, [*SAE, *words])) + "; echo $? >&2"
        ran = subprocess.run(["bash", "-c", f"({script}) | head -n 1"], capture_output=True, text=True)
        *said, code = ran.stderr.strip().splitlines()
        m.row(
            f"`sae {name} \\| head -n 1`",
            Outcome(int(code), ran.stdout, "\n".join(said)),
            (OK, OUTSIDE),
            "the line is shown",
            ran.stdout.count("\n") == 1,
        )
    script = " ".join(map(shlex.quote, [*SAE, "cache", "info", "whole"])) + " > /dev/full"
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    m.row(
        "`sae cache info > /dev/full`", Outcome(ran.returncode, ran.stdout, ran.stderr), OUTSIDE, "nothing else happens"
    )


def removal(m: Matrix) -> None:
    m.head("`sae cache rm`")
    Path("thesis").mkdir(exist_ok=True)
    Path("thesis/chapter1.tex").write_text("years of work")
    m.row(
        "of a folder that is no cache",
        sae("cache", "rm", "thesis", "--yes"),
        USAGE,
        "untouched",
        Path("thesis/chapter1.tex").exists(),
    )
    m.row("... without --yes", sae("cache", "rm", "thesis"), USAGE, "untouched", Path("thesis/chapter1.tex").exists())
    m.row("of nothing", sae("cache", "rm", "nothing"), USAGE, "")
    copy_folder("doomed")
    m.row("the answer is n", sae("cache", "rm", "doomed", stdin="n\n"), OK, "untouched", same_bytes("doomed"))
    m.row("nobody answers", sae("cache", "rm", "doomed"), (FAILED, INTERRUPTED), "untouched", same_bytes("doomed"))
    m.row("the answer is y", sae("cache", "rm", "doomed", stdin="y\n"), OK, "gone", not Path("doomed").exists())
