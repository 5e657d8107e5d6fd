"""A paper's systems trained, evaluated and reported through the command line, on the tiny model."""

import re
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from sae.cli.main import app
from sae.common.errors import UsageError
from sae.evaluate.papers.claims import PAPERS
from sae.evaluate.papers.parse import load_paper
from sae.train.plan import TrainPlan
from sae.train.recipe import RECIPES, find_recipe
from sae.train.run import TrainProgress, run_training
from sae.workflows.reproduce import ReproduceConfig, group_by_pass, jobs_of, plan_reproduction, scale_width


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def asked(**options):
    return ReproduceConfig(["000"], device="cpu", **options)


def test_on_the_papers_model_the_papers_sizes_are_run():
    jobs = jobs_of(load_paper("002"), asked(), on_paper_model=True)
    assert {(job.steps, job.batch_size, job.layers, job.seeds) for job in jobs} == {(4882, 2048, (12,), (0, 1, 2))}
    assert {job.width for job in jobs} == {"8x", "1x"}
    elsewhere = jobs_of(
        load_paper("002"), asked(model="gemma-2-mini", width="4x", steps=10, layers=[0]), on_paper_model=False
    )
    assert {(job.steps, job.batch_size, job.dataset) for job in elsewhere} == {(10, None, None)}
    assert {job.system: job.width for job in elsewhere} == {  # the small ones stay an eighth
        **dict.fromkeys(load_paper("002").systems, "4x"), "small": "0.5x", "topk-small": "0.5x",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("own", "main", "asked", "width"),
    [
        ("1x", "8x", None, "1x"),
        ("8x", "8x", "16k", "16k"),
        ("1x", "8x", "16k", "2k"),
        ("1x", "8x", "512", "64"),
        ("", "1x", None, None),
    ],
)
def test_widths_keep_their_proportion(own, main, asked, width):
    assert scale_width(own, main, asked) == width


def test_groups_hold_every_job_once_and_no_recipe_with_two_sets_of_options():
    jobs = [
        job
        for number in PAPERS
        for job in jobs_of(load_paper(number), asked(width="4x", steps=10, layers=[0], seeds=[0]), on_paper_model=False)
    ]
    groups = group_by_pass(jobs)
    assert sorted(map(hash, jobs)) == sorted(hash(job) for group in groups for job in group)
    for group in groups:
        assert len({job.pass_key for job in group}) == 1
        assert len({(job.recipe, job.options) for job in group}) == len({job.recipe for job in group})
    assert len(groups) < 7  # most of five papers in one pass


@pytest.fixture
def cache(tiny_model, sentences, home):
    done = call("harvest", "--model", tiny_model, "--dataset", sentences, "--layer", 1, "--tokens", 3000,
                "--context", 32, "--window", 1024, "--held-out", 0.1)  # fmt: skip
    assert done.exit_code == 0, done.output
    (folder,) = (home / "activations").iterdir()
    return folder


def test_a_reproduction_makes_runs_and_a_page_and_is_not_repeated(cache, tiny_model, home):
    words = ("reproduce", "003", "--model", tiny_model, "--cache", cache, "--layer", 1, "--seed", 0,
             "--seed", 1, "--steps", 20, "--batch-size", 256, "--width", "2x", "--suite", "core",
             "--evaluate-tokens", 100)  # fmt: skip
    done = call(*words)
    assert done.exit_code == 0, done.output
    (folder,) = (home / "reproduce").iterdir()
    runs = sorted(path.name for path in (folder / "runs").iterdir())
    assert [re.sub("-[0-9a-f]{6}$", "", name) for name in runs] == [
        "decorrelation-L01-n64-s0", "decorrelation-L01-n64-s1", "relu-L01-n64-s0", "relu-L01-n64-s1",
    ]  # fmt: skip
    page = (folder / "003.html").read_text()
    assert "Not the paper&#39;s model" in page or "Not the paper's model" in page
    for claim in load_paper("003").claims:
        assert f'id="{claim.id}"' in page
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.s*")}
    assert call(*words).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_resumed_reproduction_keeps_its_options_when_defaults_change(cache, tiny_model, tmp_path, monkeypatch):
    """Its runs end with the weights that they would have had without an interruption and an upgrade in between."""

    def train(folder, checkpoint_every=4, say=lambda sentence: None):
        config = ReproduceConfig(
            ["003"], model=str(tiny_model), cache=cache, layers=[1], seeds=[0], steps=8, width="2x", batch_size=64,
            device="cpu", out=tmp_path / folder,
        )  # fmt: skip
        for plan in plan_reproduction(config).train_plans:
            plan = TrainPlan(replace(plan.config, checkpoint_every=checkpoint_every), plan.runs)
            run_training(plan, TrainProgress(say=say))
        return {run.name: run.folder for run in plan.runs}

    whole, halved, said = train("whole"), train("halved"), []
    for folder in halved.values():
        for name in ("sae.json", "sae.safetensors"):
            (folder / name).unlink()
        shutil.rmtree(folder / "checkpoints" / "step-00000008")
    for name in ("relu", "decorrelation"):
        recipe = find_recipe(name)
        monkeypatch.setitem(RECIPES, name, replace(recipe, options={**recipe.options, "l1": 0.5}))
    assert train("halved", say=said.append).keys() == whole.keys()
    assert len([line for line in said if "l1=0.04 (0.5 in a new run)" in line]) == 2
    for name, folder in halved.items():
        assert (folder / "sae.safetensors").read_bytes() == (whole[name] / "sae.safetensors").read_bytes()


