"""For every paper in every reading, plans match what the paper prints, and every system trains, resumes and loads."""

import runpy
import tomllib
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sae.cli.main import app
from sae.evaluate.papers.claims import PAPERS
from sae.evaluate.papers.parse import CLAIMS_FOLDER, load_paper
from sae.train.loop import Trainer
from sae.train.parse import parse_options, parse_width
from sae.train.recipe import find_recipe
from sae.train.variant import RunConfig
from sae.workflows.jobs import Job, ReproduceConfig, jobs_of

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "readings.py"))
FILES = {number: tomllib.loads((CLAIMS_FOLDER / f"{number}.toml").read_text(encoding="utf-8")) for number in PAPERS}
PAIRS = [(number, reading["name"]) for number, file in FILES.items() for reading in file["reading"]]
OPTIMIZER = ("lr", "warmup", "decay_start", "weight_decay", "weight_decay_on", "weight_decay_form", "clip",
             "b_dec_init")  # fmt: skip
every_pair = pytest.mark.parametrize(("number", "reading"), PAIRS, ids="-".join)


@pytest.fixture(scope="module")
def random_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SCRIPT["random_cache"](tmp_path_factory.mktemp("activations") / "synthetic").folder


def jobs(number: str, reading: str, model: str = "google/gemma-2-2b", **options) -> list[Job]:
    config = ReproduceConfig([number], model=model, reading=reading, **options)
    return jobs_of(load_paper(number), config, on_paper_model=model == "google/gemma-2-2b")


@pytest.mark.parametrize("number", PAPERS)
def test_a_paper_has_our_reading_and_one_of_its_own(number) -> None:
    names = [reading for one, reading in PAIRS if one == number]
    assert names.count("field") == 1 and len(names) > 1


@pytest.mark.slow
@every_pair
def test_every_system_builds_trains_resumes_and_loads(number, reading, random_cache, tmp_path) -> None:
    """A tiny run of two steps is cut back to the first step. The resumed run has the same weights, bit for bit."""
    paper = load_paper(number)
    one = next(one for one in paper.readings if one.name == reading)
    checked = SCRIPT["check_reading"](paper, one, random_cache, tmp_path)
    assert [one.problem for one in checked if one.passed < len(SCRIPT["HEADS"])] == []
    expected = {(system["id"], recipe) for system in FILES[number]["system"] for recipe in system["recipes"]}
    assert {(one.job.system, one.job.recipe) for one in checked} == expected


def test_the_check_notices_a_run_that_resumes_to_other_weights(random_cache, tmp_path, monkeypatch) -> None:
    """The resumed run is given other weights after its first step, as if it had not restored the checkpoint."""
    taken: list[int] = []

    def forget(trainer, *_: object) -> int:
        taken.append(1)
        with torch.no_grad():
            trainer.variant.sae.b_enc.add_(1.0)
        return 1

    paper = load_paper("003")
    monkeypatch.setattr("sae.train.run.restore_checkpoint", forget)
    monkeypatch.setattr("sae.train.run.set_normalization", lambda *_: None)
    (field,) = [one for one in paper.readings if one.name == "field"]
    checked = SCRIPT["check_reading"](paper, field, random_cache, tmp_path)
    assert taken and {one.passed for one in checked} == {2}
    assert all("has different weights after it is resumed" in one.problem for one in checked)


@every_pair
def test_the_papers_readings_train_under_the_printed_optimizer(number, reading) -> None:
    """The settings of the built variant are those of [ran]. Each override is in the paper's file, with its reason."""
    ran = FILES[number]["ran"]
    own = next(one for one in FILES[number]["reading"] if one["name"] == reading)
    systems = {system["id"]: system for system in FILES[number]["system"]}
    printed = {
        "lr": ran["lr"], "warmup": ran.get("warmup", 0), "decay_start": 1.0, "clip": ran.get("clip"),
        "weight_decay": ran.get("weight_decay", 0.0), "weight_decay_on": ran.get("weight_decay_on", "encoder"),
        "weight_decay_form": ran.get("weight_decay_form", "decoupled"), "b_dec_init": "zero",
    }  # fmt: skip
    for job in jobs(number, reading):
        built = vars(SCRIPT["optimization_of"](job))
        overrides = {**own.get("options", {}), **systems[job.system].get("options", {})}
        if overrides.keys() & set(OPTIMIZER):
            assert own["why"] and (systems[job.system].get("note") or own.get("options", {}).keys() & set(OPTIMIZER))
        if reading == "field":  # ours: the recipes' own, which no paper's schedule changes
            assert {option.split("=")[0] for option in job.options} <= overrides.keys()
            continue
        expected = {name: overrides.get(name, value) for name, value in printed.items()}
        expected = {name: None if value == "none" else value for name, value in expected.items()}
        assert {name: built[name] for name in OPTIMIZER} == expected, (job.system, job.recipe)


