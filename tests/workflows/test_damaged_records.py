"""The records of a finished run: no changed value is read silently, and the remedy in each message repairs the run."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sae.cli.main import app
from sae.common import records
from sae.common.errors import DamagedError, LeftOutWarning, SaeError
from sae.common.evaluation_schemas import RESULT_RECORD
from sae.common.files import read_json
from sae.common.records import UncheckedRecordWarning
from sae.common.schemas import CHECKPOINT_RECORD, RUN_RECORD, SAE_RECORD
from sae.evaluate.compare import compare_runs
from sae.evaluate.metrics.core import Core
from sae.evaluate.plan import EvaluateConfig
from sae.evaluate.results import read_result
from sae.evaluate.run import evaluate
from sae.train.checkpoint import read_checkpoint
from sae.train.formats.export import export_sae
from sae.train.formats.import_ import import_sae
from sae.train.formats.model_card import evaluation_metrics
from sae.train.plan import Run, TrainConfig, plan_training
from sae.train.run import TrainProgress, run_training
from sae.train.run_records import IDENTITY, OPTIONAL
from sae.train.sae import load_sae, read_run_record, read_sae_record

from ..json_trees import leaves, with_leaf
from ..run_records import change_record

BATCHTOPK = "batchtopk"
EVALUATE = ("evaluate", "--suite", "core", "--tokens", "60", "--device", "cpu", "--no-references")


@pytest.fixture(scope="module")
def built(tiny_cache, tmp_path_factory) -> Path:
    """A folder with two finished runs that differ in their seed, evaluated twice, and one that was imported."""
    home = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAE_HOME", str(home))
        plan = plan_training(
            TrainConfig(
                [BATCHTOPK], layers=[0], seeds=[0, 1], caches=[tiny_cache.folder], steps=6, batch_size=64, width="32",
                device="cpu", checkpoint_every=4, options=["k=4"],
            )
        )  # fmt: skip
        run_training(plan, TrainProgress())
        folders = [run.folder for run in plan.runs]
        for tokens in (60, 90):
            evaluate(EvaluateConfig(folders, suite="core", tokens=tokens, device="cpu", references=False))
        exported = export_sae(folders[0], "saelens", home / "exported", cache=tiny_cache.folder)
        import_sae(exported.folder, cache=tiny_cache.folder, name="imported")
    return home / "runs"


@pytest.fixture
def runs(built: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `built`, which a test may damage."""
    monkeypatch.setattr(records, "_warned", False)
    return Path(shutil.copytree(built, home / "runs"))


@pytest.fixture
def run(runs: Path) -> Path:
    return run_of(runs, 0)


def run_of(runs: Path, seed: int) -> Path:
    (folder,) = runs.glob(f"{BATCHTOPK}-*-s{seed}-*")
    return folder


