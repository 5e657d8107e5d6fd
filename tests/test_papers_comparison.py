"""benchmarks/papers: which jobs follow from the design, which records count, which job runs next, and the tables."""

import importlib
import json
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sae.train.parse import parse_options
from sae.train.recipe import find_recipe
from sae.train.variant import RunConfig

FOLDER = Path(__file__).parents[1] / "benchmarks" / "papers"
WIDTHS = {"gemma-2-mini": 128, "smollm2": 576}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scripts():
    """The scripts, which import each other by bare names. Modules with the same names are restored afterwards."""
    names = ("jobs", "records", "split_texts", "work", "run", "tables", "group_topk")
    before, path = {name: sys.modules.pop(name, None) for name in names}, list(sys.path)
    sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path[:] = path
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


@pytest.fixture
def design(scripts):
    return scripts.jobs.load_design()


def small_design(scripts, **fixed):
    """A design with one model, one layer and the block of baselines, in which one system has the rate of another."""
    whole = scripts.jobs.load_design()
    systems = {
        "relu": whole["system"]["relu"],
        "topk": whole["system"]["topk"],
        "no-ema": {
            "block": "baselines", "recipe": "progressive-no-ema", "rate_of": "relu", "same_as": "relu", "ms": [1, 1],
        },
    }  # fmt: skip
    return {
        "revision": 1,
        "fixed": {**whole["fixed"], "seeds": [0, 1, 2], "rates": [1e-3, 2e-3], "blocks": ["baselines"], **fixed},
        "model": {"gemma-2-mini": {**whole["model"]["gemma-2-mini"], "layers": [12]}},
        "system": systems,
        "pair": [
            {"id": "B1", "a": "topk", "b": "relu", "claims": [["ev", "equal"]]},
            {"id": "E", "a": "no-ema", "b": "relu", "only_if_different": True},
        ],
        "margin": whole["margin"],
    }  # fmt: skip


def write(scripts, design, folder, jobs, **values):
    """Write a made-up record for each job that can be resolved. `values`: measure -> a function of the job."""
    for job in jobs:
        _, valid = scripts.records.survey(design, scripts.jobs.make_jobs(design), folder)
        resolved = scripts.jobs.resolve(design, job, valid)
        if isinstance(resolved, str):
            continue
        measures = {"l0": 16.0, "kl": 0.9, "ev": 0.8} | {name: of(resolved) for name, of in values.items()}
        content = {
            "digest": scripts.records.job_digest(design, resolved, valid),
            "metrics": {name: {"value": value} for name, value in measures.items()},
            "weights": "same" if job.seed == 0 and job.system != "topk" else job.id,
            "seconds": {"train": 36.0}, "threads": 1, "caches": {"train": "a text"},
        }  # fmt: skip
        scripts.records.write_record(folder, job, content)


def states(scripts, design, folder):
    known, _ = scripts.records.survey(design, scripts.jobs.make_jobs(design), folder)
    return {one.job.id: one for one in known}


def of_part(scripts, design, part):
    return [job for job in scripts.jobs.make_jobs(design) if job.part == part]


def test_jobs_have_ids_of_their_own_and_pairs_name_systems_of_the_design(scripts, design):
    jobs = scripts.jobs.make_jobs(design)
    assert len({job.id for job in jobs}) == len(jobs)
    for pair in design["pair"]:
        names = design["own"] if pair.get("own") else design["system"]
        assert pair["a"] in names and pair["b"] in names
        for model in pair.get("models", design["model"]):
            if not pair.get("own"):
                assert all(model in names[pair[side]].get("models", [model]) for side in "ab")


def test_seeds_of_a_block_stand_together_and_their_stability_behind_them(scripts, design):
    jobs = [job for job in scripts.jobs.make_jobs(design) if job.part in ("middle", "stability", "also")]
    stretches = [job.stretch for job in jobs]
    runs = [one for place, one in enumerate(stretches) if place == 0 or one != stretches[place - 1]]
    assert len(runs) == len(set(runs))
    for stretch in runs:
        parts = [job.part for job in jobs if job.stretch == stretch]
        assert parts == sorted(parts, key=lambda part: part == "stability")
        seeds = [job.seed for job in jobs if job.stretch == stretch and job.part != "stability"]
        assert seeds == sorted(seeds)


