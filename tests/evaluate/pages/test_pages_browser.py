"""The pages of a comparison and of a paper's report in a browser. Any console message fails a test."""

import re
from dataclasses import replace

import pytest

from sae.evaluate.against import compare_against
from sae.evaluate.compare import compare_runs
from sae.evaluate.pages.comparison import comparison_page
from sae.evaluate.pages.page import write_page
from sae.evaluate.pages.reproduction import reproduction_page
from sae.evaluate.papers.parse import load_paper
from sae.evaluate.papers.report import build_report

from ..papers.test_figures import lettered, runs_of
from ..test_compare import make_run


def column(page, number: int) -> list[str]:
    return page.locator(f"table.sortable >> nth=0 >> tbody tr > :nth-child({number})").all_inner_texts()


@pytest.fixture
def comparison(tmp_path, opened):
    runs = [
        make_run(tmp_path, name, l0=l0, kl=kl)
        for name, l0, kl in (("b", 9.0, 0.5), ("a", 100.0, 0.7), ("c", 32.0, 0.6))
    ]
    runs += [make_run(tmp_path, "a", seed=1, l0=100.0, kl=0.8)]
    write_page(tmp_path / "compare.html", comparison_page(compare_runs(runs)))
    return opened(tmp_path / "compare.html")


def test_a_click_on_a_head_sorts_by_number_and_again_the_other_way(comparison):
    assert column(comparison, 1) == ["b", "a (2 seeds)", "c"]
    head = comparison.locator("table.sortable th >> nth=1")
    head.click()
    assert column(comparison, 2) == ["100.0", "32.0", "9.0"]
    head.click()
    assert column(comparison, 2) == ["9.0", "32.0", "100.0"]


def test_the_keyboard_sorts_too(comparison):
    comparison.locator("table.sortable th >> nth=0").focus()
    comparison.keyboard.press("Enter")
    assert column(comparison, 1) == ["a (2 seeds)", "b", "c"]
    comparison.keyboard.press("Space")
    assert column(comparison, 1) == ["c", "b", "a (2 seeds)"]
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert comparison.evaluate(outline) == "solid"  # the focus is visible


def test_a_page_is_printed_in_light_colors_also_from_dark_mode(comparison):
    paper = "getComputedStyle(document.body).backgroundColor"
    comparison.emulate_media(color_scheme="dark")
    dark = comparison.evaluate(paper)
    comparison.emulate_media(color_scheme="dark", media="print")
    assert dark != "rgb(255, 255, 255)" and comparison.evaluate(paper) == "rgb(255, 255, 255)"


def test_every_number_has_its_chart_with_a_mark_for_each_system(comparison):
    figure = comparison.locator("figure", has_text="KL score")
    assert figure.locator("svg.chart path title").count() == 3
    assert comparison.locator("ul.key").first.inner_text().split() == ["b", "a", "c"]


def test_every_row_of_a_table_begins_with_its_heading(tmp_path):
    """A screen reader can then announce which run, claim or setting a cell belongs to."""
    runs = [make_run(tmp_path, "a", seed=seed) for seed in (0, 1)] + [
        make_run(tmp_path, "b", seed=seed) for seed in (0, 1)
    ]
    compared = compare_runs(runs)
    report = build_report(load_paper("000"), runs_of(load_paper("000"), lettered), False)
    for html in (
        comparison_page(compared, compare_against(compared, "a", [])),
        reproduction_page(report, "gemma-2-mini"),
    ):
        rows = re.findall(r"<tr[^>]*>\s*(<\w+ scope=\"\w+\")", html)
        assert len(rows) == html.count("<tr") > html.count("<thead") == rows.count('<th scope="col"') > 1
        assert set(rows) == {'<th scope="col"', '<th scope="row"'}


@pytest.mark.parametrize("width", [400, 1300])
def test_nothing_but_tables_is_wider_than_the_window(tmp_path, opened, width):
    runs = [make_run(tmp_path, f"{'long-name-' * 8}{n}") for n in range(3)]
    write_page(tmp_path / "compare.html", comparison_page(compare_runs(runs)))
    paper = load_paper("000")
    found = build_report(paper, runs_of(paper, lettered), False)
    write_page(tmp_path / "report.html", reproduction_page(found, "gemma-2-mini"))
    for name in ("compare.html", "report.html"):
        page = opened(tmp_path / name, width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("figure.wide").count() == 1


def test_the_verdicts_of_a_paper_are_seen_without_scrolling_on_a_large_screen(tmp_path, opened):
    """A table with the longest cells in every column: numbers over three seeds, a long verdict, a note with a path."""
    report = build_report(load_paper("003"), [], False)
    row = replace(
        report.rows[2], measured="0.09144 ± 0.0011 and 0.08481 ± 0.0014", seeds=3,
        difference="+0.00663 (+0.00575 to +0.00751, 95%)", verdict="equivalent within the margin",
        notes=("see benchmarks/results/2026-11-29-decorrelation-scaling-of-the-penalty.md",),
    )  # fmt: skip
    claim = replace(row.claim, says="equal", unit="pp", margin=1.0)
    found = replace(report, rows=[*report.rows, row, replace(row, claim=claim)])
    write_page(tmp_path / "report.html", reproduction_page(found, "gemma-2-mini"))
    page = opened(tmp_path / "report.html", 1440)
    assert (
        page.evaluate("(e => e.scrollWidth - e.clientWidth)(document.querySelector('table.claims').parentElement)") == 0
    )


def test_a_contradiction_leads_to_its_claims(tmp_path, opened):
    paper = load_paper("002")
    write_page(tmp_path / "report.html", reproduction_page(build_report(paper, [], False), "gemma-2-mini"))
    page = opened(tmp_path / "report.html")
    named = next(one for one in paper.contradictions if one.claims).claims[0]
    page.locator(f'a[href="#{named}"]').first.click()
    assert page.locator(f"#{named}").is_visible()
