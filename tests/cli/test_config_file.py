"""--config means the same as the flags: it is checked like them, overridden by them, and shown with its origins."""

import contextlib
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.main import get_command
from typer.testing import CliRunner, Result

from sae.cli.config_file import RENAMED, flatten, line_numbers, options_of, to_toml
from sae.cli.main import app

BAD_USAGE = 2


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def shown(*words: object) -> tuple[dict, dict[str, str]]:
    """What `sae config show` prints: the TOML, and the origin of each line."""
    result = call("config", "show", *words)
    assert result.exit_code == 0, result.output
    lines = (re.fullmatch(r"#? ?([^ ]+|    \"[^ ]*\",)( .*)?  # (.+)", line) for line in result.stdout.splitlines())
    return tomllib.loads(result.stdout), {m[1].strip(): m[3] for m in lines if m}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sae.toml"
    path.write_text(
        "# of two verbs\n[harvest]\nmodel = 'gemma-2-mini'\nlayer = [0,\n   1]\ntokens = '3k'\nkeep-special = true\n"
        "[train]\nsteps = 100\nvariant = 'topk'\nl0 = [16, 32.5]\n[train.set]\n"
        "k = 64\nb_dec_init = 'zero'\ntopk.lr = 1e-3\n"
    )
    return path


def test_flags_override_the_file_and_the_file_overrides_the_defaults(file: Path) -> None:
    values, origins = shown("train", "--config", file, "--steps", "5", "--set", "k=3", "--set", "clip=none")
    assert values["train"] | {
        "steps": 5, "variant": ["topk"], "l0": [16, 32.5], "site": "resid_post",
        "set": ["b_dec_init=zero", "topk.lr=0.001", "k=3", "clip=none"],
    } == values["train"]  # fmt: skip
    assert origins | {
        "steps": "flag", "variant": f"{file}:10", "l0": f"{file}:11", "site": "default", "seed": "not set",
        '"b_dec_init=zero",': f"{file}:14", '"topk.lr=0.001",': f"{file}:15", '"k=3",': "flag",
    } == origins  # fmt: skip
    values, origins = shown("harvest", "--config", file)
    assert values["harvest"]["tokens"] == 3000 and values["harvest"]["layer"] == [0, 1]
    assert (origins["layer"], origins["tokens"], origins["keep-special"]) == (f"{file}:4", f"{file}:6", f"{file}:7")


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--variant", "topk", "--variant", "relu", "--l0", "32", "--set", "k=64", "--width", "16k",
         "--out", 'a "b" \\ c'],
        ["train", "--stream", "--tokens", "10M", "--seed", "3", "--literal", "--log", "wandb"],
        ["harvest", "--layer", "5", "--layer", "12", "--held-out", "0.1", "--no-keep-special", "--max-norm", "1e1"],
        ["evaluate", "runs/a", "--set", "sparse_probing.k=1,2,5", "--no-references", "--json"],
        ["cache", "repair", "folder", "--device", "cpu"],
        ["variants"],
    ],
)  # fmt: skip
def test_shown_values_can_be_read_back(words: list[str], tmp_path: Path) -> None:
    first = call("config", "show", *words).stdout
    (tmp_path / "again.toml").write_text(first)
    verb = [word for word in words[:2] if word in ("cache", "repair")] or words[:1]
    again = call("config", "show", *verb, "--config", tmp_path / "again.toml")
    assert again.exit_code == 0, again.output
    assert tomllib.loads(again.stdout) == tomllib.loads(first)
    assert "# flag" not in again.stdout


