"""`sae evaluate --controls`: controls are trained once, kept, resumed, evaluated, and found by `sae compare`."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import sae
from sae.cache.reader import Cache
from sae.cli.main import app
from sae.common import precision
from sae.common.errors import SaeError, UnavailableError, UsageError
from sae.common.files import read_json
from sae.evaluate.compare import compare_runs, comparison_table, share_table
from sae.evaluate.controls import RECIPES, controls_folder
from sae.evaluate.pages.comparison import comparison_page
from sae.train.activation_functions import BatchTopK, TopK
from sae.train.plan import Run, TrainConfig, TrainPlan
from sae.train.recipe import find_recipe
from sae.train.run import TrainProgress, run_training
from sae.workflows.controls import plan_controls, train_controls, training_caches

from ..run_records import write_run_record, write_sae_record

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"steps": 30, "batch_size": 64, "width": "64", "layers": 1}
NAMES = ["frozen-decoder-4", "soft-frozen-decoder-4", "frozen-encoder-4"]


@pytest.fixture(scope="module")
def trained_before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folders of `runs`, once a test has trained them."""
    return tmp_path_factory.mktemp("trained") / "runs"


@pytest.fixture
def runs(tiny_cache: Cache, trained_before: Path, home: Path) -> list[Run]:
    """batchtopk with two seeds, and relu, all trained to the same L0."""
    if trained_before.exists():  # so the commands below find finished runs
        shutil.copytree(trained_before, home / "runs")
    runs = [
        *sae.train_saes("batchtopk", cache=tiny_cache, seeds=[0, 1], l0=4, **SIZES),
        *sae.train_saes("relu", cache=tiny_cache, l0=4, **SIZES),
    ]
    if not trained_before.exists():
        shutil.copytree(home / "runs", trained_before)
    return runs


def invoke(*words: str | Run) -> Result:
    return CliRunner().invoke(app, [*map(os.fspath, words), "--device", "cpu"])


def evaluate(*words: str | Run) -> Result:
    result = invoke("evaluate", "--suite", "core", "--tokens", "300", "--controls", *words)
    assert result.exit_code == 0, result.output
    return result


def trained() -> dict[str, tuple[int, bytes]]:
    """Name of each control -> when its weights were written, and the bytes of the weights."""
    weights = {path.parent.name: path for path in controls_folder().glob("*/sae.safetensors")}
    return {name: (path.stat().st_mtime_ns, path.read_bytes()) for name, path in weights.items()}


def test_controls_are_trained_once_evaluated_and_found_again(runs: list[Run], home: Path) -> None:
    planned = evaluate(*runs, "--dry-run")
    assert "controls 3 to train, based on batchtopk, for 3 runs; kept in " in planned.output
    assert str(controls_folder()) in planned.output
    assert planned.output.count("controls are not based on relu: controls based on batchtopk are used instead") == 1
    assert re.search(r"time +about \d.* of training on cpu", planned.output) and "and 3 controls" in planned.output
    assert not controls_folder().exists()

    first = evaluate(*runs, "--json", "--no-references")
    rows = {row["name"]: row for row in json.loads(first.stdout)}
    assert list(rows) == [*(run.name for run in runs), *NAMES]
    for name in NAMES:
        assert rows[name]["core.sparsity.l0"] == pytest.approx(4, rel=0.1), "equal L0, on held-out text"
    kept = trained()
    assert len(kept) == 3
    again = evaluate(*runs, "--no-references")
    assert trained() == kept and "controls 3 already trained, based on batchtopk, for 3 runs" in again.output
    assert "core: " in again.output and "3 already measured" in again.output
    assert "share of" in again.stdout and "share lines: the share of a run's number above its floor" in again.output

    heads, lines = comparison_table(compare_runs([run.folder for run in runs]))
    labels = [line[0] for line in lines]
    assert set(NAMES) <= set(labels)
    shares = [f"share of {label} that {name} has" for label in ("batchtopk", "relu") for name in sorted(NAMES)]
    assert [label for label in labels if label.startswith("share")] == shares
    ev = next(place for place, head in enumerate(heads) if head.startswith("EV"))
    value = {row[0].removesuffix(" (2 seeds)"): row[ev] for row in lines}
    by_hand = float(value["frozen-decoder-4"].split()[0]) / float(value["batchtopk"].split()[0])
    assert float(value["share of batchtopk that frozen-decoder-4 has"].split("%")[0]) == pytest.approx(
        100 * by_hand, abs=1
    )
    assert "frozen" not in str(comparison_table(compare_runs([run.folder for run in runs], references=False)))


