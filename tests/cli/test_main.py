"""What a user sees when something goes wrong: one sentence, the right exit code, and never a traceback."""

import io
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer
from typer.testing import CliRunner, Result

from sae.cli.console import BROKEN_PIPE, cli_command, show_table
from sae.cli.main import app
from sae.common.errors import Interrupted, UsageError
from sae.common.formatting import format_count
from sae.train.sae import SAE, save_sae

BAD_USAGE, DAMAGED, OUTSIDE = 2, 3, 4


def call(*words) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(code: int, *words) -> str:
    """The one-line error on stderr of a command that is rejected."""
    result = call(*words)
    assert result.exit_code == code, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)  # and so no traceback
    assert result.stdout == ""
    assert len(re.findall("^error: ", result.stderr, re.M)) == 1
    *before, sentence = result.stderr.partition("error: ")
    assert re.fullmatch(r"([a-z]+ +.*\n)*error: ", "".join(before))
    assert "Traceback" not in sentence
    assert len(sentence.strip()) > 20
    return sentence.strip()


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def untrained(folder: Path, cache) -> Path:
    origin = {"model": cache.identity["model"], "layer": 0, "cache": str(cache.folder)}
    save_sae(SAE(32, 16), folder, {**origin, "fingerprint": cache.attributes["fingerprint"]})
    return folder


# --- the whole program ----------------------------------------------------------------------------------------------


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def without_imports(*words: str) -> subprocess.CompletedProcess[str]:
    """A command of the real program, which ends before anything heavy is imported."""
    shown = python(
        "import sys\n"
        "from sae.cli.main import app\n"
        f"try:\n    app({list(words)})\n"
        "except SystemExit as ended:\n    code = ended.code\n"
        "print('heavy:', sorted({'torch', 'transformers', 'datasets', 'zarr', 'numpy'} & set(sys.modules)))\n"
        "sys.exit(code)"
    )
    assert "heavy: []" in shown.stdout
    return shown


def test_a_share_that_does_not_exist_is_refused_at_once():
    shown = without_imports("harvest", "--share", "0/4")
    assert shown.returncode == BAD_USAGE
    assert shown.stderr.startswith("error: invalid --share 0/4: shares are numbered from 1 to 4.")


def test_help_lists_the_commands_and_does_not_import_torch():
    shown = without_imports("--help")
    assert shown.returncode == 0, shown.stderr
    for command in ("demo", "harvest", "train", "evaluate", "variants", "cache"):
        assert re.search(rf"\b{command}\b", shown.stdout), command


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["cache", "info"], "nothing/here holds no activation cache"),
        pytest.param(["evaluate"], "There is no run folder 'nothing/here'. For an SAE on", marks=pytest.mark.slow),
    ],
)
def test_an_error_is_one_sentence_on_stderr_of_the_real_program(command, sentence):
    shown = python(f"from sae.cli.main import app; app({[*command, 'nothing/here']})")
    assert shown.returncode == BAD_USAGE
    assert shown.stdout == ""
    assert shown.stderr.startswith(f"error: {sentence}")
    assert len(shown.stderr.splitlines()) == 1


def test_the_version_is_three_numbers():
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", call("--version").stdout)


@pytest.mark.parametrize(
    ("text", "number"),
    [("10M", 10_000_000), ("2e8", 200_000_000), ("1.5b", 1_500_000_000), ("500k", 500_000), ("77", 77)],
)
def test_tokens_have_units(text, number):
    from sae.cli.options import parse_tokens

    assert parse_tokens(text) == number


@pytest.mark.parametrize("text", ["many", "10Q", "", "M", "nan", "inf"])
def test_invalid_token_counts_are_rejected(text):
    result = call("harvest", "--model", "gemma-2-mini", "--tokens", text)
    assert result.exit_code == BAD_USAGE
    assert "invalid token count" in " ".join(re.sub("[│╭╮╰╯─]", " ", result.stderr).split())


# --- harvest --------------------------------------------------------------------------------------------------------