def test_all_mistakes_are_reported_with_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(
        "seed = 0\n[harvst]\nx = 1\n[harvest]\nbatch_contexts = 3\ntokens = 'many'\npack = 1\n"
        "model = ['a']\ncontext = true\n"
        "[train]\nsteps = 'ten'\nlayer = [1, 'a']\nlog-every = 0\nsteps-every = 1\nseed = 1979-05-27\n"
        "[train.out]\na = 1\n"
        "[cache]\nverfy = 3\nlist = 4\n"
    )
    result = call("variants", "--config", path)  # whichever command reads it
    assert result.exit_code == BAD_USAGE and result.stdout == ""
    lines = result.stderr.removeprefix("error: ").splitlines()
    expected = {
        1: "unknown command 'seed'",
        2: "unknown command 'harvst'; did you mean harvest?",
        5: "unknown harvest option 'batch_contexts'; did you mean batch-contexts?",
        6: 'tokens = "many": .*many.*',
        7: "pack = 1: expected true or false.",
        8: "expected one value, not a list.",
        9: "expected a value, not true or false",
        11: 'steps = "ten": .*valid integer',
        12: "layer = .*valid integer",
        13: "log-every = 0: .*1",
        14: "unknown train option 'steps-every'",
        15: "expected a string or a number",
        16: "out = .*: expected a value, not a table.",
        19: "unknown command 'verfy'; did you mean verify?",
        20: r"list is a command; write its options under \[cache.list\]",
    }
    assert len(lines) == len(expected)
    for line, (number, sentence) in zip(lines, expected.items(), strict=True):
        assert re.search(f"^{re.escape(str(path))}:{number}: .*{sentence}", line), line


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "unknown command 'trian' of .*; did you mean train?"),
        (["cache"], "unknown command '' of cache; available: info, list, repair, rm, verify."),
        (["train", "--steps", "x"], "Invalid value for '--steps'"),
    ],
)
def test_unknown_commands_are_rejected(words: list[str], sentence: str) -> None:
    result = call("config", "show", *words)
    assert result.exit_code == BAD_USAGE and re.search(sentence, result.stderr) and result.stdout == ""


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read: No such file"),
        (b"a = ", "is not valid TOML: Invalid value"),
        (b"a = '\xff'", "is not UTF-8"),
    ],
)
def test_an_unreadable_file_prints_one_line(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "c.toml").write_bytes(content)
    result = call("cache", "list", "--config", tmp_path / "c.toml")
    assert result.exit_code == BAD_USAGE and sentence in result.stderr


def test_a_command_takes_its_file_and_records_the_origins(tiny_cache, tmp_path: Path) -> None:
    path = tmp_path / "sae.toml"
    path.write_text(
        f"[train]\nvariant = ['topk', 'relu']\nlayer = 1\ncache = {to_toml(str(tiny_cache.folder))}\nsteps = 3\n"
        "batch-size = 256\n"
        "width = '2x'\n[train.set]\nlr = 1e-3\ntopk.k = 8\n"
    )
    result = call("train", "--config", path, "--steps", 2, "--set", "topk.k=4")
    assert result.exit_code == 0, result.output
    records = [json.loads((run / "run.json").read_text()) for run in sorted((tmp_path / "runs").iterdir())]
    assert [(r["variant"], r["options"], r["steps"]) for r in records] == [
        ("relu", {"lr": 1e-3}, 2), ("topk", {"lr": 1e-3, "k": 4}, 2),
    ]  # fmt: skip
    for record in records:
        asked = record["asked"]
        assert (asked["steps"], asked["caches"], asked["log_every"]) == (2, [str(tiny_cache.folder)], None)
        assert asked["origins"] == {
            "variant": f"{path}:2", "layer": f"{path}:3", "cache": f"{path}:4", "steps": "flag",
            "batch-size": f"{path}:6", "width": f"{path}:7", "set": f"{path}:9, flag",
        }  # fmt: skip


def test_the_starter_file_is_valid_as_it_is_and_with_its_defaults_uncommented(tmp_path: Path) -> None:
    starter = call("config", "init").stdout
    (tmp_path / "starter.toml").write_text(starter)
    with_defaults = re.sub(r"(?m)^# (\S+ = \S)", r"\1", starter)
    (tmp_path / "defaults.toml").write_text(with_defaults)
    plain = [shown(verb)[0] for verb in ("harvest", "train", "evaluate")]
    for name in ("starter", "defaults"):
        assert [shown(v, "--config", tmp_path / f"{name}.toml")[0] for v in ("harvest", "train", "evaluate")] == plain
    keys = {key for key, _ in flatten(tomllib.loads(with_defaults))}
    assert keys > {("harvest", "model"), ("train", "checkpoint-every")}


