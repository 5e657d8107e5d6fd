"""SCR and TPP against their definitions: scores worked by hand, planted latents, and a whole measurement on a tiny model."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae.cache.contexts import Contexts
from sae.common.errors import UsageError
from sae.evaluate.artifacts import ArtifactCache
from sae.evaluate.context import EvalContext
from sae.evaluate.datasets import labelled
from sae.evaluate.metrics import ablation
from sae.evaluate.metrics.ablation import AblationProblem
from sae.evaluate.metrics.base import EvalTarget
from sae.evaluate.metrics.batched_probes import LinearProbes
from sae.evaluate.metrics.bootstrap import BootstrapWeights
from sae.evaluate.metrics.pooled_activations import PooledLatents
from sae.evaluate.metrics.probe_readout import ProbeReadout, mean_latent_differences
from sae.evaluate.metrics.probes import ProbeTask
from sae.evaluate.metrics.scr import ATTRIBUTE, BIASED, CLASS, PROBES, Scr, pair_flags, quadrant_task, scr_scores
from sae.evaluate.metrics.tpp import Tpp, class_scores
from sae.evaluate.reference_saes import Identity, Zero
from sae.harvest.model import find_model, load_model, load_tokenizer
from sae.train.activations import ReLU
from sae.train.sae import SAE

REVIEWS = "canrager/amazon_reviews_mcauley_1and5"


def one(accuracy: float) -> torch.Tensor:
    return torch.tensor([accuracy], dtype=torch.float64)


def scores_of(first: float, second: float, clean: float, after: float, mode: str = "0.6.0") -> dict[str, float]:
    """`first` and `second` are the biased probe's accuracy on the class and on the attribute; `after` what it gains."""
    found = scr_scores(
        {CLASS: one(first), ATTRIBUTE: one(second)},
        {CLASS: one(clean), ATTRIBUTE: one(clean)},
        {CLASS: {10: one(first + after)}, ATTRIBUTE: {10: one(second + after)}},
        mode,
    )
    return {name.replace("_threshold_10", ""): float(score) for name, score in found.items()}


def test_a_score_is_the_share_of_the_lacking_accuracy_that_comes_back():
    found = scores_of(0.6, 0.7, 0.9, 0.05)
    assert found == pytest.approx({"scr_dir1": 1 / 6, "scr_dir2": 1 / 4, "scr_metric": 1 / 6})
    found = scores_of(
        0.7, 0.6, 0.9, 0.3
    )  # the attribute is the harder: the second direction counts; too much is allowed
    assert found == pytest.approx({"scr_dir1": 1.5, "scr_dir2": 1.0, "scr_metric": 1.0})
    assert scores_of(0.6, 0.7, 0.9, -0.1)["scr_metric"] == pytest.approx(-1 / 3)


def test_a_pair_without_a_harder_task_has_no_metric():
    assert scores_of(0.65, 0.65, 0.9, 0.05).keys() == {"scr_dir1", "scr_dir2"}


@pytest.mark.parametrize("lead", [-0.05, 0.0005])
def test_without_room_to_improve_a_score_is_0_and_was_a_quotient(lead):
    assert scores_of(0.7, 0.75, 0.7 + lead, 0.05)["scr_metric"] == 0
    assert scores_of(0.7, 0.75, 0.7 + lead, 0.05, "2024-12")["scr_metric"] == pytest.approx(0.05 / lead)


def test_what_is_0_by_0_is_absent_from_the_old_mode():
    assert scores_of(0.7, 0.75, 0.7, 0.0, "2024-12").keys() == {"scr_dir2"}
    assert scores_of(0.7, 0.75, 0.7, 0.0)["scr_metric"] == 0


def test_tasks_are_the_quadrants():
    quadrants = {"PP": range(4), "NN": range(4, 8), "NP": range(8, 10), "PN": range(10, 12)}
    expected = {
        ATTRIBUTE: ([0, 1, *quadrants["PN"]], [*quadrants["NP"], 4, 5]),
        CLASS: ([0, 1, *quadrants["NP"]], [*quadrants["PN"], 4, 5]),
        BIASED: (list(quadrants["PP"]), list(quadrants["NN"])),
    }
    for probe, (positive, negative) in expected.items():
        found = quadrant_task(2, probe)
        assert sorted(found.rows[found.label == 1].tolist()) == sorted(positive)
        assert sorted(found.rows[found.label == 0].tolist()) == sorted(negative)