def test_every_block_has_five_seeds_in_at_most_an_hour_and_a_half(scripts, design):
    jobs = [job for job in scripts.jobs.make_jobs(design) if job.part in ("middle", "also")]
    for stretch in {job.stretch for job in jobs}:
        seconds = sum(job.seconds for job in jobs if job.stretch == stretch and not job.same_as)
        assert seconds / scripts.jobs.THREADS_GAIN <= 1.5 * 3600, stretch


def test_every_job_builds(scripts, design):
    """Every job has options that its recipe accepts. For SmolLM2 each recipe is built once."""
    seen = set()
    for job in scripts.jobs.make_jobs(design):
        small = job.model == "gemma-2-mini"
        kind = (job.recipe, job.options, job.paper_exact) if small else (job.recipe,)
        if job.part == "stability" or (job.model, *kind) in seen:
            continue
        seen.add((job.model, *kind))
        d_in = WIDTHS[job.model]
        config = RunConfig(
            d_in, d_in * int(job.width.rstrip("x")), job.steps, job.batch_size, 4.0 if job.l0_of else job.l0,
            job.paper_exact, variance=24.0,
        )  # fmt: skip
        recipe = find_recipe(job.recipe)
        given = parse_options([*job.options, *(["lr=0.001"] if job.rate_of else [])], [recipe])[recipe.name]
        with torch.device("meta"):
            recipe.make(config, given)


def test_a_plain_top_k_within_groups_keeps_as_many_of_each(scripts):
    variant = find_recipe("group-topk").make(RunConfig(8, 64, 10, 32, l0=16.0), {"groups": 8})
    f_BF = variant.sae.encode(torch.randn(32, 8))
    counts = (f_BF > 0).unflatten(1, (8, 8)).sum(2)
    assert counts.max() == 2
    with pytest.raises(Exception, match="multiples of groups=7"):
        find_recipe("group-topk").make(RunConfig(8, 64, 10, 32, l0=16.0), {"groups": 7})


def test_documents_are_on_one_side_each(scripts, design):
    shares = scripts.split_texts.shares_of(design, "smollm2")
    sides = [scripts.split_texts.side(f"a text/{number}", shares) for number in range(20_000)]
    for kind, share in shares.items():
        assert sides.count(kind) / 20_000 == pytest.approx(share, abs=0.006)
    mini = scripts.split_texts.shares_of(design, "gemma-2-mini")
    assert sum(mini.values()) == pytest.approx(1)
    assert {scripts.split_texts.side(str(number), mini) for number in range(100)} == {"tune", "test"}


def test_texts_are_written_once(scripts, tmp_path):
    documents = [(str(number), "text") for number in range(300)]
    paths = scripts.split_texts.write_texts(tmp_path, documents, {"tune": 0.2, "test": 0.3})
    read = {kind: {json.loads(line)["document"] for line in path.open()} for kind, path in paths.items()}
    assert set.union(*read.values()) == {name for name, _ in documents} and sum(map(len, read.values())) == 300
    assert scripts.split_texts.write_texts(tmp_path, [], {"tune": 1, "test": 0}) == paths
    assert sum(len(path.read_text().splitlines()) for path in paths.values()) == 300


def test_main_runs_wait_for_tuning_and_take_the_best_rate_at_the_right_l0(scripts, tmp_path):
    design = small_design(scripts)
    assert {one.state for one in states(scripts, design, tmp_path).values() if one.job.part == "middle"} == {"waiting"}
    write(
        scripts, design, tmp_path, of_part(scripts, design, "tune"),
        kl=lambda job: job.rate, l0=lambda job: 30.0 if job.system == "relu" and job.rate == 2e-3 else 16.0,
    )  # fmt: skip
    found = states(scripts, design, tmp_path)
    rates = {one.job.system: one.job.rate for one in found.values() if one.job.part == "middle" and one.job.seed == 0}
    assert rates == {"relu": 1e-3, "topk": 2e-3, "no-ema": 1e-3}