def commands(command: object, words: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], object]]:
    verbs = getattr(command, "commands", None)
    if verbs is None:
        return [(words, command)]
    return [found for name, verb in verbs.items() for found in commands(verb, (*words, name))]


@pytest.mark.parametrize(("words", "command"), commands(typer.main.get_command(app)), ids=lambda p: str(p)[:40])
def test_every_command_takes_config_and_no_flag_twice(words: tuple[str, ...], command: Any) -> None:
    flags = [flag for param in command.params for flag in (*param.opts, *param.secondary_opts)]
    assert ("--config" in flags) == (words[0] != "config")
    assert len(flags) == len(set(flags))
    assert all(option.param_type_name == "option" for option in options_of(command).values())


VALUES = st.text() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.booleans()


@given(VALUES | st.lists(VALUES, max_size=4))
@settings(max_examples=100)
def test_a_value_written_as_toml_reads_back(value: object) -> None:
    assert tomllib.loads(f"x = {to_toml(value)}") == {"x": value}


@pytest.mark.slow
@given(st.recursive(VALUES, st.lists, max_leaves=5))
@settings(max_examples=200)
def test_so_does_one_in_lists_of_lists(value: object) -> None:
    assert tomllib.loads(f"x = {to_toml(value)}") == {"x": value}


def test_keys_are_found_on_the_line_where_they_begin() -> None:
    text = "a = 1\r\n\n# \u2028 no\nb = '''\nc = 2\n'''\n[t]\nx = [\n 1,\n]\ny.z = 3\n[t.u]\n\nv = {w = 1}"
    assert line_numbers(text) == {
        ("a",): 1, ("b",): 4, ("t",): 7, ("t", "x"): 8, ("t", "y"): 11, ("t", "y", "z"): 11, ("t", "u"): 12,
        ("t", "u", "v"): 14, ("t", "u", "v", "w"): 14,
    }  # fmt: skip


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "sae.toml"
    path.write_bytes(b"\xef\xbb\xbf[train]\nsteps = 7\n")
    said, origins = shown("train", "--config", path)
    assert said["train"]["steps"] == 7 and origins["steps"] == f"{path}:2"


def test_a_command_without_options_says_so(tmp_path: Path) -> None:
    path = tmp_path / "sae.toml"
    path.write_text("[cache.verify]\nfoo = 1\n")
    result = call("config", "show", "train", "--config", path)
    assert result.exit_code == BAD_USAGE and "unknown cache verify option 'foo'; none are available." in result.stderr


OLD_NAMES = [(command, old, new) for command, names in RENAMED.items() for old, new in names.items()]


@pytest.mark.parametrize(("command", "old", "new"), OLD_NAMES)
def test_a_renamed_flag_works_under_its_old_name_with_one_note_and_is_not_listed(
    command: tuple[str, ...], old: str, new: str, tmp_path: Path
) -> None:
    root = get_command(app)
    option = options_of(root.commands[command[0]])[new]
    words = [] if option.is_flag else ["3"]
    by_old, by_new = (call("config", "show", *command, f"--{name}", *words) for name in (old, new))
    assert by_old.stdout == by_new.stdout and by_new.exit_code == 0 and f"{new} = " in by_new.stdout
    assert by_new.stderr == "" and by_old.stderr == f"note     --{old} is now --{new}; the old name still works\n"
    assert f"--{old}" not in call(*command, "--help").stdout and f"--{new}" in call(*command, "--help").stdout

    path = tmp_path / "sae.toml"
    path.write_text(f"[{'.'.join(command)}]\n{old} = {'true' if option.is_flag else 3}\n")
    result = call("config", "show", *command, "--config", path)
    assert result.exit_code == 0 and f"# {path}:2" in result.stdout
    assert result.stderr == f"note     {path}:2: {old} is now {new}; the old name still works\n"


def test_an_old_name_behind_a_double_dash_or_as_a_value_is_not_a_flag(tmp_path: Path) -> None:
    result = call("train", "--", "--literal")
    assert result.exit_code == BAD_USAGE and "is now" not in result.stderr