def planted(size: int = 50) -> tuple[ProbeReadout, torch.Tensor, AblationProblem]:
    """Texts that are their class and their attribute, plainly; latents 0 and 1 are these, the others say nothing."""
    signs = {"PP": (1, 1), "NN": (-1, -1), "NP": (1, -1), "PN": (-1, 1)}
    counts = {"PP": 2 * size, "NN": 2 * size, "NP": size, "PN": size}
    both_N2 = torch.tensor([signs[name] for name, count in counts.items() for _ in range(count)], dtype=torch.float32)
    probes = LinearProbes(
        torch.tensor([[0.0, 1], [1, 0], [1, 3]]), torch.zeros(3)
    )  # the biased one reads the attribute more
    noise_NF = torch.rand(len(both_N2), 3, generator=torch.Generator().manual_seed(0))
    x_ND = torch.cat([both_N2, torch.zeros(len(both_N2), 1)], 1)
    W_dec_FD = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1], [0, 0, 1]])
    probes = LinearProbes(torch.cat([probes.weight_PD, torch.zeros(3, 1)], 1), probes.bias_P)
    pooled = PooledLatents(torch.cat([both_N2, noise_NF], 1), torch.ones(len(both_N2)), torch.zeros(5))
    problem = AblationProblem("planted", {"test": {name: [""] * count for name, count in counts.items()}}, PROBES,
                      lambda split, probe, _: quadrant_task(size, probe))  # fmt: skip
    difference_PF = mean_latent_differences(pooled, [quadrant_task(size, probe) for probe in range(3)])
    return ProbeReadout.of(probes, x_ND, pooled, W_dec_FD, 1), difference_PF, problem


def test_ablating_the_attribute_s_own_latent_frees_the_probe_of_it():
    readout, difference_PF, problem = planted()
    metric = Scr(thresholds=(1, 2))
    effect_PF = metric.effects(difference_PF, readout.align_FP)
    torch.testing.assert_close(effect_PF[:2], torch.tensor([[0.0, 2, 0, 0, 0], [2, 0, 0, 0, 0]]))
    found = metric.scores(
        problem,
        readout,
        effect_PF,
        problem.fixed("test").__getitem__,
        BootstrapWeights.of([100, 100, 50, 50], replicates=20),
        "0.6.0",
    )
    # Of class and attribute at odds, the biased probe gets the class wrong: half of the texts.
    assert found.extra == {
        "class": {"own_probe": 1.0, "biased_probe": 0.5},
        "attribute": {"own_probe": 1.0, "biased_probe": 1.0},
    }
    scores = {name: float(score_R[0]) for name, score_R in found.values.items()}
    assert scores["scr_dir1_threshold_1"] == scores["scr_metric_threshold_1"] == 1
    assert scores["scr_dir1_threshold_2"] == 1  # no other latent has an effect
    assert scores["scr_dir2_threshold_1"] == 0  # there is no room
    assert found.flags == []


def test_effects_do_not_ask_for_a_sign():
    effect_PF = Scr().effects(torch.tensor([[2.0, -3, 1]]), torch.tensor([[1.0], [2], [-4]]))
    assert effect_PF.tolist() == [[2, 6, 4]]


def test_a_difference_that_may_be_none_is_flagged():
    accuracies = torch.tensor([0.62, 0.5, 0.7, 0.66], dtype=torch.float64)
    (flag,) = pair_flags(
        {CLASS: one(0.6).expand(4), ATTRIBUTE: one(0.8).expand(4)}, {CLASS: accuracies, ATTRIBUTE: one(0.9).expand(4)}
    )
    assert "not surely worse at the class" in flag
    assert "by 0.020" in flag
    assert (
        pair_flags(
            {CLASS: one(0.6).expand(4), ATTRIBUTE: one(0.8).expand(4)},
            {CLASS: one(0.9).expand(4), ATTRIBUTE: one(0.9).expand(4)},
        )
        == []
    )
    (flag,) = pair_flags({CLASS: one(0.6), ATTRIBUTE: one(0.6)}, {CLASS: one(0.9), ATTRIBUTE: one(0.9)})
    assert "no scr_metric" in flag


def test_of_a_class_what_its_probe_loses_beyond_the_others():
    clean = [one(0.9), one(0.8), one(0.7)]
    found = class_scores(1, clean, {5: [one(0.8), one(0.5), one(0.72)]})
    assert {name: float(score) for name, score in found.items()} == pytest.approx(
        {
            "tpp_threshold_5_total_metric": 0.3 - 0.04,
            "tpp_threshold_5_intended_diff_only": 0.3,
            "tpp_threshold_5_unintended_diff_only": 0.04,
        }
    )


def test_effects_of_latents_that_are_rarer_in_a_class_are_none():
    effect_PF = Tpp().effects(torch.tensor([[2.0, -3, 1]]), torch.tensor([[1.0], [2], [-4]]))
    assert effect_PF.tolist() == [[2, 0, -4]]


