"""The five answers at the top of a report: their verdicts, numbers and suggested commands."""

import math

import pytest

from sae.common.evaluation_schemas import RESULT_RECORD
from sae.common.files import digest_of
from sae.evaluate.against import AgainstLine
from sae.evaluate.answers import CONTROL, FRONTIER, PCA, SEED, STABLE, answer_questions, conclude, name_others
from sae.evaluate.compared_runs import read_run
from sae.evaluate.metrics.base import MetricColumn
from sae.evaluate.neighbours import find_neighbours
from sae.evaluate.paired import Pairing
from sae.evaluate.statistics import Finding, mean_interval, prediction_interval

from ..run_records import write_result_record, write_run_record, write_sae_record

MODEL = {"name": "gemma-2-mini", "revision": "0" * 64}
DOCUMENTS = 40
SETTINGS = {"model": "gemma-2-mini", "contexts": 40}


def core(l0: float, kl: float, ev: float, by_document: bool = True) -> dict:
    """A result of core whose numbers vary slightly between documents, in the same way for every SAE."""
    waves = [math.sin(n) / 100 for n in range(DOCUMENTS)]
    centred = [wave - sum(waves) / DOCUMENTS for wave in waves]

    def values(mean: float) -> list[float]:
        return [mean + wave * (1 + mean / 10) for wave in centred]

    numbers = {"kl_div_score": kl, "ce_loss_score": kl, "fve": ev}
    extra = {"text": "t", "unit": "document", "values": {name: values(v) for name, v in numbers.items()}}

    return {
        "eval_result_metrics": {
            "sparsity": {"l0": l0},
            "model_behavior_preservation": {"kl_div_score": kl},
            "model_performance_preservation": {"ce_loss_score": kl},
            "reconstruction_quality": {"fve": ev},
        },
        "eval_result_unstructured": {
            "intervals": {"reconstruction_quality": {"fve": [ev - 0.01, ev + 0.01]}},
            "n": {"tokens": 5}, "flags": [], "extra": extra if by_document else None,
        },
    }  # fmt: skip


def make_run(folder, l0=32.0, kl=0.9, ev=0.8, by_document=True, model=MODEL, contexts=40, **record):
    """A run folder with a core result. `record` holds fields of run.json; `asked_l0` becomes its field l0."""
    (folder / "evaluations").mkdir(parents=True)
    record |= {"l0": record.pop("asked_l0")} if "asked_l0" in record else {}
    origin = {
        "model": model,
        "layer": 12,
        "site": record.get("site", "resid_post"),
        "variant": record.get("variant", "topk"),
    }
    write_sae_record(folder, origin=origin)
    write_run_record(folder, **{"options": {"k": 32}, "resolved": {"k": 32}, **record})
    settings = {**SETTINGS, "contexts": contexts, "weights": folder.name}
    write_result_record(folder, "core", eval_config=settings, **core(l0, kl, ev, by_document))
    return folder


def make_reference(home, name, l0, kl, ev, conditions=None, by_document=True):
    described = {"reference": name, **({"conditions": conditions} if conditions else {})}
    digest = digest_of(described)
    folder = home / "activations" / "evaluation" / "references" / f"{name}-L12-{digest[:8]}"
    settings = {**SETTINGS, "weights": digest}
    write_result_record(folder, "core", eval_config=settings, sae_cfg_dict=described, **core(l0, kl, ev, by_document))
    return folder


def report_of(folder):
    return answer_questions(find_neighbours(read_run(folder)))


def answers_of(folder):
    return {answer.question: answer for answer in report_of(folder).answers}


def conditions_of(folder):
    from sae.evaluate.controls import conditions_of

    return conditions_of(folder)


@pytest.fixture
def runs(home):
    return home / "runs"