def lines_of_prefixes(text: str) -> dict[tuple[str, ...], int]:
    """Compute the line of each key by definition: the shortest prefix of the text with the key ends on that line."""
    lines, line_of, start = text.splitlines(keepends=True), dict[tuple[str, ...], int](), 1
    for number in range(1, len(lines) + 1):
        with contextlib.suppress(tomllib.TOMLDecodeError):
            for key, _ in flatten(tomllib.loads("".join(lines[:number])), tables=True):
                line_of.setdefault(key, start)
            start = number + 1
    return line_of


toml_values = st.sampled_from(
    [
        "1", "'#['", '"\\"]"', "[1,\n # ]\n 2]", "'''\n[t]\n'' '''", '"""a\n""\n\\""" """""', "{a = [1], b.c = '}'}",
        "[[1,\n2],\n['''x''']] # [", "1979-05-27", '""""x"""""',
    ]
)  # fmt: skip


@given(st.lists(st.lists(toml_values, max_size=4), max_size=4))
@settings(max_examples=100)
def test_lines_of_keys_are_those_of_the_definition(tables: list[list[str]]) -> None:
    text = ""
    for table, values in enumerate(tables):
        text += "".join(f"k{n}.x = {value}\n" for n, value in enumerate(values)) if table == 0 else ""
        text += f"\n# [a]\n[t{table}.u]\n" + "".join(f'"k {n}" = {value}\n' for n, value in enumerate(values))
    tomllib.loads(text)
    assert line_numbers(text) == lines_of_prefixes(text)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"[train]\nsteps = " + b"[" * 5000, "nested too deeply"),
        (b"[train]\nsteps = " + b"{a=" * 5000, "nested too deeply"),
        (b"[train]\nsteps = " + b"9" * 5000, "not valid TOML"),
        (b"a" + b".a" * 50_000 + b" = 1", "dots"),
        (b"#" * 5_000_000, "too long"),
        (b"".join(b"k%d = 1\n" % n for n in range(20_000)), "more mistakes after these 20"),
        (b"[train]\nset = {" + b", ".join(b"k%d = 1" % n for n in range(15_000)) + b"}\nx = 1\n", "c.toml:3: unknown"),
        (b"[train]\nl0 = [\n" + b"1,\n" * 60_000 + b"]\nx = 1\n", "c.toml:60004: unknown"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_a_config_that_is_out_of_bounds_is_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "c.toml").write_bytes(content)
    result = call("cache", "list", "--config", tmp_path / "c.toml")
    assert result.exit_code == BAD_USAGE and isinstance(result.exception, SystemExit), result.exception
    assert sentence in result.stderr
    assert len(result.stderr) < 10_000


@pytest.mark.parametrize(
    ("command", "option", "value", "expected"),
    [
        ("train", "precision", "half", "float32, tf32 or bfloat16"),
        ("evaluate", "precision", "fp16", "float32, tf32 or bfloat16"),
        ("evaluate", "dtype", "float8", "auto, bfloat16 or float32"),
        ("harvest", "storage-dtype", "int4", "bfloat16 or uint16"),
        ("train", "device", "toaster", "auto, cpu, cuda or cuda:N"),
        ("reproduce", "device", "cuda:first", "auto, cpu, cuda or cuda:N"),
    ],
)
def test_a_value_that_is_none_of_those_there_are_is_refused_with_its_flag_or_line(
    tmp_path: Path, command: str, option: str, value: str, expected: str
) -> None:
    (tmp_path / "c.toml").write_text(f'[{command}]\n{option} = "{value}"\n')
    in_file, by_flag = call(command, "--config", tmp_path / "c.toml"), call(command, f"--{option}", value)
    assert in_file.exit_code == by_flag.exit_code == BAD_USAGE
    said = f"'{value}' is unknown: expected {expected}"
    assert f'c.toml:2: {option} = "{value}": {said}.' in in_file.stderr
    shown = " ".join(by_flag.stderr.replace("│", " ").split())
    assert f"Invalid value for '--{option}': {said}" in shown