def test_a_layer_after_the_last_is_rejected():
    sentence = refused(BAD_USAGE, "harvest", "--model", "gemma-2-mini", "--layer", 26)
    assert sentence == "gemma-2-mini has no layer 26: its 26 blocks are layers 0 to 25."


def test_gemma_without_access_names_the_license_and_an_alternative():
    sentence = refused(OUTSIDE, "harvest", "--layer", 12)
    for needed in ("https://huggingface.co/google/gemma-2-2b", "`hf auth login`", "--model gemma-2-mini"):
        assert needed in sentence


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("binary.txt", b"\xff\xfe\x00\x80", "the byte 0xff is not UTF-8"),
        ("empty.txt", b"", "empty.txt is empty"),
        ("empty.jsonl", b"", "empty.jsonl is empty"),
        ("blank.txt", b" \n\n\t\n", "has no tokens to harvest"),
        ("broken.jsonl", b'{"text": "a"}\n{"text"', r"broken.jsonl line 2: it is not JSON"),
        ("column.jsonl", b'{"content": "a"}\n', "has no column 'text'; its columns are 'content'"),
        ("table.parquet", b"PAR1", "cannot be read as parquet"),
        ("sheet.xls", b"x", "expected files of one format"),
        ("short.txt", b"three words only", "has only .* of the requested 1,000 tokens"),
    ],
)  # fmt: skip
def test_text_that_cannot_be_harvested_is_rejected(tiny_model, home, name, content, sentence):
    (home / name).write_bytes(content)
    words = ("--model", tiny_model, "--layer", 0, "--dataset", home / name, "--tokens", "1k", "--out", home / "out")
    found = refused(BAD_USAGE, "harvest", *words)
    assert re.search(sentence, found)
    assert not (home / "out" / "zarr.json").exists()


def test_paths_that_are_not_utf8_work_or_are_refused_with_a_sentence(tiny_model, tiny_cache, home):
    odd = home / os.fsdecode(b"b\xff")
    run = untrained(odd / "run", tiny_cache)
    found = refused(BAD_USAGE, "harvest", "--model", odd / "model", "--layer", 0)
    assert "is not UTF-8" in found and r"b\xff" in found
    result = call("evaluate", run, "--suite", "core", "--tokens", 60, "--device", "cpu", "--no-references")
    assert result.exit_code == 0, result.output
    result = call("compare", run, "--out", odd / "x.csv", "--out", odd / "x.html", "--out", odd / "x.json")
    assert result.exit_code == 0 and r"b\xff/x.json" in result.stderr
    assert (odd / "x.csv").exists() and "\ufffd" not in (odd / "x.json").read_text()


def test_a_missing_text_is_rejected(tiny_model):
    found = refused(BAD_USAGE, "harvest", "--model", tiny_model, "--layer", 0, "--dataset", "./no such.txt")
    assert "There is no file" in found


def test_a_dry_run_writes_nothing(tiny_model, sentences, tiny_cache, home):
    result = call("harvest", "--model", tiny_model, "--layer", 0, "--dataset", sentences, "--tokens", "2k", "--dry-run")
    assert result.exit_code == 0
    assert "blocks.0.hook_resid_post = model.layers.0, hidden_states[1], 32 wide" in result.stderr
    assert "2,000 tokens x 74 B" in result.stderr  # 2 x 32 and 4 for the norm, 6 for where the row came from
    result = call("train", "--variant", "topk", "--layer", 0, "--cache", tiny_cache.folder, "--dry-run")
    assert result.exit_code == 0
    assert "topk 32 -> 256, layer 0, seed 0" in result.stderr
    assert files(home) == set()


