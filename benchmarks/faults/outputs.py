"""Hostile names, paths that are not UTF-8, files of absurd sizes, pages on full disks, and a judge that never stops
answering."""

import contextlib
import csv
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from faults.command import DAMAGED, HARVEST, OK, OUTSIDE, SHAPE, TRAIN, USAGE, Command, Outcome, sae
from faults.inputs import copy_folder, disk, same_bytes
from faults.table import Matrix

EVALUATE = ["--suite", "core", "--tokens", 1000, "--device", "cpu", "--no-references"]
HOSTILE = ("=HYPERLINK(1)", "[red]a[", "[/]", "\x1b]0;owned\x07\x1b[2J", "a\nb", "--help", "$x_{", "|<b>|")
NOT_UTF8 = os.fsdecode(b"b\xff")


def evaluated_run() -> Path:
    """A trained and evaluated run on the cache `whole`."""
    if not Path("outputs").exists():
        sae(*TRAIN, "--cache", "whole", "--steps", 20, "--out", "outputs")
        sae("evaluate", *Path("outputs").iterdir(), *EVALUATE)
    (run,) = Path("outputs").iterdir()
    return run


def copy_run(folder: str, name: str) -> Path:
    return Path(shutil.copytree(evaluated_run(), Path(folder) / name))


def is_clean(outcome: Outcome) -> bool:
    """Whether the output is free of control sequences that a terminal would obey."""
    return all(c.isprintable() or c == "\n" for c in outcome.out + outcome.err)


def hostile_names(m: Matrix) -> None:
    m.head("Hostile names")
    runs = [copy_run("hostile", name) for name in HOSTILE]
    for words, said in (
        (["compare", *runs, "--out", "n.csv", "--out", "n.html", "--out", "n.json", "--plots", "n"], "names are shown"),
        (["compare", runs[3]], "the sequence is shown"),
        (["export", runs[3], "--to", "saelens"], "the files are verified"),
        (["dashboard", runs[2], "--device", "cpu"], "a page is written"),
        (["dashboard", runs[3], "--device", "cpu"], "a page is written"),
        (["inspect", runs[3], "--latent", 1, "--device", "cpu"], "the latent is shown"),
        (["evaluate", *runs[:5], *EVALUATE], "the numbers are shown"),
        ([*TRAIN, "--cache", "whole", "--steps", 2, "--out", "\x1b[2J[/]"], "trained"),
    ):
        outcome = sae(*words)
        name = " ".join(map(str, words[:1]))
        m.row(f"runs named `=HYPERLINK(1)`, `[/]`, `\\x1b[2J`: `sae {name}`", outcome, OK, said, is_clean(outcome))
    cells = [cell for row in csv.reader(Path("n.csv").open(encoding="utf-8")) for cell in row]
    page = Path("n.html").read_text(encoding="utf-8")
    holds = ("'=HYPERLINK(1)" in cells, not any(cell.startswith(("=", "+", "@")) for cell in cells), "\x1b" not in page)
    m.row(
        "... in the `.csv` and the page",
        Outcome(OK, "no formula, no escape sequence", ""),
        OK,
        "names are written as text",
        *holds,
    )
    outcome = sae("evaluate", "\x1b[2J/nothing")
    m.row(
        "a path with an escape sequence that is not there",
        outcome,
        USAGE,
        "the sequence is shown as text",
        is_clean(outcome),
    )
    Path("hostile.toml").write_text('[train]\n"\\u001b[2J" = 1\n')
    outcome = sae("variants", "--config", "hostile.toml")
    m.row(
        "a key of `--config` with an escape sequence",
        outcome,
        USAGE,
        "the sequence is shown as text",
        is_clean(outcome),
    )


