"""The sections of pages on sae_probes, stability and the answers: their contents, and that names are escaped."""

import re
from dataclasses import replace

import pytest

from sae.evaluate.answers import Answer, Report
from sae.evaluate.metrics.base import MetricResult
from sae.evaluate.pages.page import templates
from sae.evaluate.pages.probes import probes_of_run, probes_of_systems
from sae.evaluate.pages.stability import bin_centres, stability_of_run, stability_of_systems

HOSTILE = "<img src=x>\u202e"


def probed(ks=(1, 5), **auc) -> MetricResult:
    """A result of probing; `auc` maps a data set to the AUC of the model, then of the SAE at each k."""
    details = [
        {"dataset_name": name, "llm_test_auc": llm} | {f"sae_top_{k}_test_auc": v for k, v in zip(ks, of, strict=True)}
        for name, (llm, *of) in auc.items()
    ]
    return MetricResult({}, details)


def matched(*cosines, density=0.1) -> MetricResult:
    details = [
        {"index": n, "density": density, "recurs": min(map(abs, of)) >= 0.7, "decoder_match": [n + 10, n + 20],
         "decoder_cosine": list(of)}
        for n, of in enumerate(cosines)
    ]  # fmt: skip
    return MetricResult({"stability": {"recurring_threshold": 0.7}}, details, extra={"seeds": ["s1", "s2"]})


def render(macro: str, *arguments) -> str:
    return str(getattr(templates().get_template("parts.html").module, macro)(*arguments))


def test_data_sets_stand_in_the_order_of_the_models_probe_with_their_mean():
    part = probes_of_run(probed(low=(0.6, 0.5, 0.7), high=(0.9, 0.6, 0.8)))
    assert part is not None and list(part.heads) == ["data set", "model's probe", "k=1", "k=5"]
    assert part.lines == [["high", "0.9000", "0.6000", "0.8000"], ["low", "0.6000", "0.5000", "0.7000"]]
    assert part.foot == ["mean", "0.7500", "0.5500", "0.7500"]
    assert part.lead.startswith(
        "A probe on 5 latents is better than the model's own probe on 1 of 2 data sets: mean AUC 0.7500"
    )
    assert "a difference of +0.0000 (-1.2706 to +1.2706, 95 %" in part.lead  # 0.1 and -0.1: 12.706 x 0.1414 / sqrt(2)
    assert len(re.findall("<title>", part.chart)) == 2 * 3 + 1  # one mark per number, and the line
    assert "1 latent of the SAE: high, 0.6000" in part.chart


def test_the_usual_number_of_latents_is_the_largest_up_to_16():
    part = probes_of_run(probed((16, 128), one=(0.6, 0.5, 0.9)))
    assert part is not None and part.lead.startswith(
        "A probe on 16 latents is better than the model's own probe on 0 of 1 data set"
    )


def test_the_lead_is_about_the_usual_number_of_latents_and_the_data_sets_of_both():
    """A tie does not count as better; a data set without a result of the SAE is not in the means."""
    aucs = {
        "b": (0.7, 0.5, 0.7, 0.9),
        "a": (0.7, 0.6, 0.8, 0.9),
        "c": (0.6, 0.5, 0.8, 0.9),
        "d": (0.9, None, None, None),
    }
    part = probes_of_run(probed((5, 16, 128), **aucs))
    assert part is not None and part.lead.startswith(
        "A probe on 16 latents is better than the model's own probe on 2 of 3 data sets: mean AUC 0.7667 against "
        "0.6667, a difference of +0.1000 ("
    )
    assert part.lines == [
        ["d", "0.9000", "", "", ""], ["a", "0.7000", "0.6000", "0.8000", "0.9000"],
        ["b", "0.7000", "0.5000", "0.7000", "0.9000"], ["c", "0.6000", "0.5000", "0.8000", "0.9000"],
    ]  # fmt: skip
    assert "16 latents of the SAE: b, 0.7000" in part.chart and "128 latents" not in part.chart
    large = probes_of_run(probed((64, 128), one=(0.6, 0.5, 0.9)))
    assert large is not None and large.lead.startswith("A probe on 64 latents")


def test_the_numbers_are_those_without_outlier_rows():
    rows = probed(one=(0.9, 0.1, 0.1)), probed((16,), one=(0.8, 0.7))
    part = probes_of_run(replace(rows[0], masked=rows[1]))
    assert part is not None and part.heads[2:] == ["k=16"] and part.lines == [["one", "0.8000", "0.7000"]]


def test_systems_stand_beside_each_other_at_a_number_that_all_have():
    systems = {
        "a": [probed(one=(0.9, 0.5, 0.8)), probed(one=(0.9, 0.5, 0.6))],
        "b": [probed((5,), one=(0.9, 0.75), two=(0.8, 0.7))],
        "not measured": [],
    }
    part = probes_of_systems(systems)
    assert part is not None and list(part.heads) == ["data set", "model's probe", "a", "b"]
    assert part.lines == [["one", "0.9000", "0.7000", "0.7500"], ["two", "0.8000", "", "0.7000"]]
    assert probes_of_systems({"a": [probed((1,), x=(0.9, 0.5))], "b": [probed((2,), x=(0.9, 0.5))]}) is None
    seeds = probes_of_systems({"a": [probed((1, 16), x=(0.9, 0.5, 0.8)), probed((1,), x=(0.9, 0.6))]})
    assert seeds is not None and seeds.lines == [["x", "0.9000", "0.5500"]]


