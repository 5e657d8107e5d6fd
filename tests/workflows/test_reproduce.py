"""The systems of a paper are trained, evaluated and reported from the command line, on the tiny model."""

import os
import re
import shutil
from collections import namedtuple
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from sae.cli.main import app
from sae.common.errors import UsageError
from sae.common.files import read_json
from sae.evaluate.papers.claims import PAPERS, PaperSystem, Reading
from sae.evaluate.papers.parse import load_paper
from sae.evaluate.papers.report import find_reading
from sae.train.plan import TrainPlan
from sae.train.recipe import RECIPES, find_recipe
from sae.train.run import TrainProgress, run_training
from sae.workflows.jobs import Job, scale_width, set_options
from sae.workflows.reproduce import (
    ReproduceConfig,
    ReproducePlan,
    Stages,
    as_one_plan,
    default_suite,
    describe_notes,
    group_by_pass,
    jobs_of,
    page_name,
    plan_reproduction,
    run_reproduction,
    sources_of,
)


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
    assert {job.system: job.width for job in elsewhere} == {  # the width of the small systems stays an eighth
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
    assert len(groups) < 7  # most jobs of the five papers share a pass


JOB = Job("000", "full", "relu", (), None, 10, 64, "4x", False, (0,), (0,))
MUST_NOT_DIFFER = {
    "dataset": "c4", "steps": 11, "batch_size": 65, "width": "8x", "paper_exact": True, "layers": (1,), "seeds": (1,),
}  # fmt: skip


@pytest.mark.parametrize("name", [field.name for field in fields(Job)])
def test_a_pass_is_shared_by_jobs_that_differ_in_paper_system_recipe_and_options_alone(name: str) -> None:
    may_differ = {"paper": "001", "system": "plain", "recipe": "topk", "options": ("k=4",)}
    other = replace(JOB, **{"recipe": "topk", name: (may_differ | MUST_NOT_DIFFER)[name]})
    assert [len(group) for group in group_by_pass([JOB, other])] == ([2] if name in may_differ else [1, 1])


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


def test_several_processes_are_dealt_the_runs_of_all_papers_together(cache, tiny_model, tmp_path, monkeypatch):
    """Each run is assigned once, even if two groups of jobs need it. Only the first process prints the plan."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sae.train.shares.step_times", lambda runs, device: [1.0] * len(runs))
    config = ReproduceConfig(
        ["003"], model=str(tiny_model), cache=cache, layers=[1], seeds=[0], steps=4, width="2x", batch_size=64,
        device="cpu", out=tmp_path,
    )  # fmt: skip
    plan = plan_reproduction(replace(config, seeds=[0, 1]))
    plans = plan_reproduction(config).train_plans + plan.train_plans
    whole = as_one_plan(plans)
    names = [run.name for one in plans for run in one.runs]
    assert [run.name for run in whole.runs] == list(dict.fromkeys(names)) and (len(names), len(whole.runs)) == (6, 4)
    assert sorted(number for share in whole.shares for number in share.runs) == [0, 1, 2, 3]
    (deal,) = [line for line in plan.describe() if line.startswith("deal")]
    assert deal.startswith(f"deal     {len(whole.runs)} runs to 2 processes")
    assert sum(line.startswith("rank ") for line in plan.describe(time=True)) == 2
    monkeypatch.setenv("RANK", "1")
    assert plan.describe(time=True) == []


@pytest.mark.slow
def test_two_processes_reproduce_a_paper_like_one(cache, tiny_model, tmp_path, launcher):
    """The same SAEs, the same numbers, and one report, from the first process."""
    words = ["reproduce", "003", "--model", tiny_model, "--cache", cache, "--layer", 1, "--seed", 0, "--seed", 1,
             "--steps", 20, "--batch-size", 256, "--width", "2x", "--suite", "core", "--evaluate-tokens", 100,
             "--device", "cpu"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def reproduce(out, *torchrun):
        """Stdout and stderr."""
        command = ["python", *torchrun, "-m", "sae", *map(str, words), "--out", str(tmp_path / out)]
        code, said, told = launcher("forked_ranks.launch", words=command, folder=tmp_path, environment=environment)
        assert code == 0, told
        return said, told

    one = reproduce("one")
    two = reproduce("two", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    folders = {out: sorted((tmp_path / out / "runs").iterdir()) for out in ("one", "two")}
    assert [path.name for path in folders["one"]] == [path.name for path in folders["two"]] and len(folders["two"]) == 4
    for alone, dealt in zip(*folders.values(), strict=True):
        assert (dealt / "sae.safetensors").read_bytes() == (alone / "sae.safetensors").read_bytes()
        assert read_json(dealt / "run.json")["environment"]["variables"]["WORLD_SIZE"] == "2"
        results = [read_json(folder / "evaluations" / "core.json") for folder in (alone, dealt)]
        assert results[0]["eval_result_metrics"] == results[1]["eval_result_metrics"]
    assert (tmp_path / "two" / "003.html").exists()
    verdicts = [[line for line in said.splitlines() if "claim" in line or "ev" in line] for said, _ in (one, two)]
    assert verdicts[0] == verdicts[1]
    assert "rank 1:" not in two[1] and two[1].count("written  ") == 1
    assert two[1].count("deal     4 runs to 2 processes") == 1


def test_a_resumed_reproduction_keeps_its_options_when_defaults_change(cache, tiny_model, tmp_path, monkeypatch):
    """Its runs end with the same weights as without an interruption and an upgrade in between."""

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


@pytest.mark.slow
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
        (["003", "--reading", "evidence"], "unknown --reading 'evidence' for paper 003: expected one of field,"),
        (["003", "004", "--reading", "evidence"], "Run a separate command for each of the papers 003, 004."),
        (["all", "--reading", "lambda_k"], "for paper 000, 001, 002, 003: expected one of evidence, field, lit"),
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


def test_what_a_reading_makes_void_is_in_the_plan_once_for_all_its_recipes():
    def run(recipe, *sentences):
        return SimpleNamespace(notes=[f"{recipe}: {sentence}" for sentence in sentences])

    void, none = "warning, cut=0 as in the paper: void", "--paper-exact changes nothing: the defaults are the paper's"
    runs = [run("a", void), run("a", void), run("b", "k 320 -> 18: at 128", void), run("c", none)]
    assert describe_notes(runs) == [f"note     a and 1 more: {void}", "note     b: k 320 -> 18: at 128"]


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
    if code == 4:  # enough disk space for the harvest, but not for the runs
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


def test_a_system_overrides_its_reading_and_a_reading_what_is_printed():
    """Paper 003 prints lr 0.0003 and 1,000 steps of warm-up. Options that the recipe lacks are left out."""
    paper = load_paper("003")
    reading = Reading("as_printed", "", {"lr": 0.2, "clip": 5.0, "l1_warmup": 9, "merge_above": 0.8})
    system = PaperSystem("full", ("decorrelation",), options={"lr": 0.3, "center": True})
    options = dict(option.split("=") for option in set_options("decorrelation", paper, reading, system))
    expected = {"lr": "0.3", "clip": "5.0", "l1_warmup": "9", "center": "true", "warmup": "1000", "decay_start": "1.0"}
    assert {name: options[name] for name in expected} == expected and "merge_above" not in options
    ours = set_options("decorrelation", paper, replace(reading, name="field", options={}), PaperSystem("full", ()))
    assert ours == ()
    assert set_options("relu", paper, replace(reading, options={}), PaperSystem("off", ()))[-2:] == (
        "clip=none", "b_dec_init=zero",
    )  # fmt: skip


def test_the_first_reading_is_of_the_papers_model_and_field_of_others():
    paper = load_paper("004")
    assert [find_reading(paper, home, None).name for home in (True, False)] == ["evidence", "field"]
    assert find_reading(paper, False, "literal").name == "literal"
    names = [(page_name(paper, one, home), one.name, home) for one in paper.readings[:2] for home in (True, False)]
    assert names == [
        ("004.html", "evidence", True), ("004-evidence.html", "evidence", False),
        ("004-field.html", "field", True), ("004.html", "field", False),
    ]  # fmt: skip
    literal = {job.paper_exact for job in jobs_of(paper, asked(reading="literal"), True)}
    assert literal == {True} and {job.paper_exact for job in jobs_of(paper, asked(), True)} == {False}
    datasets = [{job.dataset for job in jobs_of(paper, asked(), home)} for home in (True, False)]
    assert datasets == [{"Skylion007/openwebtext"}, {None}]
    assert {job.dataset for job in jobs_of(paper, asked(dataset="text"), True)} == {"text"}


def test_the_suite_is_the_full_one_on_the_papers_model():
    paper = load_paper("003")

    def suite(**options):
        return ReproducePlan(asked(**options), [paper], [], {}).suite

    assert (suite(), suite(model="gemma-2-mini"), suite(suite="core")) == ("full", "quick", "core")
    claims_scr = "core,absorption,sparse_probing_stdlib,scr_stdlib"  # scr is not in the suite quick
    assert [default_suite([load_paper(number)]) for number in ("001", "003")] == [claims_scr, "quick"]
    other = replace(paper, setup=replace(paper.setup, reads_as="another/model"))
    assert ReproducePlan(asked(model="another/model"), [other], [], {}).suite == "full"


def test_a_harvest_is_long_enough_for_the_longest_job_and_has_the_layers_of_all(monkeypatch):
    """A job without a batch size has that of its recipe: 2,048 tokens for `relu`."""
    monkeypatch.setattr("sae.workflows.reproduce.plan_harvest", lambda config, say: config)
    (full, off) = jobs_of(load_paper("003"), asked(dataset="a", seeds=[0], model="gemma-2-mini"), False)
    jobs = [
        replace(full, steps=10, batch_size=100, layers=(12,)), replace(off, steps=30, batch_size=50, layers=(5, 12)),
        replace(off, dataset="b", steps=7, batch_size=None, layers=(19,)),
    ]  # fmt: skip
    sources = sources_of(jobs, asked(model="gemma-2-mini"), print)
    assert [(name, one.dataset, one.tokens, one.layers) for name, one in sources.items()] == [
        ("a", "a", 1500, [5, 12]), ("b", "b", 7 * find_recipe("relu").batch_size, [19]),
    ]  # fmt: skip


def test_each_paper_is_evaluated_with_its_own_runs_and_definitions_and_reported_in_its_reading(
    cache, tiny_model, tmp_path, monkeypatch
):
    """Two papers share a pass. The command returns the highest exit code and writes a page for each paper."""

    def cut(number):
        paper = load_paper(number)
        system = {"001": "baseline", "004": "l1"}[number]
        mode = {"001": "2024-12", "004": "0.6.0"}[number]
        systems = {system: paper.systems[system]}
        return replace(paper, mode=mode, systems=systems, claims=(), contradictions=(), unreported=())

    monkeypatch.setattr("sae.workflows.reproduce.load_paper", cut)
    config = ReproduceConfig(
        ["001", "004"], model=str(tiny_model), cache=cache, layers=[1], seeds=[0], reading="literal", steps=2,
        width="2x", batch_size=64, evaluate_tokens=77, device="cpu", out=tmp_path,
    )  # fmt: skip
    evaluations, pages, codes = [], [], [4, 0]

    def evaluate(evaluation):
        evaluations.append(evaluation)
        return codes.pop(0)

    done = run_reproduction(
        plan_reproduction(config),
        Stages(pytest.fail, run_training, evaluate, lambda report, page: pages.append((page.name, report))),
    )
    recipes = [[run.name.split("-L01")[0] for run in evaluation.runs] for evaluation in evaluations]
    assert recipes == [["progressive-baseline"], ["hierarchical-l1"]]
    assert [(one.mode, one.suite, one.tokens, one.device) for one in evaluations] == [
        ("2024-12", "quick", 77, "cpu"),
        ("0.6.0", "quick", 77, "cpu"),
    ]
    assert done.exit_code == 4 and done.reports == [report for _, report in pages]
    assert [(name, report.reading.name) for name, report in pages] == [
        ("001-literal.html", "literal"), ("004-literal.html", "literal"),
    ]  # fmt: skip
    assert [[(run.system, run.recipe) for run in report.runs] for report in done.reports] == [
        [("baseline", "progressive-baseline")], [("l1", "hierarchical-l1")],
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.glob("*.html")) == ["001-literal.html", "004-literal.html"]