def test_a_run_alone_says_what_is_missing_and_which_command_gives_it(runs):
    run = make_run(runs / "one")
    found = answers_of(run)
    assert list(found) == [PCA, CONTROL, SEED, STABLE, FRONTIER]
    assert found[PCA].command == f"sae evaluate {run} --suite core" and found[PCA].verdict == "not measured"
    assert found[CONTROL].command == f"sae evaluate {run} --suite core --controls"
    assert "--variant topk --layer 12 --seed 1 --seed 2" in found[SEED].command
    assert "--suite stability" in found[STABLE].remedy and found[STABLE].command == found[SEED].command
    assert "not known" in found[FRONTIER].verdict and "no published SAEs" in "".join(found[FRONTIER].numbers)
    assert all(answer.is_good is None for answer in found.values())
    assert report_of(run).lines == []


def test_a_run_without_core_asks_for_it(runs):
    run = make_run(runs / "one")
    (run / "evaluations" / "core.json").unlink()
    found = answers_of(run)
    assert found[PCA].command == found[FRONTIER].command == f"sae evaluate {run} --suite core"


@pytest.mark.parametrize(
    ("kl", "ev", "verdict", "is_good"),
    [
        (0.5, 0.4, "yes", True),
        (0.95, 0.9, "no, worse", False),
        (0.5, 0.9, "better in 1 and worse in 1 of 2", False),
        (0.5, 0.8, "better in 1 of 2", None),
    ],
)
def test_the_pca_of_its_l0_is_the_measure(runs, home, kl, ev, verdict, is_good):
    run = make_run(runs / "one")
    make_reference(home, "pca-32", 32.0, kl, ev)
    make_reference(home, "pca-64", 64.0, 0.99, 0.99)
    answer = answers_of(run)[PCA]
    assert (answer.verdict, answer.is_good, answer.command) == (verdict, is_good, "")
    assert answer.numbers[0].startswith("compared with pca-32: EV 0.8000") and "pca" not in answer.numbers[1]


def test_a_difference_has_its_interval_over_documents(runs, home):
    run = make_run(runs / "one")
    make_reference(home, "pca-32", 32.0, 0.5, 0.4)
    report = report_of(run)
    line = next(line for line in report.lines if line.column.name == "fve")
    values = [core(0, 0, ev)["eval_result_unstructured"]["extra"]["values"]["fve"] for ev in (0.8, 0.4)]
    low, high = mean_interval([a - b for a, b in zip(*values, strict=True)])
    assert f"EV 0.8000, +0.4000 ({low:+.4f} to {high:+.4f})" in report.answers[0].numbers[0] and low < 0.4 < high
    assert line.cells()[0] == "pca-32" and "40 documents" in line.cells()


def test_a_pca_of_another_l0_is_said_to_be_one(runs, home):
    run = make_run(runs / "one")
    make_reference(home, "pca-64", 64.0, 0.95, 0.9)
    answer = answers_of(run)[PCA]
    assert answer.verdict == "no, worse, at another L0" and answer.command == f"sae evaluate {run} --suite core"


def test_results_that_cannot_be_tested_are_to_be_measured_again(runs, home):
    run = make_run(runs / "one")
    make_reference(home, "pca-32", 32.0, 0.5, 0.4, by_document=False)
    answer = answers_of(run)[PCA]
    assert answer.verdict == "not tested" and answer.command == f"sae evaluate {run} --suite core --force"
    assert answer.numbers[0] == "compared with pca-32: EV 0.8000 against 0.4000"


def test_the_best_control_counts_and_its_share_is_told(runs, home):
    run = make_run(runs / "one")
    make_reference(home, "frozen-decoder-32", 32.0, 0.45, 0.6, conditions_of(run))
    make_reference(home, "frozen-encoder-32", 32.0, 0.72, 0.2, conditions_of(run))
    make_reference(home, "soft-frozen-decoder-32", 32.0, 0.99, 0.99, {**conditions_of(run), "d_sae": 4})
    near = find_neighbours(read_run(run))  # controls trained under other conditions do not belong to this run
    assert [one.name for one in near.references] == ["frozen-decoder-32", "frozen-encoder-32"]
    answer = answers_of(run)[CONTROL]
    assert (answer.verdict, answer.is_good) == ("yes", True)
    ev, kl = answer.numbers
    assert ev.startswith("compared with frozen-decoder-32: EV") and ev.endswith(
        "; the control reaches 75% (75 to 75) of it"
    )  # 0.6 / 0.8
    assert kl.startswith("compared with frozen-encoder-32: KL") and kl.endswith(
        "; the control reaches 80% (80 to 80) of it"
    )  # 0.72 / 0.9


