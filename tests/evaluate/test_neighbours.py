"""The runs in the same folder as a run: which are other seeds of it, which were measured with the same settings.

Also the command that trains more seeds.
"""

from pathlib import Path

import pytest

from sae.common.errors import LeftOutWarning
from sae.common.evaluation_schemas import RESULT_RECORD
from sae.common.schemas import RUN_RECORD
from sae.evaluate.answers import FRONTIER
from sae.evaluate.compared_runs import read_run
from sae.evaluate.neighbours import find_neighbours, measured_alike, more_seeds_command

from ..run_records import change_record
from .test_answers import answers_of, make_run


@pytest.fixture
def runs(home):
    return home / "runs"


def test_core_measured_otherwise_is_not_alike(runs):
    one, same, other = (read_run(make_run(runs / name, contexts=n)) for name, n in (("a", 40), ("b", 40), ("c", 41)))
    assert measured_alike(one, same) and not measured_alike(one, other)


@pytest.mark.filterwarnings("error")
def test_a_folder_without_an_sae_and_a_run_elsewhere_are_not_beside_it(runs):
    run = make_run(runs / "one")
    (runs / "notes").mkdir()
    make_run(runs / "layer", l0=1.0, variant="relu", model={"name": "another", "revision": "0"})
    near = find_neighbours(read_run(run))
    assert near.others == near.seeds == near.unmeasured == []


def test_runs_without_core_or_without_a_seed_are_not_measured_seeds(runs):
    run, other = make_run(runs / "one"), make_run(runs / "two", seed=1)
    for folder in (run, other):
        (folder / "evaluations" / "core.json").unlink()
    near = find_neighbours(read_run(run))
    assert (near.seeds, near.unmeasured, near.references) == ([], [other], [])
    for folder in (run, other):
        (folder / "run.json").unlink()
    near = find_neighbours(read_run(run))
    assert near.seeds == near.unmeasured == near.others == []


def test_limits_of_two_caches_do_not_tell_results_apart(runs):
    runs = [make_run(runs / name, variant=name) for name in ("a", "b")]
    for run, limit in zip(runs, (10.0, 10.5), strict=True):
        change_record(
            RESULT_RECORD, run / "evaluations" / "core.json", lambda r, n=limit: r["eval_config"].update(norm_limit=n)
        )
    assert measured_alike(*map(read_run, runs))


def test_a_damaged_run_beside_it_is_named_and_left_out(runs):
    run, broken = make_run(runs / "one"), make_run(runs / "two", variant="relu", l0=3.0)
    (broken / "evaluations" / "core.json").write_text("{")
    with pytest.warns(LeftOutWarning, match="two"):
        assert find_neighbours(read_run(run)).others == []


def test_the_command_for_more_seeds_holds_all_that_decides_a_run(runs):
    record = {
        "variant": "topk", "seed": 1, "options": {"k": 7, "aux_k": None, "center": True},
        "asked_l0": 32.0, "literal": True, "order_seed": 5, "site": "mlp_out", "cache_folders": ["a b"],
    }  # fmt: skip
    run = make_run(runs / "one", **record)
    command = more_seeds_command(read_run(run))
    assert "--seed 0 --seed 2" in command and "--set k=7" in command and "--set aux_k=none" in command
    assert "--set center=true" in command and "--layer 12 --site mlp_out" in command and "--cache 'a b'" in command
    assert "--l0 32 " in command and "--paper-exact" in command and "--shuffle-seed 5" in command
    assert "--width 512 --steps 10 --batch-size 100 " in command and command.endswith(f"--out {run.parent}")
    assert "--compile" not in command and "--precision" not in command
    change_record(RUN_RECORD, run / "run.json", {"seed": 7, "compiled": True})
    again = more_seeds_command(read_run(run))
    assert "--seed 0 --seed 1 --width" in again and "--compile --cache" in again
    for changes in ({"ring": 4}, {"cache_folders": ["a", "b"]}, {"asked": {"modules": ["mine"]}}):
        original = RUN_RECORD.read(run / "run.json")
        change_record(RUN_RECORD, run / "run.json", changes)
        assert more_seeds_command(read_run(run)) == "", changes
        RUN_RECORD.write(run / "run.json", original)


def test_more_seeds_of_a_run_of_an_earlier_version_compare_its_pairs(runs):
    """The defaults of `decorrelation` and `competition` now compare fewer pairs; other recipes have no such option."""
    for variant, resolved, expected in (
        ("decorrelation", {"tau_over": "all"}, "--set pair_choice=exact "),
        ("decorrelation", {"pair_choice": "blocks", "block": 256}, ""),
        ("competition", {"pair_store": "table", "pairs": 16}, "--set turns=1 "),
        ("competition", {"pair_store": "table", "pairs": 16, "turns": 8}, ""),
        ("topk", {"k": 7}, ""),
    ):
        run = make_run(runs / f"{variant}{len(resolved)}", variant=variant, seed=0, options={}, resolved=resolved)
        command = more_seeds_command(read_run(run))
        assert command and (expected in command if expected else "--set" not in command), (variant, resolved)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"precision": "bfloat16"}, "bfloat16"), ({"device": "cuda", "precision": "tf32"}, "tf32"),
     ({"device": "cuda", "asked": {"precision": "float32"}}, "float32"), ({"device": "cuda:1"}, "bfloat16")],
)  # fmt: skip
def test_more_seeds_have_the_precision_of_the_run_whatever_the_default(runs, changes, expected):
    """The default on a GPU is bfloat16, also in earlier versions. For float32, run.json records no `precision`."""
    run = make_run(runs / "one", variant="topk", seed=0, options={"k": 7}, **changes)
    assert f" --precision {expected} --cache" in more_seeds_command(read_run(run))


def test_answers_are_the_same_from_any_folder(runs, monkeypatch):
    run = make_run(runs / "one")
    make_run(runs / "other", l0=20.0, kl=0.5, variant="relu")
    whole = answers_of(run)[FRONTIER].verdict
    monkeypatch.chdir(run)
    assert answers_of(Path("."))[FRONTIER].verdict == whole
    (run / "run.json").unlink()  # an imported SAE is not its own neighbour either
    assert [one.name for one in find_neighbours(read_run(Path("."))).others] == ["other"]
