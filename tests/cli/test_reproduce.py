"""`sae reproduce`: each of its flags is a field of ReproduceConfig."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

from typer.testing import CliRunner

from sae.cli.main import app
from sae.cli.reproduce import show_report
from sae.evaluate.papers.claims import Claim, Paper
from sae.evaluate.papers.parse import load_paper
from sae.evaluate.papers.report import ClaimResult, PaperReport
from sae.workflows.reproduce import ReproduceConfig, Reproduction

PLAN = "sae.workflows.reproduce.plan_reproduction"
FLAGS = {
    "model": ("gpt2", "model", "gpt2"),
    "layer": ("3", "layers", [3]),
    "seed": ("7", "seeds", [7]),
    "reading": ("literal", "reading", "literal"),
    "cache": ("activations/one", "cache", Path("activations/one")),
    "out": ("folder", "out", Path("folder")),
    "device": ("cpu", "device", "cpu"),
    "steps": ("11", "steps", 11),
    "batch-size": ("64", "batch_size", 64),
    "width": ("2x", "width", "2x"),
    "dataset": ("text.jsonl", "dataset", "text.jsonl"),
    "suite": ("core", "suite", "core"),
    "evaluate-tokens": ("2k", "evaluate_tokens", 2000),
}


def test_every_flag_is_a_field_of_the_config_and_the_other_way_round(planned_with: Callable) -> None:
    config, _ = planned_with(PLAN, "reproduce", FLAGS, "000", "003", without=("dry-run",))
    assert config.papers == ["000", "003"]
    assert {field for _, field, _ in FLAGS.values()} == {f.name for f in fields(ReproduceConfig)} - {"papers"}


def test_without_flags_the_config_is_the_default(planned_with: Callable) -> None:
    config, _ = planned_with(PLAN, "reproduce", {}, "all", without=(*FLAGS, "dry-run"))
    assert config == ReproduceConfig(["all"])


def test_the_exit_code_is_that_of_the_evaluations(monkeypatch) -> None:
    plan = SimpleNamespace(describe=lambda time: [])
    monkeypatch.setattr(PLAN, lambda config, say: plan)
    for code in (0, 1, 3):
        made = Reproduction([], code)
        monkeypatch.setattr("sae.workflows.reproduce.run_reproduction", lambda plan, stages, made=made: made)
        assert CliRunner().invoke(app, ["reproduce", "000"]).exit_code == code


def test_the_table_names_the_reading_counts_verdicts_and_says_what_they_mean(capsys) -> None:
    paper: Paper = load_paper("004")
    reading = next(one for one in paper.readings if one.name == "literal")
    claims = [
        Claim("ev", "6", "more", metric="none", system="full", against="baseline", says="more"),
        Claim("ev-change", "6", "5 %", 5.0, "none", "%", "full", "baseline", restates="ev"),
    ]
    notes = {
        "ev": ["`merged` of full stayed 0 until the end", "layer 5 of 19"],
        "ev-change": ["layer 5 of 19", "the same comparison as ev"],  # the cell of its verdict says this too
    }
    rows = [
        ClaimResult(one, "1 and 2", 3, "contradicted", notes[one.id], "-1 (-1.5 to -0.5, 95%)", not one.restates)
        for one in claims
    ]
    show_report(PaperReport(paper, [], rows, False, reading), Path("x.html"))
    table, said = capsys.readouterr()
    assert f"004 {paper.title}, reading literal" in table
    (first, second) = [line.split() for line in table.splitlines() if line.strip().startswith("ev")]
    lines = said.splitlines()
    assert " ".join(first) == "ev full - baseline more 1 and 2 -1 (-1.5 to -0.5, 95%) 3 contradicted"
    assert second[-3:] == ["contradicted", "(with", "ev)"] and second[4:6] == ["5", "%"]
    assert [line for line in lines if line.startswith("note ")] == [
        "note     ev: `merged` of full stayed 0 until the end",
        "note     ev and 1 more: layer 5 of 19",
    ]
    (count,) = [line for line in lines if line.startswith("   1 contradicted: ")]
    assert "opposite to the claimed difference" in count and lines[-1] == "written  x.html"