def test_a_control_trained_as_a_run_beside_it_counts_by_the_run_of_the_same_seed(runs):
    run = make_run(runs / "one", seed=1)
    for seed in (0, 1, 2):
        make_run(runs / f"frozen-{seed}", 32.0, 0.3 + 0.2 * seed, 0.2 + 0.2 * seed, variant="frozen-decoder", seed=seed)
    make_run(runs / "longer", 32.0, 0.99, 0.99, variant="frozen-encoder", seed=1, steps=99)
    make_run(runs / "otherwise", 32.0, 0.99, 0.99, variant="frozen-encoder", seed=1, contexts=5)
    near = find_neighbours(read_run(run))  # only controls of the same length and settings
    assert [one.name for one in near.controls] == ["frozen-1"] and near.others == [] == near.references
    answer = answers_of(run)[CONTROL]
    assert answer.verdict == "yes" and answer.numbers[0].startswith("compared with frozen-1: EV 0.8000, +0.4000")
    assert answer.numbers[0].endswith("; the control reaches 50% (50 to 50) of it")  # 0.4 / 0.8
    assert find_neighbours(read_run(runs / "frozen-1")).controls == []


def test_a_control_as_good_as_the_run_is_not_called_worse(runs, home):
    run = make_run(runs / "one")
    make_reference(home, "frozen-decoder-32", 32.0, 0.9, 0.8, conditions_of(run))
    answer = answers_of(run)[CONTROL]
    assert answer.verdict == "same in every pair" and answer.is_good is None
    assert all("the control reaches 100% (100 to 100) of it" in number for number in answer.numbers)
    assert answer.numbers == [
        "compared with frozen-decoder-32: EV 0.8000 against 0.8000; the control reaches 100% (100 to 100) of it",
        "KL score 0.9000 against 0.9000; the control reaches 100% (100 to 100) of it",
    ]


def test_of_the_other_metrics_the_number_of_which_a_control_has_most_is_told(runs, home):
    run = make_run(runs / "one")
    control = make_reference(home, "frozen-decoder-32", 32.0, 0.5, 0.6, conditions_of(run))
    for folder, aucs in ((run, (0.9, 0.8)), (control, (0.6, 0.7))):
        of_core = RESULT_RECORD.read(folder / "evaluations" / "core.json")
        numbers = {f"sae_top_{k}_test_auc": auc for k, auc in zip((1, 16), aucs, strict=True)}
        write_result_record(
            folder, "sae_probes", eval_config=of_core["eval_config"], sae_cfg_dict=of_core["sae_cfg_dict"],
            eval_result_metrics={"sae": numbers},
            eval_result_details=[{"dataset_name": name, **numbers} for name in ("pets", "sizes")],
        )  # fmt: skip
    numbers = answers_of(run)[CONTROL].numbers
    assert len(numbers) == 3 and "k=16" in numbers[2]
    assert numbers[2].endswith("the control reaches 67% (67 to 67) of it")  # k = 16: 0.2 / 0.3; k = 1: 0.1 / 0.4


def test_controls_are_asked_for_by_all_that_was_measured_but_stability(runs):
    run = make_run(runs / "one")
    write_stability(run)
    write_result_record(run, "sae_probes", eval_config={"weights": "one"})
    assert answers_of(run)[CONTROL].command == f"sae evaluate {run} --suite core,sae_probes --controls"