def test_a_latent_for_every_class_is_all_that_its_probe_loses():
    """Three classes, a latent and a dimension each."""
    label_N = torch.arange(3).repeat_interleave(20)
    x_ND = torch.nn.functional.one_hot(label_N, 3).float()
    probes = LinearProbes(torch.eye(3), torch.full((3,), -0.5))
    pooled = PooledLatents(x_ND, torch.ones(60), torch.zeros(3))
    tasks = [ProbeTask(torch.arange(60), (label_N == c).float()) for c in range(3)]
    problem = AblationProblem(
        "planted", {"test": {str(c): [""] * 20 for c in range(3)}}, ("0", "1", "2"), lambda s, p, _: tasks[p]
    )
    readout = ProbeReadout.of(probes, x_ND, pooled, torch.eye(3), 1)
    metric = Tpp(thresholds=(1, 3))
    effect_PF = metric.effects(mean_latent_differences(pooled, tasks), readout.align_FP)
    torch.testing.assert_close(effect_PF, torch.eye(3))
    found = metric.scores(
        problem, readout, effect_PF, tasks.__getitem__, BootstrapWeights.of([20] * 3, replicates=20), "0.6.0"
    )
    for n in (1, 3):
        assert float(found.values[f"tpp_threshold_{n}_intended_diff_only"][0]) == pytest.approx(1 / 3)  # 20 of 60 texts
        assert float(found.values[f"tpp_threshold_{n}_unintended_diff_only"][0]) == 0
    assert found.extra["2"]["clean_accuracy"] == 1
    assert found.flags == []
    blind = replace(readout, logit_NP=-readout.logit_NP)
    flags = metric.scores(
        problem, blind, effect_PF, tasks.__getitem__, BootstrapWeights.of([20] * 3, replicates=20), "0.6.0"
    ).flags
    assert flags == [f"the probe of {c} is right on 0.000 of its texts, so it has little to lose." for c in range(3)]


# --- a whole measurement ----------------------------------------------------------------------------------------------


def write_reviews(data: Path, rows: int = 70) -> None:
    """Two categories and two ratings, each with words of its own."""
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
def ctx(tiny_model, tmp_path, monkeypatch) -> EvalContext:
    write_reviews(tmp_path)
    source, config = find_model(str(tiny_model))
    model = load_model(source, config, dtype="float32", device="cpu")
    nothing = Contexts(*(torch.zeros(0).numpy() for _ in range(4)))
    table = labelled.DATASETS[REVIEWS]
    monkeypatch.setitem(labelled.DATASETS, REVIEWS, replace(table, classes=(24, 26), pairs=((24, 26),)))
    artifacts = ArtifactCache(tmp_path / "shelf")
    return EvalContext(
        lambda: model, load_tokenizer(source), nothing, [0, 1, 2], "0.6.0", source.identity(), {}, artifacts, tmp_path
    )


def random_sae(seed: int, d_sae: int = 60) -> SAE:
    torch.manual_seed(seed)
    sae = SAE(32, d_sae, [ReLU()]).requires_grad_(False)
    sae.b_enc -= 0.5
    return sae


SETS = {"train_set_size": 80, "test_set_size": 100, "context": 32}
SMALL = Scr((REVIEWS,), (2, 20), **SETS)


def silent(done, total, note=""):
    pass


def test_the_fields_are_saebench_s_and_no_sae_depends_on_another(ctx, monkeypatch):
    targets = [
        EvalTarget(random_sae(0), 0),
        EvalTarget(random_sae(1), 1),
        EvalTarget(random_sae(2), 0),
        EvalTarget(Identity(), 0),
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
    monkeypatch.setattr(ctx.model, "capture", None)  # texts and probes are on the shelf
    monkeypatch.setattr(ablation, "train_probes", None)
    alone = [SMALL.measure(ctx, [target], silent)[0] for target in reversed(targets)]
    assert alone[::-1] == together


def test_what_fires_on_nothing_leaks_and_is_said(ctx):
    loud = random_sae(0)
    loud.b_enc += 1.0
    quiet, leaking = SMALL.measure(ctx, [EvalTarget(random_sae(0), 0), EvalTarget(loud, 0)], silent)
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
        ctx, [EvalTarget(random_sae(0, 12), 0), EvalTarget(Squares(), 0), EvalTarget(Zero(), 0)], silent
    )
    assert isinstance(few, UsageError)
    assert "--set scr.thresholds=2." in str(few)
    assert "affine" in str(odd)
    assert set(fine.metrics["scr_metrics"].values()) == {0}
    assert any("Only 0 latents have an effect" in flag for flag in fine.flags)


def test_tpp_draws_the_same_for_every_sae_or_as_saebench_for_each(ctx):
    for rng in ("paired", "saebench"):
        metric = Tpp((REVIEWS,), (2, 20), **SETS, rng=rng)
        first, second, again = metric.measure(
            ctx, [EvalTarget(random_sae(0), 0), EvalTarget(random_sae(2), 0), EvalTarget(random_sae(0), 0)], silent
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
        ({"test_set_size": 3}, "less than 4"),
        ({"rng": "mine"}, "rng=mine"),
    ],
)
def test_settings_that_make_no_sense_are_refused(ctx, setting, says):
    with pytest.raises(UsageError, match=says):
        Scr(**setting).measure(ctx, [], silent)