def test_controls_have_the_conditions_of_their_run(runs: list[Run]) -> None:
    controls = train_controls(runs[:1])
    assert [run.recipe.name for run in controls] == list(RECIPES)
    assert plan_controls([runs[0], runs[0]]).count == 1
    for control in controls:
        ours, theirs = read_json(control.folder / "run.json"), read_json(runs[0].folder / "run.json")
        for name in ("layer", "site", "d_in", "d_sae", "steps", "batch_size", "l0", "order_seed", "cache"):
            assert ours[name] == theirs[name], name
        assert ours["seed"] == 0 and ours["options"] == {}
    soft = sae.load_sae(controls[1].folder)
    torch.manual_seed(0)
    start = find_recipe("batchtopk").make(runs[0].config, {}).sae.W_dec
    assert torch.linalg.vecdot(soft.W_dec, start).min() > 0.8 - 1e-6


@pytest.mark.slow
def test_another_width_l0_length_or_cache_has_controls_of_its_own(
    runs: list[Run], tiny_cache: Cache, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "cpu_flags", lambda: {"avx512_bf16"})
    train_controls(runs)
    before = trained()
    other = home / "copied"
    shutil.copytree(tiny_cache.folder, other)
    variations = [
        {"width": "32"}, {"l0": 8}, {"steps": 29}, {"batch_size": 32}, {"layers": 0}, {"shuffle_seed": 1},
        {"precision": "bfloat16"},
    ]  # fmt: skip
    for count, changes in enumerate(variations, 2):
        (run,) = sae.train_saes("batchtopk", cache=tiny_cache, **{"l0": 4, **SIZES, **changes})
        plan = plan_controls([*runs, run])
        assert len(plan.train.unfinished) == 3 and len(plan.runs) == 6, changes
        assert len({*before, *(one.name for one in plan.runs)}) == 6, count
        assert {one.config.precision for one in plan.train.unfinished} == {run.config.precision}
    # The same rows in another folder are the same cache, and controls of a run without --l0 are trained at its k.
    (run,) = sae.train_saes("batchtopk", cache=other, options={"k": 4}, **SIZES)
    assert [one.done for one in plan_controls([run]).runs] == [True] * 3
    assert trained() == before


def test_a_run_of_several_caches_needs_all_of_them(tiny_cache: Cache, home: Path, monkeypatch) -> None:
    places = [str(tiny_cache.folder), str(home / "copied")]
    monkeypatch.setattr("sae.workflows.controls.read_run_record", lambda folder: {"cache_folders": places})
    monkeypatch.setattr("sae.workflows.controls.read_sae_record", lambda folder: {})
    assert training_caches(home) is None
    shutil.copytree(tiny_cache.folder, home / "copied")
    assert training_caches(home) == [tiny_cache.folder, home / "copied"]