def call(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


READERS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {  # name -> (run, file, function that reads it)
    "run": ("trained", "run.json", lambda folder: plan_training(TrainConfig(resume=[folder]))),
    "sae": ("trained", "sae.json", load_sae),
    "imported run": ("imported", "run.json", read_sae_record),
    "imported sae": ("imported", "sae.json", load_sae),
    "result": ("trained", "evaluations/core.json", lambda folder: compare_runs([folder])),
    "checkpoint": (
        "trained",
        "checkpoints/step-00000006/state.json",
        lambda f: read_checkpoint(f / "checkpoints/step-00000006"),
    ),
}


def altered(value: Any) -> Any:
    """Another value of the same type. For null, a value of another type."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return 2 * value + 1
        case str():
            return value + "x"
        case list():
            return [0]
        case dict():
            return {"x": 0}
    return 0


@pytest.mark.parametrize("name", READERS)
def test_every_changed_value_of_a_record_is_noticed(runs: Path, name: str) -> None:
    kind, file, read = READERS[name]
    folder = run_of(runs, 0) if kind == "trained" else runs / "imported"
    content = read_json(folder / file)
    read(folder)
    for path in leaves(content):
        (folder / file).write_text(json.dumps(with_leaf(content, path, altered)))
        with pytest.raises(DamagedError) as raised:
            read(folder)
        assert str(folder / file) in str(raised.value), path


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "change",
    [
        altered,
        lambda value: None,
        *(pytest.param(one, marks=pytest.mark.slow) for one in (lambda v: [v], lambda v: "\0", lambda v: -1e308)),
    ],
)
def test_a_record_without_a_digest_is_read_or_refused_with_a_sentence(
    runs: Path, name: str, change: Callable[[Any], Any]
) -> None:
    """Records of earlier versions have no digest. A changed value may be read, but all errors are SaeErrors."""
    kind, file, read = READERS[name]
    folder = run_of(runs, 0) if kind == "trained" else runs / "imported"
    content = read_json(folder / file)
    content.get("eval_result_unstructured", content).pop("content_digest")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UncheckedRecordWarning)
        paths = list(leaves(content))
        for path in paths[:: 1 + len(paths) // 80]:  # at most 80 values of a record, evenly spaced
            (folder / file).write_text(json.dumps(with_leaf(content, path, change)))
            try:
                read(folder)
            except SaeError as error:
                assert len(str(error)) > 20, path


@pytest.mark.parametrize(
    ("words", "file"),
    [
        (EVALUATE, "sae.json"),
        (EVALUATE, "run.json"),
        (EVALUATE, "evaluations/core.json"),
        (("compare",), "sae.json"),
        (("compare",), "run.json"),
        (("compare",), "evaluations/core.json"),
        (("export", "--to", "saelens"), "sae.json"),
        (("export", "--to", "saelens"), "run.json"),
        (("train", "--device", "cpu", "--resume"), "sae.json"),
        (("train", "--device", "cpu", "--resume"), "run.json"),
    ],
)  # fmt: skip
def test_every_command_that_reads_a_damaged_record_says_so_with_exit_code_3(
    run: Path, words: tuple[str, ...], file: str
) -> None:
    text = (run / file).read_text()
    assert '"d_in": 32' in text
    (run / file).write_text(text.replace('"d_in": 32', '"d_in": 33', 1))
    outcome = call(*words, run)
    assert outcome.exit_code == DamagedError.exit_code, outcome.output
    assert f"{Path(file).name} does not match its content_digest" in outcome.stderr
    deep = '{"a":' * 50_000 + "1" + "}" * 50_000
    (run / file).write_text(deep)
    outcome = call(*words, run)
    assert outcome.exit_code == DamagedError.exit_code and "nested too deeply" in outcome.stderr


# --- values in two records -------------------------------------------------------------------------------------------


def without_digest(kind: Any, path: Path, change: Callable[[Any], Any]) -> None:
    """Change a record as if an earlier version had written it."""
    content = kind.read(path)
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sae: sae["origin"].update(layer=1), "hook_name is blocks.0.hook_resid_post, but layer and"),
        (lambda sae: sae["origin"].update(layer=1, hook_name="blocks.1.hook_resid_post"), "layer is 1 in sae.json and"),
        (lambda sae: sae["origin"].update(site="mlp_out", hook_name="blocks.0.hook_mlp_out"),
         "site is mlp_out in sae.json and resid_post in run.json"),
        (lambda sae: sae["origin"].update(seed=7), "seed is 7 in sae.json and 0 in run.json"),
        (lambda sae: sae["origin"].update(variant="topk"), "variant is topk in sae.json and batchtopk in run.json"),
        (lambda sae: sae["origin"].update(training_tokens=1), "training_tokens is 1 in sae.json and 384 in run.json"),
        (lambda sae: sae.update(d_in=31), "d_in is 31 in sae.json and 32 in run.json"),
    ],
)  # fmt: skip
def test_an_old_sae_json_is_compared_with_itself_and_with_run_json(run: Path, change: Any, message: str) -> None:
    without_digest(SAE_RECORD, run / "sae.json", change)
    with pytest.raises(DamagedError, match=message):
        load_sae(run)


def test_the_folder_s_name_ends_with_the_digest_of_the_run_s_options(run: Path) -> None:
    recorded = read_run_record(run)
    without_digest(RUN_RECORD, run / "run.json", lambda content: content["options"].update(k=5))
    with pytest.raises(
        DamagedError, match=r"run\.json does not belong to this folder: .*options in run.json is [0-9a-f]{6}"
    ):
        load_sae(run)
    renamed = run.rename(run.with_name("mine"))  # a folder with another name has no digest to compare with
    assert read_run_record(renamed) != recorded
    with pytest.raises(DamagedError, match=r"sae\.json and the run\.json beside it belong to different runs"):
        load_sae(renamed)
    without_digest(SAE_RECORD, renamed / "sae.json", lambda content: content.pop("run"))  # older versions had none
    assert load_sae(renamed).d_sae == 32


@pytest.mark.parametrize("key", [key for key in (*IDENTITY, "cache_folders", "resolved") if key not in OPTIONAL])
def test_a_run_json_without_what_decides_the_run_is_refused(run: Path, key: str) -> None:
    """Even in a folder whose name does not contain the run's settings."""
    renamed = run.rename(run.with_name("mine"))
    without_digest(RUN_RECORD, renamed / "run.json", lambda content: content.pop(key))
    with pytest.raises(DamagedError, match=rf"run\.json (has no '{key}'|is not as it was written)"):
        plan_training(TrainConfig(resume=[renamed]))


def test_the_digest_of_a_run_covers_what_its_record_says_decides_it(run: Path) -> None:
    (planned,) = plan_training(TrainConfig(resume=[run])).runs
    assert isinstance(planned, Run) and set(planned.identity()) <= set(IDENTITY)


def test_files_of_another_run_are_refused(runs: Path, run: Path) -> None:
    other = run_of(runs, 1)
    with pytest.raises(DamagedError, match="is a result of another SAE: its sha256 is"):
        shutil.copy(other / "evaluations" / "core.json", run / "evaluations")
        compare_runs([run])
    with pytest.warns(LeftOutWarning, match=r"core\.json is left out: .*core\.json is a result of another SAE"):
        assert evaluation_metrics(run) == []
    for name in ("sae.json", "sae.safetensors"):
        shutil.copy(other / name, run)
    with pytest.raises(DamagedError, match=r"seed is 1 in sae\.json and 0 in run\.json"):
        load_sae(run)
    shutil.copy(other / "run.json", run)
    with pytest.raises(DamagedError, match=r"run\.json does not belong to this folder"):
        load_sae(run)


def test_a_result_with_other_settings_than_its_name_says_is_refused(run: Path) -> None:
    (path,) = (run / "evaluations" / "earlier").glob("*.json")
    settings = read_json(path)["eval_config"]
    with pytest.raises(DamagedError, match="is a result of another SAE: its d_sae is"):
        read_result(run, Core(), settings, {"d_sae": 1})
    change_record(RESULT_RECORD, path, lambda record: record["eval_config"].update(contexts=1))
    with pytest.raises(DamagedError, match="do not match the digest in its name"):
        read_result(run, Core(), settings)
    shutil.copy(run / "evaluations" / "core.json", run / "evaluations" / "absorption.json")
    with pytest.raises(DamagedError, match=r"absorption\.json is a result of core, not of absorption"):
        compare_runs([run])


def test_a_checkpoint_beyond_the_end_of_the_run_is_skipped(run: Path) -> None:
    """The checkpoint is from a longer run of the same shape; earlier versions did not record the run in it."""
    whole = (run / "sae.safetensors").read_bytes()
    change_record(RUN_RECORD, run / "run.json", {"steps": 5})
    renamed = run.rename(run.with_name("shorter"))
    for state in renamed.glob("checkpoints/*/state.json"):
        without_digest(CHECKPOINT_RECORD, state, lambda content: content.pop("run"))
    (renamed / "sae.json").unlink()
    said: list[str] = []
    run_training(plan_training(TrainConfig(resume=[renamed], device="cpu")), TrainProgress(say=said.append))
    assert any("step-00000006 is for step 6, but the run has 5 steps" in line for line in said), said
    assert any("resumes from step 4" in line for line in said)
    assert (renamed / "sae.safetensors").read_bytes() != whole and load_sae(renamed).origin["training_tokens"] == 320
    assert CHECKPOINT_RECORD.read(renamed / "checkpoints" / "step-00000005" / "state.json")["step"] == 5


# --- remedies ---------------------------------------------------------------------------------------------------------


def test_a_deleted_sae_json_is_written_again_from_the_last_checkpoint(run: Path) -> None:
    before = {name: (run / name).read_bytes() for name in ("sae.json", "sae.safetensors")}
    (run / "sae.json").write_text("{")
    (run / "sae.safetensors").write_bytes(b"")
    with pytest.raises(DamagedError, match="Delete sae.json and give the run folder to `sae train --resume`"):
        plan_training(TrainConfig(resume=[run], device="cpu"))
    (run / "sae.json").unlink()
    run_training(plan_training(TrainConfig(resume=[run], device="cpu")))
    assert {name: (run / name).read_bytes() for name in before} == before


def test_without_run_json_a_finished_sae_is_evaluated_and_an_unfinished_run_keeps_its_checkpoints(
    run: Path, tiny_cache
) -> None:
    (run / "run.json").unlink()
    assert load_sae(run).d_sae == 32 and compare_runs([run]).runs
    (run / "sae.json").unlink()
    again = TrainConfig(
        [BATCHTOPK], layers=[0], caches=[tiny_cache.folder], steps=6, batch_size=64, width="32", device="cpu",
        options=["k=4"], out=run.parent,
    )  # fmt: skip
    checkpoints = sorted((run / "checkpoints").rglob("*"))
    with pytest.raises(DamagedError, match=r"has checkpoints but no run\.json"):
        run_training(plan_training(again))
    assert sorted((run / "checkpoints").rglob("*")) == checkpoints
    shutil.rmtree(run)
    run_training(plan_training(again))
    assert (run / "sae.json").exists()


def test_an_edit_on_purpose_is_read_once_the_digest_is_deleted(run: Path) -> None:
    """For example, a user renames the model of an SAE in an editor."""
    content = read_json(run / "sae.json")
    name = content["origin"]["model"]["name"]
    edited = (run / "sae.json").read_text().replace(f'"name": "{name}"', '"name": "renamed"')
    (run / "sae.json").write_text(edited)
    with pytest.raises(DamagedError, match="delete 'content_digest' from the file; it is then not checked"):
        load_sae(run)
    content = json.loads(edited)
    del content["content_digest"]
    (run / "sae.json").write_text(json.dumps(content))
    with pytest.warns(UncheckedRecordWarning, match=r"sae\.json has no content_digest"):
        assert load_sae(run).origin["model"]["name"] == "renamed"