def test_a_plan_lists_scaled_and_ineffective_options(tiny_cache):
    def notes(*words) -> list[str]:
        shown = call(*train(tiny_cache, "--variant", "competition", "--dry-run", *words)).stderr
        return [line for line in shown.splitlines() if line.startswith("note ")]

    assert notes() == ["note     competition: k 100 at d_in 2304 -> 1 at 32"]
    *literal, unscaled = notes("--paper-exact", "--set", "reduction=n")
    assert [line.split("=")[0].split()[-1] for line in literal] == ["tau_on", "pair_store"]
    assert "warning, tau_on=lift as in the paper: chance is 1" in literal[0]
    assert unscaled.endswith("--paper-exact uses the paper's number for k without scaling it to the run")


# --- train ----------------------------------------------------------------------------------------------------------


def train(cache, *words) -> tuple:
    return ("train", "--layer", 0, "--cache", cache.folder, *words)


def test_an_unknown_variant_is_rejected_with_a_suggestion(tiny_cache):
    found = refused(BAD_USAGE, *train(tiny_cache, "--variant", "decorelation"))
    assert found.startswith("unknown variant 'decorelation'; did you mean decorrelation?")


def test_an_unknown_option_is_rejected_with_a_suggestion(tiny_cache, home):
    found = refused(BAD_USAGE, *train(tiny_cache, "--variant", "relu", "--set", "l1_warmpu=3"))
    assert "relu has no option l1_warmpu; did you mean l1_warmup?" in found
    assert not (home / "runs").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--variant", "topk", "--set", "k"], "--set k has no value"),
        (["--variant", "topk", "--set", "k=many"], "k='many' has the wrong type: expected int"),
        (["--variant", "topk", "--set", "k=0"], "k=0 is out of range"),
        (["--variant", "topk", "--set", "k=8", "--set", "k=9"], "--set gives k more than once"),
        (["--variant", "topk", "--set", "k=8", "--l0", "9"], "--l0 9 and k=8 set the same option: give one"),
        (["--variant", "topk", "--set", "relu.l1=1"], "relu is not one of the variants topk"),
        (["--variant", "topk", "--batch-size", "9000"], "fewer than one batch of 9,000"),
        ([], "Nothing to train: give --variant"),
        (["--resume", "nothing"], "nothing is not a run folder"),
    ],
)
def test_invalid_training_options_are_rejected(tiny_cache, home, words, sentence):
    assert sentence in refused(BAD_USAGE, *train(tiny_cache, *words))
    assert not (home / "runs").exists()


SENSELESS = [
    ("harvest", "--tokens", "0"), ("harvest", "--tokens", "-5"), ("harvest", "--tokens", "0.2"),
    ("harvest", "--layer", "-1"), ("harvest", "--max-norm", "0"), ("harvest", "--max-norm", "-2"),
    ("harvest", "--batch-contexts", "0"), ("train", "--width", "wide"), ("train", "--width", "0"),
    ("train", "--width", "-3"), ("train", "--width", "0x"), ("train", "--width", "infk"), ("train", "--width", "nanx"),
    ("train", "--width", "9" * 5000), ("train", "--l0", "0"), ("train", "--l0", "nan"), ("train", "--l0", "inf"),
    ("train", "--steps", "0"), ("train", "--steps", "-1"), ("train", "--seed", "-1"), ("train", "--seed", str(2**63)),
    ("train", "--shuffle-seed", "-1"), ("train", "--batch-size", "0"), ("train", "--ring", "0"),
    ("train", "--context", "1"), ("train", "--window", "0"), ("train", "--checkpoint-every", "0"),
    ("train", "--log-every", "0"), ("train", "--layer", "-1"), ("train", "--tokens", "-1"),
    ("evaluate", "run", "--tokens", "0"), ("evaluate", "run", "--layer", "-1"), ("evaluate", "run", "--max-norm", "0"),
    ("dashboard", "run", "--latents", "0"), ("dashboard", "run", "--passage", "0"),
    ("dashboard", "run", "--tokens", "0"),
    ("inspect", "run", "--latent", "-1"), ("inspect", "run", "--passage", "-4"), ("demo", "--steps", "0"),
    ("reproduce", "004", "--seed", "-1"), ("reproduce", "004", "--width", "0"), ("reproduce", "004", "--layer", "-1"),
    ("reproduce", "004", "--steps", "0"), ("reproduce", "004", "--batch-size", "-1"),
    ("reproduce", "004", "--evaluate-tokens", "0"), ("import", "x", "--layer", "-1"),
]  # fmt: skip


