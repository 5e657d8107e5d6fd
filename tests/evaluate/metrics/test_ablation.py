"""SCR and TPP end to end on a tiny model: fields, independence of the SAEs, leaks from padding, and refusals."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae.cache.hooks import Hook
from sae.common.errors import UsageError
from sae.evaluate.context import EvalContext
from sae.evaluate.datasets import labeled
from sae.evaluate.metrics import ablation
from sae.evaluate.metrics.ablation import THRESHOLDS, average_scores, fitting_thresholds
from sae.evaluate.metrics.base import EvalTarget
from sae.evaluate.metrics.scr import Scr
from sae.evaluate.metrics.tpp import Tpp
from sae.evaluate.reference_saes import Identity, Zero
from sae.train.activation_functions import ReLU
from sae.train.sae import SAE

REVIEWS = "canrager/amazon_reviews_mcauley_1and5"
SETS = {"train_set_size": 80, "test_set_size": 100, "context": 32}
SMALL = Scr((REVIEWS,), (2, 20), **SETS)


def write_reviews(data: Path, rows: int = 70) -> None:
    """Write reviews of two categories and two ratings. Each category and each rating has its own words."""
    draw = random.Random(0)
    own = {24: "book page author", 26: "disc song singer", 1.0: "bad poor broken", 5.0: "good great nice"}
    for split in ("train", "test"):
        lines = []
        for category in (24, 26):
            for rating in (1.0, 5.0):
                for _ in range(rows):
                    words = f"{own[category]} {own[rating]} the a of".split()
                    text = " ".join(draw.choices(words, k=draw.randrange(3, 12)))
                    lines.append({"text": text, "category": category, "rating": rating})
        draw.shuffle(lines)
        file = data / REVIEWS / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(map(json.dumps, lines)) + "\n")


@pytest.fixture
def ctx(ctx, tmp_path, monkeypatch) -> EvalContext:
    write_reviews(tmp_path)
    table = labeled.DATASETS[REVIEWS]
    monkeypatch.setitem(labeled.DATASETS, REVIEWS, replace(table, classes=(24, 26), pairs=((24, 26),)))
    return replace(ctx, data=tmp_path)


def random_sae(seed: int, d_sae: int = 60) -> SAE:
    torch.manual_seed(seed)
    sae = SAE(32, d_sae, [ReLU()]).requires_grad_(False)
    sae.b_enc -= 0.5
    return sae


def silent(done, total, note=""):
    pass


def test_the_fields_are_saebench_s_and_no_sae_depends_on_another(ctx, monkeypatch):
    targets = [
        EvalTarget(random_sae(0), Hook(0)),
        EvalTarget(random_sae(1), Hook(1)),
        EvalTarget(random_sae(2), Hook(0)),
        EvalTarget(Identity(), Hook(0)),
    ]
    together = SMALL.measure(ctx, targets, silent)
    for kind in ("dir1", "metric", "dir2"):
        for n in (2, 20):
            assert -5 < together[0].metrics["scr_metrics"][f"scr_{kind}_threshold_{n}"] < 5
    assert len(together[0].metrics["scr_metrics"]) == 6
    (detail,) = map(dict, together[0].details)
    assert detail.pop("dataset_name") == f"{REVIEWS}_scr_Books_CDs_and_Vinyl_results"
    assert detail == together[0].metrics["scr_metrics"]
    assert together[0].n == {"problems": 1, "test_texts": 150}
    for name, (low, high) in together[0].intervals["scr_metrics"].items():
        assert low <= together[0].metrics["scr_metrics"][name] <= high
    monkeypatch.setattr(ctx.model, "capture_hooks", None)  # rows and probes are among the artifacts
    monkeypatch.setattr(ablation, "train_probes", None)
    alone = [SMALL.measure(ctx, [target], silent)[0] for target in reversed(targets)]
    assert alone[::-1] == together


def test_the_input_of_a_block_is_the_output_of_the_one_before_and_a_site_has_its_own_width(ctx):
    torch.manual_seed(0)
    wide = SAE(48, 60, [ReLU()]).requires_grad_(False)
    targets = [(random_sae(0), Hook(0)), (random_sae(0), Hook(1, "resid_pre")), (wide, Hook(1, "mlp_hidden"))]
    output, same, inside = SMALL.measure(ctx, [EvalTarget(*target) for target in targets], silent)
    assert output == same
    assert inside.metrics["scr_metrics"] != output.metrics["scr_metrics"]


def test_what_fires_on_nothing_leaks_and_is_said(ctx):
    loud = random_sae(0)
    loud.b_enc += 1.0
    quiet, leaking = SMALL.measure(ctx, [EvalTarget(random_sae(0), Hook(0)), EvalTarget(loud, Hook(0))], silent)
    assert "without_leak" not in quiet.metrics
    assert leaking.metrics["without_leak"].keys() == leaking.metrics["scr_metrics"].keys()
    assert leaking.metrics["without_leak"] != leaking.metrics["scr_metrics"]
    assert sum("fire on a zero row" in flag for flag in leaking.flags) == 1
    assert not any("fire on a zero row" in flag for flag in quiet.flags)


def test_what_cannot_be_measured_has_a_sentence_in_its_place(ctx):
    class Squares(Zero):
        def decode(self, f):
            return f**2

    few, odd, fine = SMALL.measure(
        ctx,
        [EvalTarget(one, Hook(0)) for one in (random_sae(0, 12), Squares(), Zero())],
        silent,
    )
    assert isinstance(few, UsageError)
    assert "--set scr.thresholds=2." in str(few)
    assert "affine" in str(odd)
    assert set(fine.metrics["scr_metrics"].values()) == {0}
    assert any("Only 0 latents affect one of the probes" in flag for flag in fine.flags)


def test_tpp_draws_the_same_for_every_sae_or_as_saebench_for_each(ctx):
    for rng in ("paired", "saebench"):
        metric = Tpp((REVIEWS,), (2, 20), **SETS, rng=rng)
        first, second, again = metric.measure(
            ctx,
            [EvalTarget(random_sae(seed), Hook(0)) for seed in (0, 2, 0)],
            silent,
        )
        assert first == again
        assert first.metrics != second.metrics
        assert list(first.metrics["tpp_metrics"]) == [
            f"tpp_threshold_{n}_{kind}"
            for n in (2, 20)
            for kind in ("total_metric", "intended_diff_only", "unintended_diff_only")
        ]
        assert first.details[0] == {"dataset_name": f"{REVIEWS}_tpp_results", **first.metrics["tpp_metrics"]}
        assert first.extra[f"{REVIEWS}_tpp_results"].keys() == {"24", "26"}
        for name, (low, high) in first.intervals["tpp_metrics"].items():
            assert low <= first.metrics["tpp_metrics"][name] <= high


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"thresholds": (0, 2)}, "1 latent or more"),
        ({"test_set_size": 3}, "give 4 or more"),
        ({"rng": "mine"}, "rng=mine"),
    ],
)
def test_settings_that_make_no_sense_are_refused(ctx, setting, says):
    with pytest.raises(UsageError, match=says):
        Scr(**setting).measure(ctx, [], silent)


def test_given_thresholds_above_the_width_are_refused_and_default_ones_left_out():
    assert fitting_thresholds((2, 30), 30, "scr") == (2, 30)
    assert fitting_thresholds(THRESHOLDS, 500, "scr") == THRESHOLDS
    assert fitting_thresholds(THRESHOLDS, 20, "scr") == (2, 5, 10, 20)
    with pytest.raises(UsageError, match=r"up to 500 latents, but this SAE has 30.*--set scr\.thresholds=2,5,10,20"):
        fitting_thresholds((2, 5, 10, 20, 50, 500), 30, "scr")
    with pytest.raises(UsageError, match=r"this SAE has 1\..*thresholds=1"):
        fitting_thresholds(THRESHOLDS, 1, "scr")


def test_a_narrow_sae_has_the_scores_that_the_default_leaves_it_and_the_others_theirs(ctx):
    default = Scr(SMALL.datasets, **SETS)
    narrow, wider = default.measure(ctx, [EvalTarget(random_sae(0, n), Hook(0)) for n in (6, 12)], silent)
    (same,) = replace(default, thresholds=(2, 5)).measure(ctx, [EvalTarget(random_sae(0, 6), Hook(0))], silent)
    assert narrow.metrics == same.metrics
    assert "scr_metric_threshold_10" in wider.metrics["scr_metrics"].keys() - narrow.metrics["scr_metrics"].keys()
    assert "No score at 10, 20, 50, 100, 500 latents: this SAE has 6." in narrow.flags
    assert "No score at 20, 50, 100, 500 latents: this SAE has 12." in wider.flags
    assert not any("No score" in flag for flag in same.flags)


def test_a_score_is_averaged_over_the_problems_that_have_it():
    scores = {"a": {"x": torch.tensor([1.0, 3.0])}, "b": {"x": torch.tensor([2.0, 7.0]), "y": torch.tensor([4.0, 5.0])}}
    assert {name: score_R.tolist() for name, score_R in average_scores(scores).items()} == {"x": [1.5, 5], "y": [4, 5]}
