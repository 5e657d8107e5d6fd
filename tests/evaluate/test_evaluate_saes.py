"""SAEs that Python gives, without a run folder."""

import pytest
import torch

import sae
from sae.common.errors import UsageError
from sae.evaluate.plan import EvaluateConfig
from sae.evaluate.run import evaluate
from sae.train.activations import BatchTopK, ReLU
from sae.train.sae import SAE, save_sae

ASKED = {"suite": "core", "tokens": 60, "device": "cpu"}


class Half:
    """Anything with encode and decode will do."""

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


def test_what_an_object_cannot_have_is_a_sentence_in_its_row(tiny_cache, home):
    rows = sae.evaluate_saes(
        {"half": Half()}, cache=tiny_cache, layer=0, references=False, options=["absorption.words=0"],
        suite="core,absorption", tokens=60, device="cpu",
    )  # fmt: skip
    assert rows[0].results.keys() == {"core"}
    assert "Half has no W_dec" in str(rows[0].failed["absorption"]) or "letters" in str(rows[0].failed["absorption"])


def of_layer_1() -> SAE:
    made = SAE(32, 16).eval()
    made.origin = {"layer": 1}
    return made


@pytest.mark.parametrize(
    ("make", "change", "sentence"),
    [
        (lambda: SAE(48, 16).eval(), {}, "one does not encode and decode rows of 32 float32 numbers on cpu: "),
        (lambda: SAE(32, 16, [BatchTopK(4)]).train(), {}, "one is in training mode.*call .eval()"),
        (
            lambda: type("Flat", (Half,), {"decode": lambda self, f: f.sum(0)})(),
            {},
            r"one makes \(32,\) of rows \(2, 32\)",
        ),
        (trained, {"layer": 2}, "there is no layer 2"),
        (of_layer_1, {}, "one was trained after layer 1: give layer=1, and not 0"),
        (trained, {"suite": "cor"}, "there is no metric cor; did you mean core"),
        (trained, {"cache": "nowhere"}, "nowhere holds no activation cache"),
        (None, {}, "Give the SAEs with their names"),
    ],
)
def test_an_object_that_cannot_be_evaluated_is_refused(tiny_cache, make, change, sentence):
    saes = {"one": make()} if make else {}
    with pytest.raises(UsageError, match=sentence):
        sae.evaluate_saes(saes, **{"cache": tiny_cache, "layer": 0, **ASKED, **change})


def test_an_sae_without_a_name_is_refused(tiny_cache):
    with pytest.raises(UsageError, match="with their names, as {'mine': my_sae}, and not SAE"):
        sae.evaluate_saes(SAE(32, 16), cache=tiny_cache, layer=0)