def test_further_seeds_are_not_needed_where_the_first_changes_nothing(scripts, tmp_path):
    design = small_design(scripts)
    write(scripts, design, tmp_path, of_part(scripts, design, "tune"))
    write(scripts, design, tmp_path, of_part(scripts, design, "middle"))
    found = states(scripts, design, tmp_path)
    assert found["gemma-2-mini/middle/no-ema/L12-s1"].why == "same as relu, bit for bit"
    assert found["gemma-2-mini/stability/no-ema/middle-L12"].state == "not needed"
    path = tmp_path / "gemma-2-mini/middle/no-ema/L12-s0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": "other"}))
    assert states(scripts, design, tmp_path)["gemma-2-mini/middle/no-ema/L12-s1"].state == "open"


def test_the_l0_of_one_system_is_the_target_of_another(scripts, tmp_path):
    design = small_design(scripts)
    design["system"]["beside"] = {"block": "baselines", "recipe": "topk", "rate_of": "topk", "l0_of": "relu", "ms": [1]}
    write(scripts, design, tmp_path, of_part(scripts, design, "tune"))
    jobs = [job for job in of_part(scripts, design, "middle") if job.system == "relu"]
    write(scripts, design, tmp_path, jobs[:-1], l0=lambda job: 15.0 + job.seed)
    assert states(scripts, design, tmp_path)["gemma-2-mini/middle/beside/L12-s0"].state == "waiting"
    write(scripts, design, tmp_path, jobs[-1:], l0=lambda job: 18.2)
    found = states(scripts, design, tmp_path)["gemma-2-mini/middle/beside/L12-s0"]
    assert (found.state, found.job.l0) == ("open", 16.0)


def test_records_of_another_design_or_rate_are_outdated_and_run_again(scripts, tmp_path):
    design = small_design(scripts)
    write(scripts, design, tmp_path, of_part(scripts, design, "tune"))
    write(scripts, design, tmp_path, of_part(scripts, design, "middle"))
    changed = {**design, "revision": 2}
    assert {one.state for one in states(scripts, changed, tmp_path).values()} == {"outdated", "waiting"}
    more = {**design, "fixed": {**design["fixed"], "tuning_tokens": 1}}
    assert states(scripts, more, tmp_path)["gemma-2-mini/tune/relu/L12-lr0.001-s100"].state == "outdated"
    write(scripts, design, tmp_path, of_part(scripts, design, "tune"), kl=lambda job: -job.rate)
    found = states(scripts, design, tmp_path)
    assert found["gemma-2-mini/middle/relu/L12-s0"].state == "outdated"
    assert found["gemma-2-mini/tune/relu/L12-lr0.001-s100"].state == "done"


def test_stability_waits_for_all_seeds_and_is_that_of_these_runs(scripts, tmp_path):
    design = small_design(scripts)
    write(scripts, design, tmp_path, of_part(scripts, design, "tune"))
    runs = [job for job in of_part(scripts, design, "middle") if job.system == "topk"]
    write(scripts, design, tmp_path, runs[:-1])
    place = "gemma-2-mini/stability/topk/middle-L12"
    assert states(scripts, design, tmp_path)[place].why == "waits for its seeds"
    write(scripts, design, tmp_path, runs[-1:])
    (job,) = [job for job in of_part(scripts, design, "stability") if job.system == "topk"]
    assert states(scripts, design, tmp_path)[place].state == "open"
    write(scripts, design, tmp_path, [job])
    assert states(scripts, design, tmp_path)[place].state == "done"
    more = {**design, "fixed": {**design["fixed"], "test_tokens": 1}}
    assert states(scripts, more, tmp_path)[place].state == "waiting"
    write(scripts, more, tmp_path, runs)
    assert states(scripts, more, tmp_path)[place].state == "outdated"