@pytest.mark.parametrize("words", SENSELESS, ids=lambda words: " ".join(words)[:40])
def test_senseless_numbers_are_refused_when_they_are_read(words, monkeypatch):
    """The parser refuses them. The command itself, which would look for runs and models, does not start."""
    monkeypatch.setattr("sae.cli.console._run_command", lambda *_: pytest.fail("the command has begun"))
    result = call(*words)
    assert result.exit_code == BAD_USAGE, result.output
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", result.stderr).split())
    assert f"Invalid value for '{words[-2]}'" in shown and len(shown) < 6000


def test_a_missing_cache_names_the_command_that_creates_it(home):
    found = refused(BAD_USAGE, "train", "--variant", "topk", "--layer", 12, "--model", "gemma-2-mini")
    assert "No cache holds layer 12 of gemma-2-mini" in found
    assert (
        "`sae harvest --layer 12` --model gemma-2-mini" in found
        or "sae harvest --layer 12 --model gemma-2-mini" in found
    )


def copy_of(cache, folder: Path) -> Path:
    import shutil

    return shutil.copytree(cache.folder, folder)


def test_a_cache_of_another_model_is_rejected(tiny_cache, home):
    words = train(tiny_cache, "--variant", "topk", "--model", "gemma-2-mini")
    assert "not of gemma-2-mini. Leave --model out" in refused(BAD_USAGE, *words)
    assert not (home / "runs").exists()


def test_a_half_written_cache_is_rejected_and_the_message_says_how_to_finish_it(tiny_cache, home):
    from sae.common.cache_schemas import CACHE_RECORD

    half = copy_of(tiny_cache, home / "activations" / "half")
    (half / "manifest.json").unlink()
    root = CACHE_RECORD.read(half / "zarr.json")
    root["attributes"]["complete"] = []
    CACHE_RECORD.write(half / "zarr.json", root)
    sentence = r"half written.* Run the same `sae harvest` again to finish it"
    assert re.search(sentence, refused(BAD_USAGE, "train", "--variant", "topk", "--layer", 0))
    assert re.search(sentence, refused(BAD_USAGE, "train", "--variant", "topk", "--layer", 0, "--cache", half))


def test_several_matching_caches_are_listed_with_their_flags(tiny_cache, home):
    folders = [copy_of(tiny_cache, home / "activations" / name) for name in ("one", "two")]
    found = refused(BAD_USAGE, "train", "--variant", "topk", "--layer", 0)
    for folder in folders:
        assert f"--cache {folder}" in found


def test_a_layer_missing_from_the_cache_is_rejected(tiny_cache):
    found = refused(BAD_USAGE, "train", "--variant", "topk", "--layer", 7, "--cache", tiny_cache.folder)
    assert "holds layer 0, layer 1, not layer 7" in found


# --- evaluate -------------------------------------------------------------------------------------------------------


def test_a_run_of_another_model_is_rejected(tiny_cache, home):
    run = untrained(home / "run", tiny_cache)
    assert "not on gemma-2-mini" in refused(BAD_USAGE, "evaluate", run, "--model", "gemma-2-mini")


def test_damaged_weights_are_rejected(tiny_cache, home):
    run = untrained(home / "run", tiny_cache)
    weights = run / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "does not hold the SAE that sae.json describes" in refused(DAMAGED, "evaluate", run)