def test_a_control_that_cannot_be_tested_is_measured_again_as_one(runs, home):
    run = make_run(runs / "one")
    make_reference(home, "frozen-decoder-32", 32.0, 0.5, 0.4, conditions_of(run), by_document=False)
    assert answers_of(run)[CONTROL].command == f"sae evaluate {run} --suite core --force --controls"


def test_a_control_is_not_compared_with_controls(runs):
    assert answers_of(make_run(runs / "one", variant="frozen-decoder"))[CONTROL].verdict == "it is a control itself"


def test_a_run_of_unknown_training_has_neither_controls_nor_seeds(runs):
    run = make_run(runs / "one")
    (run / "run.json").unlink()
    found = answers_of(run)
    assert found[CONTROL].verdict == found[SEED].verdict == found[STABLE].verdict == "not known"
    assert not any(found[question].command for question in (CONTROL, SEED, STABLE))


@pytest.mark.parametrize(
    ("kl", "verdict", "is_good"),
    [(0.9, "like the other seeds", None), (0.97, "above the other seeds", True), (0.8, "below the other seeds", False)],
)
def test_a_run_is_seen_beside_the_spread_of_its_other_seeds(runs, kl, verdict, is_good):
    others = [0.89, 0.9, 0.91]
    run = make_run(runs / "s0", kl=kl)
    for seed, value in enumerate(others, 1):
        make_run(runs / f"s{seed}", kl=value, seed=seed, ev=0.79 + seed / 100)
    make_run(runs / "again", kl=0.1, seed=0)  # the same seed trained twice is not another seed
    make_run(runs / "longer", kl=0.1, seed=1, steps=99)
    answer = answers_of(run)[SEED]
    assert (answer.verdict, answer.is_good) == (verdict, is_good)
    low, high = prediction_interval(others)
    assert {line.system for line in report_of(run).lines} == {"longer"}  # from the frontier; no single seed is tested
    assert answer.numbers[1] == (
        f"KL score {kl:.4f}, 3 other seeds 0.9000 ± 0.0100 (sd); another seed is expected at {low:.4f} to {high:.4f}"
    )


def test_two_other_seeds_are_a_spread_and_a_run_can_be_on_both_sides_of_it(runs):
    run = make_run(runs / "s0", kl=0.99, ev=0.5)
    for seed in (1, 2):
        make_run(runs / f"s{seed}", kl=0.89 + seed / 1000, ev=0.79 + seed / 1000, seed=seed)
    answer = answers_of(run)[SEED]
    assert (answer.verdict, answer.is_good) == ("above and below", None) and "2 other seeds" in answer.numbers[0]


def test_one_other_seed_gives_a_difference_and_asks_for_more(runs):
    run = make_run(runs / "s0")
    make_run(runs / "s1", kl=0.7, ev=0.7, seed=1)
    answer = answers_of(run)[SEED]
    assert answer.verdict == "yes" and answer.command.startswith("sae train") and "s1" in answer.numbers[0]


def test_seeds_that_are_there_are_to_be_measured_with_it(runs):
    run = make_run(runs / "s0")
    other = make_run(runs / "s1", seed=1, contexts=99)
    found = answers_of(run)
    assert found[SEED].command == f"sae evaluate {run} {other} --suite core"
    assert found[SEED].remedy == "There is 1 other seed in its folder. Evaluate all of them together:"
    assert found[STABLE].command == f"sae evaluate {run} {other} --suite stability"


def write_stability(folder, null_high=0.3, recurring=0.42, others=2, **more):
    numbers = {
        "decoder_pw_mcc": 0.62,
        "decoder_pw_mcc_null": 0.2,
        "activation_pw_mcc": 0.5,
        "activation_pw_mcc_null": 0.1,
        "recurring": recurring,
        **more,
    }
    write_result_record(
        folder, "stability", eval_config={"weights": folder.name}, eval_result_metrics={"stability": numbers},
        eval_result_unstructured={
            "intervals": {"stability": {"decoder_pw_mcc": [0.6, 0.64], "decoder_pw_mcc_null": [0.1, null_high]}},
            "n": {"other_seeds": others}, "flags": [], "extra": {"seeds": ["s1", "s2"][:others]},
        },
    )  # fmt: skip