def odd_paths(m: Matrix) -> None:
    m.head("Paths that are not UTF-8")
    home = Path(NOT_UTF8)
    run, cache = copy_run(NOT_UTF8, NOT_UTF8), copy_folder(f"{NOT_UTF8}/cache")
    shutil.copytree("tiny", home / "tiny")
    shutil.copy("sentences.jsonl", home)
    (home / "activations").mkdir()
    copy_folder(f"{NOT_UTF8}/activations/c")
    text = ["--tokens", 6000, "--layer", 0, "--layer", 1, *SHAPE]
    for words in (
        [*HARVEST, "--out", home / "new"],
        ["harvest", "--model", "./tiny", "--dataset", home / "sentences.jsonl", *text, "--out", home / "own"],
        ["harvest", "--model", home / "tiny", "--dataset", "sentences.jsonl", *text, "--out", home / "own"],
        ["cache", "info", cache],
        ["cache", "verify", cache],
        ["cache", "repair", cache],
        ["cache", "rm", cache, "--yes"],
        [*TRAIN, "--cache", home / "new", "--steps", 5, "--out", home / "runs"],
        ["train", "--resume", run],
        ["evaluate", run, *EVALUATE, "--force"],
        ["evaluate", run, *EVALUATE, "--cache", home / "new", "--force"],
        ["compare", run, "--out", home / "x.csv", "--out", home / "x.html", "--out", home / "x.json"],
        ["compare", run, "--plots", home / "plots"],
        ["dashboard", run, "--device", "cpu"],
        ["inspect", run, "--latent", 1, "--device", "cpu"],
        ["export", run, "--to", "saelens"],
        ["import", run / "exports" / "saelens", "--out", home / "imported"],
        ["import", "--list", run / "exports"],
    ):
        outcome = sae(*words)
        name = " ".join(str(word).replace(NOT_UTF8, "b\\xff") for word in words if word not in SHAPE)
        code = USAGE if home / "tiny" in words else OK  # the library of tokenizers cannot open such a path
        m.row(f"`sae {name}`", outcome, code, "", is_clean(outcome))
    shown = sae("config", "show", "train", "--out", home)
    m.row("`sae config show train` and --out b\\xff", shown, OK, "", is_clean(shown))
    m.row("`sae compare b\\xff/nothing`", sae("compare", home / "nothing"), USAGE, "the path is shown")
    m.row("... the cache", sae("cache", "verify", home / "new"), OK, "the same bytes", same_bytes(home / "new"))
    m.row(
        "`SAE_HOME=b\\xff sae cache list`", sae("cache", "list", env={"SAE_HOME": NOT_UTF8}), OK, "the cache is listed"
    )


def out_of_bounds(m: Matrix) -> None:
    m.head("JSON and TOML of absurd depth or size")
    run = copy_run("bounds", "run")
    deep, long = "[" * 20_000, "9" * 8000
    for name, text in (
        ("nested 20,000 deep", f"[train]\nsteps = {deep}\n"),
        ("with an integer of 8,000 digits", f"[train]\nsteps = {long}\n"),
        ("of 5 MB", "# long\n" * 750_000),
        ("with 20,000 wrong keys", "".join(f"k{n} = 1\n" for n in range(20_000))),
    ):
        Path("bounds.toml").write_text(text)
        m.row(f"`--config` {name}", sae("variants", "--config", "bounds.toml"), USAGE, "")
    for name, value in (("a value nested 20,000 deep", deep), ("an integer of 8,000 digits", long)):
        outcome = sae(*TRAIN[:-2], "--cache", "whole", "--set", f"k={value}", "--out", "bounds-runs")
        m.row(f"`--set k=` with {name}", outcome, USAGE, "nothing is written", not Path("bounds-runs").exists())
        outcome = sae("evaluate", run, *EVALUATE, "--set", f"core.alive_tokens={value}")
        m.row(f"`evaluate --set` with {name}", outcome, USAGE, "nothing is written")
        export = Path(f"bounds/{len(name)}")
        sae("export", run, "--to", "saelens", "--out", export)
        (export / "cfg.json").write_text('{"d_in": ' + value)
        outcome = sae("import", export, "--out", "bounds-imported")
        m.row(f"`import` of a config with {name}", outcome, DAMAGED, "", not Path("bounds-imported").exists())
        outcome = sae("import", "--list", export)
        m.row(f"`import --list` of a config with {name}", outcome, (OK, USAGE), "the export is listed")
    (run / "metrics.jsonl").write_text(f"{deep}\n{long}\n")
    for words in (["compare", run, "--out", "bounds.html"], ["dashboard", run, "--device", "cpu"]):
        outcome = sae(*words)
        note = next((line for line in outcome.err.splitlines() if "Left out" in line), "")
        m.row(f"metrics.jsonl with such lines: `sae {words[0]}`", outcome._replace(err=note + "\n"), OK, "", bool(note))


