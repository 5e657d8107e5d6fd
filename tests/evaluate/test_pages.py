"""The frame of the pages and the charts in them."""

import base64
import hashlib
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.cache.errors import UsageError
from sae.evaluate.pages import charts
from sae.evaluate.pages.charts import Chart, Series, span, svg, ticks, written
from sae.evaluate.pages.page import as_json, page, visible, write_page


@given(st.text())
def test_nothing_hides_in_what_is_visible(text):
    import unicodedata

    assert not {unicodedata.category(c) for c in visible(text)} & {"Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp"}


def test_what_hides_is_shown_as_its_code_point():
    assert visible("a\nb\t\u202ec\x1b[31m\ud800") == "a↵b⇥⟨202E⟩c⟨001B⟩[31m⟨D800⟩"
    assert visible("naïve e\u0301 日本 🙂") == "naïve e\u0301 日本 🙂"


@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_json_in_a_page_reads_back_and_ends_no_script(value):
    text = as_json(value)
    assert "<" not in text
    assert json.loads(text) == value


def test_json_refuses_what_javascript_cannot_read():
    with pytest.raises(ValueError):
        as_json([float("nan")])


def test_the_policy_of_a_page_lets_nothing_in(tmp_path):
    html = page("frame.html", title="</title><script>alert(1)</script>", version="1", date="today")
    policy = re.search('Content-Security-Policy" content="([^"]*)"', html)[1]
    assert "default-src &#39;none&#39;" in policy and "script-src &#39;none&#39;" in policy
    assert "<script" not in html.lower()
    write_page(tmp_path / "page.html", html + "\ud800")
    assert "alert" in (tmp_path / "page.html").read_text()


def test_the_policy_names_the_one_script(monkeypatch, tmp_path):
    monkeypatch.setattr("sae.evaluate.pages.page.HERE", tmp_path)
    (tmp_path / "page.css").write_text("")
    (tmp_path / "one.js").write_text("let x = 1 < 2;\n")
    html = page("frame.html", "one.js", title="t", version="1", date="today")
    code = re.search("<script>(.*)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert f"sha256-{digest}" in html.replace("&#43;", "+").replace("&#x2b;", "+")
    assert "1 < 2" in code


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_inside(low, width):
    found = ticks(low, low + width)
    assert 2 <= len(found) <= 11
    assert all(low - 1e-6 * width <= value <= low + width * (1 + 1e-6) for value in found)
    steps = [b - a for a, b in zip(found, found[1:], strict=False)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(8, 200, [10, 20, 50, 100, 200]), (1e-5, 1, [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1]), (20, 50, [20, 30, 40, 50])],
)
def test_logarithmic_ticks(low, high, expected):
    assert ticks(low, high, log=True, about=4) == pytest.approx(expected)


def test_axes_hold_what_they_show():
    assert span([], log=False) == (0, 1)
    low, high = span([3, 3], log=False)
    assert low < 3 < high
    low, high = span([0, 2, float("nan"), 8], log=True)
    assert 0 < low < 2 and high > 8
    assert [written(v) for v in (1e-5, 0.25, 2000, 25_000, 2e6)] == ["1e-05", "0.25", "2000", "25k", "2M"]


CHART = Chart("t <b>", "L0", "y & z", [
    Series("one\u202e", [8, 16, 32], [0.1, 0.2, 0.4], "both", spread=[0.1, 0, 0.1], labels=["<i>", "b", "c"]),
    Series("two", [8, float("nan"), -1], [0.1, 0.3, 0.2]),
], x_log=True)  # fmt: skip


def test_a_chart_is_xml_with_a_mark_at_every_point():
    root = ElementTree.fromstring(svg(CHART))
    titles = [element.text for element in root.iter() if element.tag.endswith("title")]
    assert titles == ["one⟨202E⟩", "<i>", "b", "c", "two: 8, 0.1"]  # neither a number that is none, nor a log of -1


def test_points_stand_where_their_numbers_say():
    root = ElementTree.fromstring(svg(CHART))
    at = [e.get("transform") for e in root.iter() if e.get("transform", "").startswith("translate(") and list(e)]
    x = [float(re.match(r"translate\(([\d.]+) ", place)[1]) for place in at if "rotate" not in place][:3]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)  # 8, 16, 32 on a logarithmic axis


def test_an_empty_chart_says_so():
    assert "nothing measured" in svg(Chart("t", "x", "y", []))
    assert "nothing measured" not in svg(CHART)


def test_64_series_differ_in_colour_or_shape():
    looks = {(n % len(charts.COLOURS), charts.marker_of(n)) for n in range(64)}
    assert len(looks) == 64


@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_a_chart_for_a_paper(tmp_path, ending):
    pytest.importorskip("matplotlib")
    charts.save(CHART, tmp_path / f"chart.{ending}")
    assert (tmp_path / f"chart.{ending}").stat().st_size > 1000


def test_an_ending_that_no_chart_has(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match=".xyz"):
        charts.save(CHART, tmp_path / "chart.xyz")
