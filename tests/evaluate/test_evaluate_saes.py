"""Evaluating SAEs passed as Python objects, without a run folder."""

import pytest
import torch

import sae
from sae.common.errors import UnavailableError, UsageError
from sae.common.locks import no_readers
from sae.evaluate.measure import no_progress_bar
from sae.evaluate.plan import EvaluateConfig
from sae.evaluate.run import evaluate
from sae.train.activation_functions import BatchTopK, ReLU
from sae.train.sae import SAE, save_sae

ASKED = {"suite": "core", "tokens": 60, "device": "cpu"}


class Half:
    """Any object with encode and decode can be evaluated."""

    def encode(self, x):
        return x / 2

    def decode(self, f):
        return f


def trained(seed: int = 0) -> SAE:
    torch.manual_seed(seed)
    return SAE(32, 16, [ReLU()]).eval().requires_grad_(False)


def test_an_object_has_the_numbers_of_its_run_folder_and_nothing_is_written(tiny_cache, home):
    own = trained()
    rows = sae.evaluate_saes({"own": own, "half": Half()}, cache=tiny_cache.folder, layer=1, **ASKED)
    assert [row.name.split("-")[0] for row in rows] == ["own", "half", "identity", "zero", "pca", "random"]
    assert {path.parts[-4] for path in home.rglob("evaluations/*.json")} == {"references"}
    origin = {"model": tiny_cache.identity["model"], "layer": 1, "cache": str(tiny_cache.folder)}
    save_sae(own, home / "run", {**origin, "fingerprint": tiny_cache.fingerprint})
    (run,) = evaluate(EvaluateConfig(runs=[home / "run"], references=False, **ASKED))
    assert run.results == rows[0].results
    (alone,) = sae.evaluate_saes({"half": Half()}, cache=tiny_cache, layer=1, references=False, **ASKED)
    assert alone.results == rows[1].results
    flat = alone.flat()
    assert flat["name"] == "half" and flat["layer"] == 1
    assert 0 < flat["core.reconstruction_quality.fve"] < 1 and flat[
        "core.reconstruction_quality.cossim"
    ] == pytest.approx(1)


def test_run_folders_are_evaluated_as_by_the_command(tiny_cache, home):
    origin = {"model": tiny_cache.identity["model"], "layer": 1, "cache": str(tiny_cache.folder)}
    folders = [home / "one", home / "two"]
    for seed, folder in enumerate(folders):
        save_sae(trained(seed), folder, {**origin, "fingerprint": tiny_cache.fingerprint})
    rows = sae.evaluate_saes([folders[0], str(folders[1])], references=False, **ASKED)
    assert [row.name for row in rows] == ["one", "two"]
    assert all((folder / "evaluations" / "core.json").exists() for folder in folders)
    assert rows[0].results == evaluate(EvaluateConfig(runs=folders[:1], references=False, **ASKED))[0].results
    broken = home / "broken"
    broken.mkdir()
    with pytest.raises(UsageError, match="broken"):  # then none is measured
        sae.evaluate_saes([*folders, broken], references=False, force=True, **ASKED)
    (broken / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="broken has not finished training"):
        sae.evaluate_saes([*folders, broken], references=False, **ASKED)


def test_a_cache_is_kept_from_deletion_while_it_is_read(tiny_cache, home):
    looks = []

    def look(title):
        looks.append(title)
        with pytest.raises(UnavailableError, match=r"is being read by process \d+ on \S+ \(sae evaluate\)"):
            with no_readers(tiny_cache.folder):
                pass
        return no_progress_bar(title)

    sae.evaluate_saes({"half": Half()}, cache=tiny_cache, layer=1, references=False, progress=look, **ASKED)
    with no_readers(tiny_cache.folder):
        assert looks == ["core"]


def test_what_an_object_cannot_have_is_a_sentence_in_its_row(tiny_cache, home):
    rows = sae.evaluate_saes(
        {"half": Half()}, cache=tiny_cache, layer=0, references=False, options=["absorption.words=130"],
        suite="core,absorption", tokens=60, device="cpu",
    )  # fmt: skip
    assert rows[0].results.keys() == {"core"}
    assert "Half has no W_dec" in str(rows[0].errors["absorption"]) or "letters" in str(rows[0].errors["absorption"])


def of_layer_1() -> SAE:
    made = SAE(32, 16).eval()
    made.origin = {"layer": 1}
    return made


@pytest.mark.parametrize(
    ("make", "change", "sentence"),
    [
        (lambda: SAE(48, 16).eval(), {}, "one cannot encode and decode float32 activations of width 32 on cpu: "),
        (lambda: SAE(32, 16, [BatchTopK(4)]).train(), {}, "one is in training mode.*Call .eval()"),
        (
            lambda: type("Flat", (Half,), {"decode": lambda self, f: f.sum(0)})(),
            {},
            r"one turns \(2, 32\) into \(32,\)",
        ),
        (trained, {"layer": 2}, "There is no layer 2"),
        (of_layer_1, {}, "one was trained after layer 1, not after layer 0: pass layer=1"),
        (trained, {"suite": "cor"}, "there is no metric cor; did you mean core"),
        (trained, {"cache": "nowhere"}, "nowhere holds no activation cache"),
        (None, {}, "There are no SAEs to evaluate. Give a mapping of names to SAEs"),
    ],
)
def test_an_object_that_cannot_be_evaluated_is_refused(tiny_cache, make, change, sentence):
    saes = {"one": make()} if make else {}
    with pytest.raises(UsageError, match=sentence):
        sae.evaluate_saes(saes, **{"cache": tiny_cache, "layer": 0, **ASKED, **change})


def test_an_sae_without_a_name_is_refused(tiny_cache):
    with pytest.raises(UsageError, match="mapping of names to SAEs, as in .*, or a list of run folders. Found SAE"):
        sae.evaluate_saes(SAE(32, 16), cache=tiny_cache, layer=0)


def test_objects_need_a_cache_and_a_layer_and_run_folders_no_layer(tiny_cache):
    with pytest.raises(UsageError, match="need cache= and layer="):
        sae.evaluate_saes({"own": trained()})
    with pytest.raises(UsageError, match="omit layer="):
        sae.evaluate_saes(["runs/one"], layer=0)