def test_metrics_that_a_reference_cannot_have_are_not_failures(tiny_cache, home, monkeypatch):
    """The identity has no directions and so no absorption. The run itself is measured, and the exit code is 0."""
    from sae.evaluate.metrics.base import MetricResult
    from sae.evaluate.metrics.core import Core
    from sae.evaluate.metrics.registry import METRICS

    class Picky(Core):
        name = "picky"

        def measure(self, bench, subjects, progress):
            return [MetricResult({}) if hasattr(s.sae, "W_dec") else UsageError("no W_dec") for s in subjects]

    monkeypatch.setitem(METRICS, "picky", Picky)
    run = untrained(home / "run", tiny_cache)
    result = call("evaluate", run, "--suite", "core,picky", "--tokens", "60", "--device", "cpu")
    assert result.exit_code == 0 and "not run" not in result.output


def test_evaluate_prints_its_plan_before_and_the_next_command_after(tiny_cache, home):
    runs = [untrained(home / "runs" / name, tiny_cache) for name in "abc"]
    planned = call("evaluate", *runs, "--suite", "core", "--tokens", 60, "--device", "cpu", "--dry-run")
    assert planned.exit_code == 0 and planned.stdout == ""
    heads = [line.split()[0] for line in planned.stderr.splitlines()]
    assert heads == ["runs", "model", "text", "masked", "metric", "writes"]
    assert (
        "metric   core: 3 to measure" in planned.stderr and "3 after layer 0; with rows for identity" in planned.stderr
    )
    assert not list(home.rglob("evaluations"))
    partly = call("evaluate", runs[0], home, "--suite", "core", "--tokens", 60, "--device", "cpu", "--dry-run")
    assert partly.exit_code == 1 and "refused  " in partly.stderr  # the same exit code as without --dry-run
    done = call("evaluate", runs[0], "--suite", "core", "--tokens", 60, "--device", "cpu")
    assert [line.split()[0] for line in done.stderr.splitlines()][-2:] == ["done", "next"]
    again = call("evaluate", *runs, "--suite", "core", "--tokens", 60, "--device", "cpu")
    assert "metric   core: 2 to measure, 1 already measured" in again.stderr
    following = again.stderr.splitlines()[-1].split(maxsplit=1)
    assert following == ["next", f"sae evaluate {home}/runs/* --suite quick --device cpu"]


def test_a_broken_run_is_named_and_sets_the_exit_code(tiny_cache, home):
    good, broken, text = (
        untrained(home / "good", tiny_cache),
        untrained(home / "broken", tiny_cache),
        home / "notes.txt",
    )
    (broken / "sae.safetensors").write_bytes(b"")
    text.write_text("mine")
    words = ("--suite", "core", "--tokens", 60, "--device", "cpu", "--no-references")
    result = call("evaluate", good, broken, text, *words)
    assert result.exit_code == 1 and "good" in result.stdout and "broken" not in result.stdout
    named = [line for line in result.stderr.splitlines() if line.startswith("refused")]
    assert len(named) == 2 and "broken/sae.safetensors" in named[0] and "notes.txt contains no trained SAE" in named[1]
    assert "Refused, for the reasons above: 2 runs" in result.stderr and "Traceback" not in result.stderr
    assert "broken/sae.safetensors" in refused(DAMAGED, "evaluate", broken, *words)


def test_each_unavailable_metric_of_a_suite_is_named_once(tiny_cache, home, monkeypatch):
    """A suite then still succeeds; a metric that was requested by name fails."""
    from sae.evaluate.metrics.registry import SUITES

    monkeypatch.setitem(SUITES, "full", ("core", "scr", "unlearning"))
    run = untrained(home / "run", tiny_cache)
    words = ("--tokens", 60, "--device", "cpu", "--no-references")
    result = call("evaluate", run, "--suite", "full", *words)
    assert result.exit_code == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("not run")]
    assert [line.split()[2] for line in lines] == ["scr:", "unlearning:"] and "--data" in lines[0]
    assert "Not run, for the reasons above: scr, unlearning" in result.stderr
    assert call("evaluate", run, "--suite", "core,scr", *words).exit_code == 1
    assert "LabHC/bias_in_bios could not be read" in refused(OUTSIDE, "evaluate", run, "--suite", "scr", *words)