@pytest.mark.parametrize("content", [b"", b'{"digest": "ab', b"[1]", b"{}"])
def test_a_damaged_record_is_no_record(scripts, tmp_path, content):
    design = small_design(scripts)
    job = of_part(scripts, design, "tune")[0]
    path = scripts.records.record_path(tmp_path, job)
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert states(scripts, design, tmp_path)[job.id].state == "open"


def test_units_are_run_that_fit_and_a_stretch_that_was_begun_goes_on(scripts, tmp_path):
    design = small_design(scripts)
    args = Namespace(model=None, part=None, block=None, threads=1)
    write(scripts, design, tmp_path, of_part(scripts, design, "tune"))
    known, _ = scripts.records.survey(design, scripts.jobs.make_jobs(design), tmp_path)
    due = [one for one in known if one.state == "open"]
    whole = sum(one.job.seconds for one in due)
    unit = scripts.run.next_unit(known, whole, set(), args, 1.0)
    assert {one.job.id for one in unit} == {f"gemma-2-mini/middle/{name}/L12-s0" for name in design["system"]}
    assert scripts.run.next_unit(known, whole - 1, set(), args, 1.0) == []
    assert scripts.run.next_unit(known, whole, set(), args, 1.0, {"gemma-2-mini": 1.0}) == []
    assert scripts.run.next_unit(known, whole - 1, {unit[0].job.stretch}, args, 1.0) == unit
    write(scripts, design, tmp_path, [one.job for one in unit])
    known, _ = scripts.records.survey(design, scripts.jobs.make_jobs(design), tmp_path)
    assert {one.job.seed for one in scripts.run.next_unit(known, whole, set(), args, 1.0)} == {1}


def test_the_list_says_what_is_left(scripts, tmp_path):
    design = small_design(scripts)
    args = Namespace(model=None, part=None, block=None, threads=1)
    write(scripts, design, tmp_path, of_part(scripts, design, "tune"))
    known, valid = scripts.records.survey(design, scripts.jobs.make_jobs(design), tmp_path)
    lines = scripts.run.describe(known, valid, args)
    (tuned,) = [line for line in lines if line.startswith("gemma-2-mini tune baselines")]
    assert tuned.split()[3:] == ["4", "0.00"]
    assert any(line.startswith("0.04 h used by 4 records") for line in lines)


def test_estimates_follow_what_the_finished_jobs_took(scripts, tmp_path):
    design = small_design(scripts)
    jobs = of_part(scripts, design, "tune")
    assert scripts.run.pace_of(jobs, {}) == 1
    write(scripts, design, tmp_path, jobs)
    known, valid = scripts.records.survey(design, jobs, tmp_path)
    estimated = sum(job.seconds for job in jobs)
    assert scripts.run.pace_of(jobs, valid) == pytest.approx(36 * len(jobs) / estimated)
    two = {one: record | {"threads": 2} for one, record in valid.items()}
    assert scripts.run.pace_of(jobs, two) == pytest.approx(1.8 * 36 * len(jobs) / estimated)
    assert scripts.run.wall_seconds(known, 2, 1.0) == pytest.approx(estimated / 1.8)


def test_only_the_records_are_committed(scripts, tmp_path, monkeypatch):
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "a name")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@b")
    git = lambda *words: subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True, text=True)  # noqa: E731
    git("init", "-q")
    (tmp_path / "other").write_text("staged by someone else")
    git("add", "other")
    (job, *_) = of_part(scripts, small_design(scripts), "tune")
    path = scripts.records.write_record(tmp_path / "records", job, {"digest": "1"})
    scripts.run.commit_records([path], job)
    assert git("show", "--name-only", "--format=%s").stdout.splitlines()[2:] == [f"records/{job.id}.json"]
    assert git("status", "--porcelain").stdout == "A  other\n"