def test_stability_stands_beside_chance(runs):
    run = make_run(runs / "one")
    write_stability(run)
    answer = answers_of(run)[STABLE]
    assert answer.verdict == "42% of latents recur" and answer.is_good is None
    assert answer.numbers[:2] == ["in each of 2 other seeds", "decoder PW-MCC 0.620 (0.600 to 0.640), random 0.200"]
    write_stability(run, recurring_in_all=0.3)  # results of earlier versions, like the one above, lack it
    assert answers_of(run)[STABLE].numbers[0] == "on average over 2 other seeds, 30% in all of them"
    for high in (0.62, 0.7):  # equal to the measured number, and above it
        write_stability(run, null_high=high)
        answer = answers_of(run)[STABLE]
        assert (answer.verdict, answer.is_good) == ("42% of latents recur; decoder PW-MCC not above chance", False)
    write_stability(run, activation_pw_mcc=0.05)  # below the mean of chance; there is no interval here
    assert answers_of(run)[STABLE].verdict == "42% of latents recur; activation PW-MCC not above chance"
    write_stability(run, others=1)
    assert answers_of(run)[STABLE].numbers[0] == "in the other seed"
    write_stability(run, recurring=None)
    answer = answers_of(run)[STABLE]
    assert answer.verdict == "not known" and answer.numbers[0].startswith("decoder PW-MCC 0.620")


@pytest.mark.parametrize(
    ("l0", "kl", "verdict", "is_good"),
    [
        (30.0, 0.8, "on it at L0 32.0", True),
        (30.0, 0.95, "partly behind at L0 32.0", False),
        (40.0, 0.95, "not known at L0 32.0", None),
        (32.2, 0.95, "partly behind at L0 32.0", False),
    ],
)
def test_on_the_frontier_no_other_run_is_better_with_no_more_latents(runs, l0, kl, verdict, is_good):
    run = make_run(runs / "one")
    make_run(runs / "other", l0=l0, kl=kl, ev=0.7, variant="relu")
    make_run(runs / "elsewhere", l0=1.0, kl=0.99, ev=0.99, variant="relu", contexts=99)
    make_run(runs / "control", l0=1.0, kl=0.99, ev=0.99, variant="frozen-decoder")
    make_run(runs / "seed", l0=1.0, kl=0.99, ev=0.99, seed=1)
    answer = answers_of(run)[FRONTIER]
    assert (answer.verdict, answer.is_good) == (verdict, is_good)


@pytest.mark.parametrize(
    ("kl", "ev", "by_document", "verdict", "is_good"),
    [
        (0.95, 0.9, True, "behind at L0 32.0", False),
        (0.8, 0.8001, True, "not distinguishable from the best at L0 32.0", None),
        (0.95, 0.9, False, "not tested at L0 32.0", None),
    ],
)
def test_what_is_said_of_the_best_other_run(runs, kl, ev, by_document, verdict, is_good):
    run, other = make_run(runs / "one"), make_run(runs / "other", 30.0, kl, ev, by_document, variant="relu")
    if ev == 0.8001:  # here documents differ more than the two runs
        record = RESULT_RECORD.read(other / "evaluations" / "core.json")
        values = [ev + (-1) ** n / 10 for n in range(DOCUMENTS)]
        record["eval_result_unstructured"]["extra"]["values"]["fve"] = values
        RESULT_RECORD.write(other / "evaluations" / "core.json", record)
    answer = answers_of(run)[FRONTIER]
    assert (answer.verdict, answer.is_good) == (verdict, is_good)
    assert answer.command == ("" if by_document else f"sae evaluate {run} --suite core --force")