@every_pair
def test_run_sizes_are_the_printed_ones_on_every_model_unless_flags_are_given(number, reading) -> None:
    """Paper 003 reports no training steps. For it, and in `field`, the steps are those of [run] or of the reading."""
    file = FILES[number]
    own = next(one for one in file["reading"] if one["name"] == reading)
    steps = own.get("steps", file["run"]["steps"])
    batch = own.get("batch_size", file["run"]["batch_size"])
    if reading != "field":
        assert (steps, batch) == (file["ran"]["steps"] or file["run"]["steps"], file["ran"]["batch_size"])
    assert {(job.steps, job.batch_size) for job in jobs(number, reading)} == {(steps, batch)}
    elsewhere = jobs(number, reading, "gemma-2-mini")
    assert {job.steps for job in elsewhere} == {steps}
    assert {job.batch_size for job in elsewhere} == {own.get("batch_size") if reading == "field" else batch}
    flags = jobs(number, reading, "gemma-2-mini", steps=7, batch_size=9)
    assert {(job.steps, job.batch_size) for job in flags} == {(7, 9)}


# Of 4,882 steps, and of 800 in 000. `field` rises over 488 steps and falls over the last 976.4.
WARM = {0: 3e-7, 499: 1.5e-4, 999: 3e-4, 1000: 3e-4, 2441: 3e-4, 4881: 3e-4}
FLAT = {0: 3e-4, 2441: 3e-4, 4881: 3e-4}
FIELD = {0: 3e-4 / 488, 487: 3e-4, 2441: 3e-4, 3905: 3e-4, 4393: 3e-4 * 489 / 976.4, 4881: 3e-4 / 976.4}


@pytest.mark.parametrize(
    ("number", "reading", "recipe", "rates"),
    [
        ("000", "evidence", "collapse-03", {0: 3e-7, 399: 1.2e-4, 799: 2.4e-4}),
        ("000", "literal", "collapse-01", {0: 3e-7, 399: 1.2e-4, 799: 2.4e-4}),
        ("001", "evidence", "progressive", WARM),
        ("001", "literal", "progressive-baseline", WARM),
        ("001", "field", "progressive", FIELD),
        ("002", "evidence", "competition", FLAT),
        ("002", "literal", "competition-baseline", FLAT),
        ("003", "literal", "decorrelation", WARM),
        ("003", "field", "relu", FIELD),
        ("004", "evidence", "hierarchical", FLAT),
        ("004", "literal", "hierarchical-topk320", FLAT),
    ],
)
def test_the_learning_rate_of_built_runs_is_the_one_worked_by_hand(number, reading, recipe, rates) -> None:
    """Compares the optimizer's rate at the first step, the end of the warm-up, in the middle and at the last step."""
    job = next(job for job in jobs(number, reading) if job.recipe == recipe)
    one = find_recipe(recipe)
    sizes = RunConfig(16, parse_width("64", one, 16), job.steps, job.batch_size, paper_exact=job.paper_exact)
    torch.manual_seed(0)
    trainer = Trainer(one.make(sizes, parse_options(job.options, [one])[recipe]), job.steps, "cpu")
    x_BD = torch.randn(8, 16)
    for step, rate in rates.items():
        trainer.i.fill_(step)
        trainer.step(x_BD)
        assert [float(group["lr"]) for group in trainer.optimizer.param_groups] == pytest.approx(2 * [rate], rel=1e-5)


@pytest.fixture(scope="module")
def mini_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows of gemma-2-mini at every layer that a paper trains."""
    folder = tmp_path_factory.mktemp("mini") / "cache"
    words = ["harvest", "--model", "gemma-2-mini", "--tokens", 4096, "--context", 128, "--window", 4096]
    words += [word for layer in (5, 12, 19) for word in ("--layer", layer)]
    done = CliRunner().invoke(app, [*map(str, words), "--out", str(folder)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return folder


@pytest.mark.slow
@every_pair
@pytest.mark.parametrize("given", [True, False], ids=["cache", "harvest"])
def test_a_dry_run_of_every_pair_ends_well(number, reading, given, mini_cache, home, monkeypatch) -> None:
    """The plans are for gemma-2-mini and the paper's steps. Timing takes seconds per plan and is tested elsewhere."""
    monkeypatch.setattr("sae.workflows.reproduce.describe_time", lambda *_: [])
    words = ["reproduce", number, "--model", "gemma-2-mini", "--reading", reading, "--dry-run"]
    done = CliRunner().invoke(app, [*words, *(["--cache", str(mini_cache)] if given else [])], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    sizes = {f"{job.steps:,}" for job in jobs(number, reading, "gemma-2-mini")}
    assert any(f"{steps} steps each" in done.output for steps in sizes), done.output