# --- tables -----------------------------------------------------------------------------------------------------------


NOISE = (0.001, -0.001, 0.0)


def table(scripts, design, folder, family="K"):
    known, valid = scripts.records.survey(design, scripts.jobs.make_jobs(design), folder)
    lines = scripts.tables.families(design, known, valid, "gemma-2-mini")[family]
    return scripts.tables.family_table(lines)


@pytest.mark.parametrize(
    ("more", "noise", "word"),
    [
        (0.2, 0.001, "better (higher)"), (-0.2, 0.001, "worse (lower)"), (0.0, 0.0001, "equivalent within ±0.005"),
        (0.004, 0.01, "not distinguishable"), (0.0, 0.0, "same in every pair"),
    ],
)  # fmt: skip
def test_tables_say_what_the_differences_show(scripts, tmp_path, more, noise, word):
    design = small_design(scripts)
    write(scripts, design, tmp_path, of_part(scripts, design, "tune"))
    kl = lambda job: 0.5 + (job.system == "topk") * (more + noise * NOISE[job.seed] * 1000)  # noqa: E731
    write(scripts, design, tmp_path, of_part(scripts, design, "middle"), kl=kl)
    row = next(line for line in table(scripts, design, tmp_path) if line.startswith("| B1"))
    assert row.rstrip(" |").endswith(word)


def test_a_layer_counts_when_all_its_seeds_are_finished(scripts, tmp_path):
    design = small_design(scripts)
    design["model"]["gemma-2-mini"]["layers"] = [5, 12]
    write(scripts, design, tmp_path, of_part(scripts, design, "tune"))
    gain = lambda job: 0.5 + (job.system == "topk") * ({5: 0.1, 12: 0.2}[job.layer] + NOISE[job.seed])  # noqa: E731
    runs = of_part(scripts, design, "middle")
    write(scripts, design, tmp_path, [job for job in runs if (job.layer, job.seed) != (5, 2)], kl=gain)
    lines = table(scripts, design, tmp_path)
    cells = lines[2].split(" | ")
    assert cells[5] == "+0.2000" and "better (higher); preliminary, without layer 5" in cells[-1]
    assert "corrected for 1 " in lines[0]  # the design's other pair does not count: its mechanism is idle
    write(scripts, design, tmp_path, runs, kl=gain)
    cells = table(scripts, design, tmp_path)[2].split(" | ")
    assert cells[5] == "+0.1500" and "preliminary" not in cells[-1]


def test_tables_name_idle_mechanisms_unlike_l0_and_failed_runs(scripts, tmp_path):
    design = small_design(scripts)
    write(scripts, design, tmp_path, of_part(scripts, design, "tune"))
    write(
        scripts, design, tmp_path, of_part(scripts, design, "middle"),
        l0=lambda job: 20.0 if job.system == "topk" else 16.0,
    )  # fmt: skip
    rows = table(scripts, design, tmp_path)
    assert rows[2].endswith("not comparable: L0 |") and rows[3].endswith("mechanism inactive |")
    assert "corrected for 1 " in rows[0]  # a pair that is not comparable stays in the family, an inactive one does not
    path = tmp_path / "gemma-2-mini/middle/topk/L12-s1.json"
    write(scripts, design, tmp_path, of_part(scripts, design, "middle"))
    record = json.loads(path.read_text())
    path.write_text(json.dumps({key: record[key] for key in ("digest", "seconds")} | {"failed": "not finite"}))
    assert table(scripts, design, tmp_path)[2].endswith("not comparable: 1 failed |")


def test_a_claim_of_equality_is_confirmed_by_equivalence_alone(scripts, tmp_path):
    design = small_design(scripts)
    write(scripts, design, tmp_path, of_part(scripts, design, "tune"))
    ev = lambda job: 0.5 + (job.system == "topk") * 0.0001 * NOISE[job.seed] * 1000  # noqa: E731
    write(scripts, design, tmp_path, of_part(scripts, design, "middle"), ev=ev)
    assert table(scripts, design, tmp_path, "C")[2].endswith("equivalent within ±0.01; as claimed |")