def test_each_number_is_named_after_what_it_is_against(runs):
    run = make_run(runs / "one")
    make_run(runs / "a", 30.0, 0.95, 0.7, variant="relu")
    make_run(runs / "b", 30.0, 0.8, 0.9, variant="jumprelu")
    numbers = answers_of(run)[FRONTIER].numbers
    assert [number.split(":")[0] for number in numbers] == [
        f"the best other run of at most this L0 is {one}" for one in "ab"
    ]


def test_published_saes_stand_beside_a_run_of_their_model(runs):
    gemma = {"name": "google/gemma-2-2b", "revision": "0"}
    run = make_run(runs / "one", model=gemma, l0=40.0, kl=0.9647)
    text = " ".join(answers_of(run)[FRONTIER].numbers)
    assert "CE score 0.9647 is above 2 of 12 published SAEs at this L0 (measured on other text" in text


def test_all_comparisons_of_a_report_are_corrected_together(runs, home):
    """Corrected for m comparisons, a p-value is up to m times as large as for one comparison."""
    run = make_run(runs / "one")
    make_reference(home, "pca-32", 32.0, 0.8995, 0.5)
    alone = next(line for line in report_of(run).lines if line.column.name == "kl_div_score")
    for n in range(3):
        make_run(runs / f"other{n}", l0=20.0, kl=0.9, ev=0.8, variant="relu", options={"k": n})
    make_reference(home, "frozen-decoder-32", 32.0, 0.9, 0.8, conditions_of(run))
    more = next(line for line in report_of(run).lines if line.column.name == "kl_div_score")
    assert len(report_of(run).lines) == 7
    assert alone.finding.p_value is not None and more.finding.p_value is not None
    assert more.finding.p_value >= alone.finding.p_value


def test_a_prediction_interval_is_wider_than_that_of_the_mean():
    values = [1.0, 2.0, 3.0, 4.0]
    (low, high), (mean_low, mean_high) = prediction_interval(values), mean_interval(values)
    assert high - low == pytest.approx((mean_high - mean_low) * math.sqrt(5))  # sd sqrt(1 + 1/4) instead of sd / 2
    assert (low + high) / 2 == pytest.approx(2.5) and prediction_interval([2.0, 2.0]) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("verdicts", "answer"),
    [
        (["equivalent", "equivalent"], "equivalent"),
        (["equivalent", "not distinguishable"], "not distinguishable"),
        (["not distinguishable", "not tested"], "not distinguishable"),
        (["better", "better"], "yes"),
        (["better", "not distinguishable"], "better in 1 of 2"),
        (["better", "not tested"], "yes"),
        (["not tested"], "not tested"),
    ],
)
def test_several_verdicts_are_called_equivalent_only_if_all_are(verdicts, answer):
    column = MetricColumn("EV", "c", "n", better="up", floor=0, ceiling=1)
    lines = [
        AgainstLine("other", "core", column, (0.5, 0.5), Pairing(None), None, Finding(verdict)) for verdict in verdicts
    ]
    assert conclude(lines)[0] == answer


def test_a_name_is_said_again_only_where_it_changes():
    column = MetricColumn("EV", "c", "n", better="up", floor=0, ceiling=1)
    lines = [AgainstLine(name, "core", column, (0.5, 0.5), Pairing(None), None, Finding("better")) for name in "abba"]
    assert [text.split(":")[0] for text in name_others(lines, "compared with")] == [
        "compared with a", "compared with b", "EV 0.5000 against 0.5000", "compared with a",
    ]  # fmt: skip


def test_where_all_others_have_more_latents_per_token_no_command_is_given(runs):
    """A run without others gets a command that measures them; if all others have a higher L0, there is no command."""
    run = make_run(runs / "one")
    assert answers_of(run)[FRONTIER].command.endswith("--suite core")
    make_run(runs / "relu", l0=40.0, variant="relu")
    answer = answers_of(run)[FRONTIER]
    assert answer.verdict == "not known at L0 32.0" and answer.command == answer.remedy == ""
    assert answer.numbers[0] == "none of 1 other run in its folder has this L0 or a lower one"