def senseless_numbers(m: Matrix) -> None:
    m.head("Numbers that make no sense, in other commands")
    for words in (
        ["reproduce", "004", "--seed", -1],
        ["reproduce", "004", "--width", 0],
        ["reproduce", "004", "--steps", 0],
        ["train", "--variant", "topk", "--seed", 2**63],
        ["train", "--variant", "topk", "--l0", "nan"],
        ["train", "--variant", "topk", "--width", "-1"],
        ["evaluate", "nothing", "--tokens", 0],
        ["evaluate", "nothing", "--max-norm", -1],
        ["dashboard", "nothing", "--latents", 0],
        ["inspect", "nothing", "--latent", -1],
        ["import", "nothing", "--layer", -1],
    ):
        m.row(
            f"`sae {words[0]} {words[-2]} {words[-1]}`", sae(*words), USAGE, "refused before any file is searched for"
        )


def full_pages(m: Matrix) -> None:
    m.head("Pages, plots and exports on a full disk")
    run = copy_run("pages-run", "run")
    with disk("pages", "64k") as found:
        if found is None:
            m.rows.append(("a full disk", "not tried here: mounting is not permitted", "", ""))
            return
        Path("pages/filler").write_bytes(b"\0" * 65_536)
        for words in (
            ["compare", run, "--plots", "pages/plots"],
            *(["compare", run, "--out", f"pages/x.{suffix}"] for suffix in ("html", "csv", "json")),
            ["dashboard", run, "--device", "cpu", "--out", "pages/d.html"],
            ["export", run, "--to", "saelens", "--out", "pages/e"],
            ["export", run, "--to", "dictionary-learning", "--out", "pages/d"],
        ):
            outcome = sae(*words)
            left = [path for path in Path("pages").rglob("*") if path.is_file() and path.name != "filler"]
            m.row(f"full disk: `sae {words[0]} {words[-2]}`", outcome, OUTSIDE, "no partial file", not left)
            for path in left:
                path.unlink()


def two_exports(m: Matrix) -> None:
    m.head("Two exports of one run at once")
    run = copy_run("twice", "run")
    both = [Command("export", run, "--to", "saelens", "--out", "twice/out") for _ in range(2)]
    first, second = sorted((command.wait() for command in both), key=lambda outcome: outcome.code)
    names = sorted(path.name for path in Path("twice/out").iterdir())
    m.row(
        "one of the two exports", first, OK, "its files are written", names == ["cfg.json", "sae_weights.safetensors"]
    )
    again = sae("import", "twice/out", "--out", "twice/imported")
    m.row("the other export", second, (USAGE, OUTSIDE), "none of its files is left", again.code == OK)


@contextlib.contextmanager
def judge(reply: bytes, end: bytes = b"") -> Iterator[str]:
    """The URL of a server that answers with these bytes and then, if `end` is given, repeats `end` without stopping."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 20)
            length = b"" if end else b"Content-Length: %d\r\n" % len(reply)
            connection.sendall(b"HTTP/1.1 200 OK\r\n" + length + b"\r\n" + reply)
            while end:
                connection.sendall(end)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                answer(listener.accept()[0])

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    listener.close()


def odd_judges(m: Matrix) -> None:
    m.head("The judge of autointerp")
    run = copy_run("judged", "run")
    for name, reply, end in (
        ("answers without end", b"", b"a" * 65536),
        ("answers with JSON nested 100,000 deep", b"[" * 100_000, b""),
        ("answers with a number of 8,000 digits", b"9" * 8000, b""),
        ("answers with bytes that are not UTF-8", b'{"choices": [{"message": {"content": "\xff"}}]}', b""),
        ("answers with a list", b'{"choices": [{"message": {"content": [1]}}]}', b""),
    ):
        with judge(reply, end) as url:
            options = [f"autointerp.endpoint={url}", "autointerp.judge_model=j"]
            words = [word for option in options for word in ("--set", option)]
            outcome = sae("evaluate", run, "--suite", "autointerp", *words, "--device", "cpu", "--no-references")
        left = (run / "evaluations" / "autointerp.json").exists()
        said = outcome.err.replace(url, "URL")
        m.row(f"a judge that {name}", outcome._replace(err=said), OUTSIDE, "nothing is written", not left)


def outputs(m: Matrix) -> None:
    for group in (
        hostile_names,
        odd_paths,
        out_of_bounds,
        senseless_numbers,
        full_pages,
        two_exports,
        odd_judges,
    ):
        group(m)