def test_a_dry_run_of_a_reproduction_writes_nothing(tiny_model, sentences, home):
    done = call("reproduce", "003", "--model", tiny_model, "--dataset", sentences, "--layer", 1, "--steps", 5,
                "--batch-size", 64, "--dry-run")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "train    6 SAEs: 2 recipes, 5 steps each\n" in done.output
    heads = [line.split()[0] for line in done.output.splitlines()]
    harvest = ["model", "hook", "text", "bos", "size", "time", "cache"]
    training = ["train", "size", "memory"]
    assert heads == [*harvest, *training, "time", "evaluate"]
    assert not (home / "reproduce").exists() and not (home / "activations").exists()


def test_a_dry_run_counts_existing_runs(tiny_model, sentences, home):
    words = ("reproduce", "003", "--model", tiny_model, "--dataset", sentences, "--layer", 1, "--steps", 5,
             "--batch-size", 64, "--suite", "core", "--evaluate-tokens", 100, "--seed", 0)  # fmt: skip
    assert call(*words).exit_code == 0
    planned = call(*words, "--seed", 1, "--dry-run").output
    assert "train    4 SAEs: 2 recipes, 5 steps each; 2 already done\n" in planned
    assert "in 2 run folders" in planned


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["005"], "no paper 005"),
        (["003", "--reading", "evidence"], "unknown --reading evidence for paper 003: expected one of field"),
        (["003", "--suite", "cor"], "there is no metric cor; did you mean core?"),
    ],
)
def test_invalid_reproductions_are_rejected(words, said):
    done = call("reproduce", *words)
    assert done.exit_code == 2 and said in done.output, done.output


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"steps": 0}, "--steps 0 is not positive"), ({"batch_size": -1}, "--batch-size -1 is not positive"),
        ({"seeds": [0, -1]}, "The seed -1 is out of range"), ({"width": "0"}, "invalid --width 0"),
        ({"width": ""}, "invalid --width "),
    ],
)  # fmt: skip
def test_senseless_numbers_are_refused_before_a_model_is_looked_for(values, said):
    with pytest.raises(UsageError, match=said):
        plan_reproduction(ReproduceConfig(["003"], model="./no-such-model", **values))


def test_a_cache_of_another_model_is_not_read_as_the_papers(cache, tiny_model, home):
    """Its numbers would appear next to the paper's claims as if they came from the paper's model."""
    done = call("reproduce", "003", "--cache", cache, "--layer", 1, "--steps", 5, "--batch-size", 64, "--dry-run")
    assert done.exit_code == 2, done.output
    assert f"holds activations of {tiny_model.name}-" in done.output and "google/gemma-2-2b" in done.output


@pytest.mark.parametrize(
    ("paper", "words", "code", "said"),
    [
        ("003", ["--out", "file"], 2, "file is not a folder: a file is in its place"),
        ("003", [], 4, "runs of up to"),
    ],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_invalid_training_is_rejected_before_the_harvest(
    tiny_model, sentences, home, monkeypatch, paper, words, code, said, dry
):
    (home / "file").touch()
    if code == 4:  # room for the harvest, and not for the runs
        usage = namedtuple("Usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 200_000))
    done = call("reproduce", paper, "--model", tiny_model, "--dataset", sentences, "--layer", 1, "--steps", 5,
                "--batch-size", 64, *words, *dry)  # fmt: skip
    assert done.exit_code == code and said in done.output, done.output
    assert not (home / "reproduce").exists() and not (home / "activations").exists()


def test_the_space_check_of_runs_reserves_room_for_activations(tiny_model, sentences, home, monkeypatch):
    words = ("reproduce", "003", "--model", tiny_model, "--dataset", sentences, "--layer", 1, "--steps", 5,
             "--batch-size", 64, "--dry-run")  # fmt: skip
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 0))
    needed = re.search(r"will need ([\d.]+) MB besides ([\d.]+) MB of activations", call(*words).output)
    runs, activations = (1e6 * float(number) for number in needed.groups())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, int(runs + 1e5)))
    enough = call(*words).exit_code == 0
    assert activations < 1e5 and enough
    monkeypatch.setattr("sae.harvest.plan.HarvestPlan.bytes_to_write", 10**6)
    assert call(*words).exit_code == 4