@pytest.mark.parametrize(
    "result",
    [MetricResult({}), probed(x=(None, 0.5, 0.5)), probed(x=(0.9, None, None)), probed(x=(0.9, "edited", "edited"))],
)
def test_a_result_without_data_sets_has_no_part(result):
    assert probes_of_run(result) is None and probes_of_systems({"a": [result]}) is None


def test_latents_are_listed_by_their_weakest_match():
    result = matched((0.9, 0.95), (-0.8, 0.2), (0.71, 1.0))
    part = stability_of_run(result)
    assert part is not None and [line.latent for line in part.least] == [1, 2, 0] and part.most == []
    assert list(part.least[0].cells) == ["0.200", "11 (0.800)", "21 (0.200)", "10.00%"]
    assert part.lead == (
        "2 of 3 latents recur, with a cosine of at least 0.7 in every other seed. The smallest cosine of a latent "
        "with its matches is 0.603 on average over latents."
    )
    assert list(part.heads) == ["latent", "weakest cosine", "match in\ns1", "match in\ns2", "density"]
    assert "0.20 to 0.25: 1 latents" in part.chart and "0.90 to 0.95: 1 latents" in part.chart


@pytest.mark.parametrize("seeds", [["s1"], ["s1", "s2", "s3"]])
def test_a_line_has_a_cell_for_each_heading_whatever_seeds_are_named(seeds):
    part = stability_of_run(replace(matched((0.9, 0.95)), extra={"seeds": seeds}))
    assert part is not None and len(part.heads) == 3 + len(seeds) == 1 + len(part.least[0].cells)


def test_a_cosine_of_1_is_in_the_last_bin_whose_mark_is_in_its_middle():
    part = stability_of_run(matched((1.0, 1.0)))
    assert part is not None and "0.95 to 1.00: 1 latents" in part.chart
    assert bin_centres()[0] == 0.025 and bin_centres()[-1] == 0.975


def test_a_cosine_below_0_is_no_match_where_its_sign_has_a_meaning():
    result = matched((-0.8, 0.9), (0.5, 0.9))
    assert result.extra is not None
    result.extra["signed"] = True
    part = stability_of_run(result)
    assert part is not None and [line.cells[0] for line in part.least] == ["-0.800", "0.500"]
    assert "0.00 to 0.05: 1 latents" in part.chart


def test_the_most_stable_come_first_among_many():
    part = stability_of_run(matched(*((n / 30, 1.0) for n in range(30))))
    assert part is not None and [line.latent for line in part.least] == list(range(10))
    assert [line.latent for line in part.most] == list(range(29, 19, -1))


def test_latents_that_never_fire_are_left_out_and_counted():
    result = matched((0.9, 0.9), (0.1, 0.1))
    result.details[1]["density"] = 0.0
    part = stability_of_run(result)
    assert part is not None and "1 of 1 latents recur" in part.lead and "1 latents that never fire" in part.lead
    assert stability_of_run(matched((0.5, 0.5), density=0.0)) is None


def test_shares_of_a_system_are_of_all_its_seeds_together():
    several = matched((0.92, 0.92), (0.93, 0.93), (0.94, 0.94))
    part = stability_of_systems({"a": [matched((0.92, 0.92)), matched((0.12, 0.5))], "b": [], "c": [several]})
    assert part is not None and "a: 0.90 to 0.95, 50.0%" in part.chart and "a: 0.10 to 0.15, 50.0%" in part.chart
    assert stability_of_systems({"b": []}) is None


def test_only_latents_of_the_page_are_links():
    html = render("stability", stability_of_run(matched((0.9, 0.9), (0.1, 0.1))), {1})
    assert '<a href="#latent-1">1</a>' in html and "#latent-0" not in html


def test_names_are_escaped():
    result = probed(**{HOSTILE: (0.9, 0.5, 0.5)})
    stable = matched((0.9, 0.9))
    assert stable.extra is not None
    stable.extra["seeds"] = [HOSTILE, "s2"]
    answer = Answer(HOSTILE, HOSTILE, [HOSTILE], None, HOSTILE, f"sae evaluate {HOSTILE}")
    for html in (
        render("probes", probes_of_run(result)), render("probes", probes_of_systems({HOSTILE: [result]})),
        render("stability", stability_of_run(stable)), render("stability", stability_of_systems({HOSTILE: [stable]})),
        render("answers", Report([answer], []), {HOSTILE: HOSTILE}),
    ):  # fmt: skip
        assert "<img" not in html and "\u202e" not in html and "&lt;img src=x&gt;⟨202E⟩" in html


def test_an_answer_shows_its_verdict_and_its_command():
    answers = [
        Answer("Good?", "yes", ["EV 1"], True),
        Answer("There?", "not measured", (), None, "Do:", "sae do"),
        Answer("Where?", "not known", ["L0 4", "no other"], None, "Do:", "sae do"),
    ]
    html = render("answers", Report(answers, []), {})
    assert '<strong class="answer good">Yes</strong> <span>EV 1</span>' in html
    assert '<span>L0 4; no other.</span> <span class="remedy">Do:' in html
    assert '<span class="remedy">Do: <code>sae do</code></span>' in html and "every comparison" not in html