def test_the_page_is_made_of_records_and_warns_of_two_texts(scripts, tmp_path):
    design = small_design(scripts)
    write(scripts, design, tmp_path, of_part(scripts, design, "tune"))
    write(scripts, design, tmp_path, of_part(scripts, design, "middle"))
    jobs = scripts.jobs.make_jobs(design)
    text = "\n".join(scripts.tables.page(design, *scripts.records.survey(design, jobs, tmp_path)))
    assert "| topk | 12 | 3 | 16.0 ±0.0000 | 0.9000 ±0.0000 |" in text and "several training texts" not in text
    path = tmp_path / "gemma-2-mini/middle/topk/L12-s1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"caches": {"train": "another"}}))
    text = "\n".join(scripts.tables.page(design, *scripts.records.survey(design, jobs, tmp_path)))
    assert "several training texts" in text


# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_jobs_are_trained_evaluated_and_never_done_again(scripts, tmp_path, monkeypatch):
    design = small_design(
        scripts, seeds=[0], rates=[1e-3], steps=8, tune_steps=4, batch_size=256, tokens=16_384, window=8192,
        test_tokens=256, tuning_tokens=256, absorption_words=60,
    )  # fmt: skip
    design["system"] = {"topk": design["system"]["topk"]}
    design["model"]["gemma-2-mini"]["main_layer"] = 5
    design["model"]["gemma-2-mini"]["layers"] = [5]
    monkeypatch.setenv("SAE_HOME", str(tmp_path / "home"))
    maker = scripts.jobs.Maker.job
    monkeypatch.setattr(scripts.jobs.Maker, "job", lambda *args, **more: replace(maker(*args, **more), probes=False))
    args = Namespace(
        model=None, part=None, block=None, threads=1, hours=None, commit=False, home=tmp_path / "home",
        records=tmp_path / "records",
    )  # fmt: skip
    said: list[str] = []
    say = lambda sentence, **more: said.append(sentence)  # noqa: E731
    assert scripts.run.run(args, design, say) == 2
    assert scripts.run.run(args, design, say) == 0
    records = {path.relative_to(args.records).as_posix(): path for path in args.records.rglob("*.json")}
    assert set(records) == {
        "gemma-2-mini/tune/topk/L5-lr0.001-s100.json", "gemma-2-mini/middle/topk/L5-s0.json",
    }  # fmt: skip
    record = json.loads(records["gemma-2-mini/middle/topk/L5-s0.json"].read_text())
    assert record["metrics"]["l0"]["value"] == pytest.approx(16, abs=0.5) and record["job"]["rate"] == 1e-3
    assert sum(record["units"]["kl"].values()) / len(record["units"]["kl"]) == pytest.approx(
        record["metrics"]["kl"]["value"], abs=1e-4
    )
    assert record["units"]["absorption"] and set(record["seconds"]) == {"train", "core", "absorption"}
    assert all(path.stat().st_size < 20_000 for path in records.values())


PLAN = """
import gemma_2_2b
with gemma_2_2b.config_alone():
    for reading in gemma_2_2b.READINGS:
        rows, totals = gemma_2_2b.rows_of(reading, lambda run: 1000.0)
        print(totals["tokens"], *(row.split(" | ")[1] for row in rows), round(totals["training"]))
"""


@pytest.mark.slow
def test_all_papers_are_planned_on_gemma_2_2b_from_its_config_alone(tmp_path: Path) -> None:
    """Both readings have 108 runs of 800 steps and 99 of 4,882. At one second a step, the estimate is their sum."""
    done = subprocess.run([sys.executable, "-c", PLAN], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    steps = 108 * 800 + 99 * 4882
    assert done.stdout.splitlines()[-2:] == [f"9998336 108 18 39 18 24 {steps}"] * 2