def test_a_missing_gpu_is_rejected(tiny_cache, home):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run = untrained(home / "run", tiny_cache)
    assert "torch sees no GPU" in refused(OUTSIDE, "evaluate", run, "--device", "cuda")


# --- cache ----------------------------------------------------------------------------------------------------------


def test_caches_are_listed_and_verified(tiny_cache, home):
    copy = copy_of(tiny_cache, home / "activations" / "copy")
    assert re.search(r"copy   .*tiny-gemma-[0-9a-f]{8}, layer 0, layer 1, 8,000 rows", call("cache", "list").stdout)
    shown = call("cache", "verify", copy)
    assert shown.exit_code == 0
    assert "all checksums match" in shown.stdout
    chunk = copy / "layer_00" / "c.0.0"
    raw = bytearray(chunk.read_bytes())
    raw[100] ^= 1
    chunk.write_bytes(raw)
    assert "a bit was flipped" in refused(DAMAGED, "cache", "verify", copy)
    assert "holds no activation cache" in refused(BAD_USAGE, "cache", "verify", home)


@pytest.mark.parametrize("there", [True, False])
def test_no_confirmation_is_asked_for_a_folder_that_is_not_a_cache(home, there):
    if there:
        (home / "thesis").mkdir()
        (home / "thesis" / "chapter.tex").touch()
    assert "thesis holds no activation cache; nothing was deleted" in refused(BAD_USAGE, "cache", "rm", home / "thesis")


def test_an_unanswered_question_deletes_nothing(tiny_cache, home):
    copy = copy_of(tiny_cache, home / "copy")
    result = CliRunner().invoke(app, ["cache", "rm", str(copy)], input="")
    assert result.exit_code == 130
    assert "stopped: Nothing was deleted. Use --yes to delete without confirmation." in result.stderr
    assert (copy / "zarr.json").exists()


def test_the_next_command_can_be_pasted(tiny_model, sentences, home):
    folder = home / "two words"
    words = ("--model", tiny_model, "--layer", 0, "--dataset", sentences, "--tokens", 300, "--window", 256)
    result = call("harvest", *words, "--out", folder)
    *_, following = result.stderr.splitlines()
    assert shlex.split(following)[-2:] == ["--cache", str(folder)]


def test_an_unknown_attention_is_rejected(tiny_model, sentences, home):
    words = ["harvest", "--model", tiny_model, "--layer", 0, "--dataset", sentences, "--attention", "nonsense"]
    assert "--attention nonsense cannot be used: " in refused(BAD_USAGE, *words)
    assert files(home) == set()