@pytest.mark.slow
def test_a_kill_between_goes_on_where_it_was(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first control is done, the second has a checkpoint, the third has nothing."""
    controls = train_controls(runs)
    whole = {run.name: (run.folder / "sae.safetensors").read_bytes() for run in controls}
    done = (controls[0].folder / "sae.safetensors").stat().st_mtime_ns
    for file in ("sae.json", "sae.safetensors"):
        (controls[1].folder / file).unlink()
    shutil.rmtree(controls[2].folder)
    result = evaluate(*runs, "--no-references")
    assert "controls 2 to train and 1 already trained" in result.output
    assert f"{controls[1].name} resumes from step 30" in result.output
    assert f"{controls[2].name} resumes" not in result.output
    assert (controls[0].folder / "sae.safetensors").stat().st_mtime_ns == done
    assert {run.name: (run.folder / "sae.safetensors").read_bytes() for run in controls} == whole


def test_runs_that_cannot_have_controls_are_named_and_evaluated(runs: list[Run], home: Path) -> None:
    imported, streamed, gone = (home / "runs" / name for name in ("imported", "streamed", "gone"))
    for folder in (imported, streamed, gone):
        write_sae_record(folder, origin={"layer": 12, "fingerprint": "f" * 64})
    source = {"format": "saelens", "sha256": {}, "path": "folder"}
    unknown = dict.fromkeys(("seed", "steps", "batch_size", "order_seed", "cache"))
    write_run_record(imported, imported_from=source, **unknown)
    write_run_record(streamed, ring=4, l0=4.0)
    write_run_record(gone, l0=4.0, cache_folders=[str(home / "nowhere")])
    plan = plan_controls([imported, streamed, gone, runs[0]])
    assert plan.count == 1 and [note.split(" gets no controls: ") for note in plan.notes] == [
        ["imported", "it was imported, so the rows and steps of its training are not known."],
        ["streamed", "it was trained with --stream, which deleted its activations."],
        ["gone", "the cache that it was trained on was not found. Move it back, or to activations/."],
    ]
    controls = train_controls(runs)
    assert plan_controls([controls[0], home / "nothing"]).describe() == []
    with pytest.raises(UsageError, match="imported gets no controls: it was imported"):
        train_controls([imported])
    with pytest.raises(UsageError, match="None of these is a finished run"):
        train_controls([home / "nothing"])


def test_a_control_that_was_trained_as_a_run_is_a_control_too(tiny_cache: Cache) -> None:
    runs = sae.train_saes(["topk", "frozen-decoder"], cache=tiny_cache, l0=4, **SIZES)
    sae.evaluate_saes(runs, suite="core", tokens=600, references=False, device="cpu")
    found = compare_runs([run.folder for run in runs])
    labels = [line[0] for line in comparison_table(found)[1]]
    assert labels == ["topk", "frozen-decoder", "share of topk that frozen-decoder has"]
    *_, share = comparison_table(found)[1]
    heads, ((system, control, *cells),) = share_table(found)
    assert heads[:2] == ["system", "control"] and (system, control) == ("topk", "frozen-decoder")
    assert cells and cells == [cell for cell in share[1:] if cell] and not any("↑" in head for head in heads)
    html = comparison_page(found)
    assert "share of topk" not in html and "Shares of controls" in html
    assert f'<th scope="row">topk</th><td class="text">frozen-decoder</td><td>{cells[0]}</td>' in html
    assert "Shares of controls" not in comparison_page(compare_runs([runs[0].folder]))
    assert plan_controls(runs).count == 1


@pytest.mark.slow
def test_a_topk_has_controls_made_of_topk_and_others_stay_at_hand(tiny_cache: Cache) -> None:
    """The table also shows controls of batchtopk, evaluated for another run. It has shares only for the run's own."""
    runs = sae.train_saes(["topk", "batchtopk"], cache=tiny_cache, l0=4, **SIZES)
    plan = plan_controls(runs)
    assert [run.options for run in plan.runs] == [{"base": "topk"}] * 3 + [{}] * 3 and not plan.notes
    assert "controls 6 to train, based on topk and batchtopk, for 2 runs" in plan.describe()[0]
    controls = train_controls(runs[:1]) + train_controls(runs[1:])
    assert all(
        type(run.load().activation[0]) is kind for run, kind in zip(controls, [TopK] * 3 + [BatchTopK] * 3, strict=True)
    )
    sae.evaluate_saes(runs, suite="core", tokens=300, references=False, controls=controls, device="cpu")
    labels = [line[0] for line in comparison_table(compare_runs([runs[0].folder]))[1]]
    own = [f"{name}-topk-4" for name in sorted(RECIPES)]
    assert {*own, *NAMES} < {*labels}
    assert [label for label in labels if label.startswith("share")] == [
        f"share of topk that {name} has" for name in own
    ]


def test_a_control_that_fails_to_train_is_named_and_the_rest_is_evaluated(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(plan: TrainPlan, progress: TrainProgress) -> None:
        one = replace(plan, runs=[run for run in plan.runs if run.recipe.name == "frozen-encoder"])
        run_training(one, progress)
        for run in plan.unfinished:
            run.problem = "the loss or its gradient was not finite at step 3"
        raise SaeError("two of them")

    monkeypatch.setattr("sae.train.run.run_training", diverge)
    words = ["evaluate", "--suite", "core", "--tokens", "300", "--controls", "--no-references", "--json"]
    done = invoke(*words, runs[0])
    assert done.exit_code == 1, done.output
    assert [row["name"] for row in json.loads(done.stdout)] == [runs[0].name, "frozen-encoder-4"]
    failed = [line for line in done.stderr.splitlines() if line.startswith("not run")]
    assert len(failed) == 2 and all("it failed to train, for the reason above" in line for line in failed)
    assert failed[0].startswith("not run  control frozen-decoder-L01") and "soft-frozen-decoder-L01" in failed[1]


def test_controls_that_cannot_be_trained_are_said_in_the_plan(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(config: TrainConfig) -> TrainPlan:
        raise UnavailableError("The disk is full.")

    monkeypatch.setattr("sae.workflows.controls.plan_training", full)
    words = ["evaluate", "--suite", "core", "--tokens", "300", "--controls", "--no-references", runs[0]]
    for more in (["--dry-run"], []):
        done = invoke(*words, *more)
        assert done.exit_code == 1 and "not run  controls: The disk is full." in done.output
        assert "core: 1 to measure" in done.output
    assert (runs[0].folder / "evaluations" / "core.json").exists()
    with pytest.raises(UnavailableError, match="The disk is full"):
        train_controls(runs)