@pytest.mark.parametrize(
    "command",
    [
        *(["config", "init"], ["--help"], ["train", "-h"]),
        *(pytest.param(command, marks=pytest.mark.slow) for command in (["variants"], ["cache", "list"])),
    ],
)
def test_a_closed_pipe_is_silent(command):
    """As for a program that SIGPIPE ends, stderr is empty and the exit code is 141, which a shell would report."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sae", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    stderr = process.stderr.read()
    assert (process.wait(), stderr) == (BROKEN_PIPE, "")


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("Stopped. 2 of 3 windows are safe.", "stopped: 2 of 3 windows are safe."),
        ("Stopped after step 7; everything is saved.", "stopped: after step 7; everything is saved."),
        ("Nothing was deleted.", "stopped: Nothing was deleted."),
    ],
)
def test_an_interruption_says_stopped_once(capsys, message, line):
    def interrupted():
        raise Interrupted(message)

    with pytest.raises(typer.Exit) as left:
        cli_command(interrupted)()
    assert (left.value.exit_code, capsys.readouterr().err) == (130, line + "\n")


def test_running_out_of_memory_prints_one_line(capsys):
    for error in (MemoryError("Unable to allocate 3.00 TiB"), RuntimeError("can't allocate memory: 3.00 TiB.\nFrame")):

        def too_much(error=error):
            raise error

        with pytest.raises(typer.Exit) as left:
            cli_command(too_much)()
        assert left.value.exit_code == OUTSIDE
        said = capsys.readouterr().err
        assert "3.00 TiB. Everything committed is safe. Use a smaller --window, --context" in said
        assert "allocate" in said and said.count("\n") == 1


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_prints_no_traceback(monkeypatch):
    """The second Ctrl-C comes while the message about the first is printed. A third one would come too late."""
    said = []

    def again(sentence, err):
        said.append(sentence)
        signal.raise_signal(signal.SIGINT)

    def interrupted():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise UsageError("--tokens 0 is not positive.") from None

    def slow():
        raise UsageError("--tokens 0 is not positive.")

    def saved():
        raise Interrupted("Stopped after step 3; everything is saved.")

    monkeypatch.setattr(typer, "echo", again)
    for command, code in ((slow, 130), (interrupted, BAD_USAGE), (saved, 130)):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(typer.Exit) as left:
            cli_command(command)()
        assert left.value.exit_code == code
    assert [sentence.split()[0] for sentence in said] == ["error:", "stopped:", "error:", "stopped:"]


def test_sigterm_is_as_ctrl_c_in_every_command(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(typer.Exit) as left:
        cli_command(lambda: signal.raise_signal(signal.SIGTERM))()
    assert left.value.exit_code == 130 and signal.getsignal(signal.SIGTERM) is before
    assert "Everything committed is safe; run the same command again to continue." in capsys.readouterr().err


def test_a_narrow_terminal_does_not_break_the_numbers_of_a_table(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich then treats the output as a terminal
    show_table("t", ["run", *"abcdefgh"], [["topk-L12-n512-s0-dd3101", *["0.9755 ±.0028"] * 8]])
    assert capsys.readouterr().out.count("0.9755 ±.0028") == 8


def test_a_table_shows_names_verbatim_and_its_title_on_one_line(capsys):
    title = "autointerp, by detection (always none: 0.714); n = 256 latents"
    show_table(title, ["run"], [["a[/b] [red]c"]])
    assert capsys.readouterr().out.splitlines()[0] == title
    show_table("t", ["run"], [["a[/b] [red]c"]])
    assert "a[/b] [red]c" in capsys.readouterr().out


def test_characters_that_the_output_cannot_encode_are_replaced(monkeypatch):
    """The table is still printed with LANG=C on an old machine, ISO-8859-1 or a Windows code page."""
    out = io.TextIOWrapper(io.BytesIO(), "ascii", "strict")
    monkeypatch.setattr(sys, "stdout", out)
    cli_command(lambda: show_table("t", ["run", "EV \u2191"], [["a", "1 \u00b1.5"]]))()
    out.flush()
    assert b"EV ?" in out.buffer.getvalue() and b"1 ?.5" in out.buffer.getvalue()


def test_a_folder_that_cannot_be_created_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(typer.Exit) as left:
        cli_command(lambda: (tmp_path / "file" / "plots").mkdir())()
    assert left.value.exit_code == 4
    assert "plots: Not a directory. Check the folder's permissions" in capsys.readouterr().err


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Restore the handler of SIGINT: the program ignores the signal after the first one."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("when", ["the modules are read", "the words are parsed"])
def test_ctrl_c_before_a_command_begins_prints_one_line(monkeypatch, capsys, when):
    from sae.__main__ import main

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    class Slow(ModuleType):
        __getattr__ = interrupted

    monkeypatch.setattr(sys, "argv", ["sae", "variants"])
    if when == "the modules are read":
        monkeypatch.setitem(sys.modules, "sae.cli.main", Slow("sae.cli.main"))
    else:
        monkeypatch.setattr(typer.core.TyperGroup, "make_context", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 130 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert capsys.readouterr().err == "stopped: interrupted before anything was started.\n"


def test_counts_use_the_singular_for_one():
    assert [format_count(n, "run") for n in (0, 1, 2, 1000)] == ["0 runs", "1 run", "2 runs", "1,000 runs"]
