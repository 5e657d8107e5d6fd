"""The common frame of the pages, and their charts."""

import base64
import hashlib
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae.common.errors import UsageError
from sae.evaluate import charts
from sae.evaluate.charts import MAX_LINE_POINTS, Chart, Series, axis_range, thin_out, tick_label, ticks
from sae.evaluate.pages.page import as_json, render_page, templates, write_page
from sae.evaluate.pages.plots import save_chart
from sae.evaluate.pages.svg import draw_svg, shared_legend


def test_no_value_of_a_template_can_hide():
    html = (
        templates()
        .from_string("{{ name }} {{ path }} {{ 'own' | safe }} {{ number }}")
        .render(name="a\u202e<b>\x1b[31m", path=Path("b\udcff"), number=-5)
    )
    assert html == "a⟨202E⟩&lt;b&gt;⟨001B⟩[31m b\ufffd own -5"


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
    html = render_page("frame.html", title="</title><script>alert(1)</script>", version="1", date="today")
    policy = re.search('Content-Security-Policy" content="([^"]*)"', html)[1]
    assert "default-src &#39;none&#39;" in policy and "script-src &#39;none&#39;" in policy
    assert "<script" not in html.lower()
    write_page(tmp_path / "page.html", html + "\ud800")
    assert "alert" in (tmp_path / "page.html").read_text()


def test_the_policy_names_the_one_script(monkeypatch, tmp_path):
    monkeypatch.setattr("sae.evaluate.pages.page.HERE", tmp_path)
    (tmp_path / "page.css").write_text("")
    (tmp_path / "one.js").write_text("let x = 1 < 2;\n")
    html = render_page("frame.html", ["one.js"], title="t", version="1", date="today")
    code = re.search("<script>(.*)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert f"sha256-{digest}" in html.replace("&#43;", "+").replace("&#x2b;", "+")
    assert "1 < 2" in code


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_inside(low, width):
    found = ticks(low, low + width)
    assert 3 <= len(found) <= 11
    assert all(low - 1e-6 * width <= value <= low + width * (1 + 1e-6) for value in found)
    steps = [b - a for a, b in zip(found, found[1:], strict=False)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-6)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(8, 200, [10, 20, 50, 100, 200]), (1e-5, 1, [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1]), (20, 50, [20, 30, 40, 50])],
)
def test_logarithmic_ticks(low, high, expected):
    assert ticks(low, high, log=True, about=4) == pytest.approx(expected)


def test_a_range_of_few_round_numbers_has_three_ticks_or_more():
    assert ticks(29, 140, log=True, about=4) == [40, 60, 80, 100, 120, 140]


def line(points: int, **more) -> Series:
    return Series("one", range(points), [(-1) ** n * n for n in range(points)], "line", **more)


@pytest.mark.parametrize("points", [1, 100, MAX_LINE_POINTS, MAX_LINE_POINTS + 1, 2000, 20_000])
def test_a_long_line_is_drawn_by_few_points_between_its_ends(points):
    whole = line(points)
    found = thin_out(whole)
    assert min(points, 100) <= len(found.x) <= MAX_LINE_POINTS
    assert (found.x[0], found.x[-1]) == (0, points - 1) and list(found.x) == sorted(set(found.x))
    assert [whole.y[x] for x in found.x] == list(found.y)
    assert (min(found.y), max(found.y)) == (min(whole.y), max(whole.y))
    assert draw_svg(Chart("t", "x", "y", [whole])) == draw_svg(Chart("t", "x", "y", [found]))


@given(st.integers(0, 4999))
def test_a_spike_of_one_point_is_drawn(place):
    y = [0.0] * 5000
    y[place] = 1.0
    found = thin_out(Series("one", range(5000), y, "line", spread=[float(n) for n in range(5000)]))
    assert (place, 1.0) in zip(found.x, found.y, strict=True)
    assert list(found.spread) == [float(x) for x in found.x]


def test_numbers_that_are_none_do_not_hide_the_others():
    y = [float("nan")] * 3000
    y[1234] = 2.0
    found = thin_out(Series("one", range(3000), y, "line"))
    assert (1234, 2.0) in zip(found.x, found.y, strict=True)


def test_points_are_not_left_out():
    points = Series("one", range(1000), range(1000), "points")
    assert thin_out(points) is points


def test_axes_hold_what_they_show():
    assert axis_range([], log=False) == (0, 1)
    low, high = axis_range([3, 3], log=False)
    assert low < 3 < high
    low, high = axis_range([0, 2, float("nan"), 8], log=True)
    assert 0 < low < 2 and high > 8
    assert [tick_label(v) for v in (1e-5, 0.25, 2000, 25_000, 2e6)] == ["1e-05", "0.25", "2000", "25k", "2M"]


CHART = Chart("t <b>", "L0", "y & z", [
    Series("one\u202e", [8, 16, 32], [0.1, 0.2, 0.4], "both", spread=[0.1, 0, 0.1], labels=["<i>", "b", "c"]),
    Series("two", [8, float("nan"), -1], [0.1, 0.3, 0.2]),
], x_log=True)  # fmt: skip


def test_a_chart_is_xml_with_a_mark_at_every_point():
    root = ElementTree.fromstring(draw_svg(CHART))
    titles = [element.text for element in root.iter() if element.tag.endswith("title")]
    assert titles == ["one⟨202E⟩", "<i>", "b", "c", "two: 8, 0.1"]  # no mark at NaN or at log(-1)


def test_points_stand_where_their_numbers_say():
    root = ElementTree.fromstring(draw_svg(CHART))
    at = [e.get("transform") for e in root.iter() if e.get("transform", "").startswith("translate(") and list(e)]
    x = [float(re.match(r"translate\(([\d.]+) ", place)[1]) for place in at if "rotate" not in place][:3]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)  # 8, 16, 32 on a logarithmic axis


def test_an_empty_chart_says_so():
    assert "nothing measured" in draw_svg(Chart("t", "x", "y", []))
    assert "nothing measured" not in draw_svg(CHART)


def root_of(chart):
    return ElementTree.fromstring(draw_svg(chart))


def test_the_band_of_a_line_goes_through_mean_plus_and_minus_sd():
    line = Series("one", [0, 10], [2.0, 4.0], "line", spread=[2.0, 1.0])
    (band,) = [e.get("d") for e in root_of(Chart("t", "x", "y", [line])).iter() if e.get("fill-opacity")]
    # y spans 0 to 5 with margins of 0.3, on the 304 pixels from 314 up to 10; x spans -0.6 to 10.6, on 544 from 64.
    y = {value: 314 - (value + 0.3) / 5.6 * 304 for value in (4, 5, 3, 0)}
    left, right = 64 + 0.6 / 11.2 * 544, 64 + 10.6 / 11.2 * 544
    expected = [left, y[4], right, y[5], right, y[3], left, y[0]]
    assert [float(n) for n in re.findall(r"[\d.]+", band)] == pytest.approx(expected, abs=0.06)
    assert band.startswith("M") and band.endswith("Z")


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    ("y", "spread"),
    [
        ([1e308, -1e308], [0, 0]), ([5e-324, 5e-324], [0, 0]), ([5e-324, 1.0], [0, 0]), ([1e-300, 1e300], [1e308, 0]),
        ([float("inf"), float("nan")], [1, 1]), ([1.0, 2.0], [float("nan"), float("inf")]),
    ],
)  # fmt: skip
def test_numbers_that_no_axis_holds_are_left_out(y, spread, log):
    drawn = draw_svg(Chart("t", "x", "y", [Series("one", [0, 1], y, "line", spread=spread)], y_log=log))
    assert not re.search("nan|inf|None", drawn)


def test_a_line_without_spread_has_no_band():
    chart = Chart("t", "x", "y", [Series("one", [0, 1], [0, 1], "line"), Series("two", [0, 1], [0, 1], "line", [0, 0])])
    assert "fill-opacity" not in draw_svg(chart)


def test_the_band_of_a_logarithmic_axis_ends_at_its_foot():
    line = Series("one", [0, 1], [1.0, 10.0], "line", spread=[2.0, 1.0])
    (band,) = [e.get("d") for e in root_of(Chart("t", "x", "y", [line], y_log=True)).iter() if e.get("fill-opacity")]
    assert band.split("L")[-1].split() == [band.split(" ")[0][1:], "314Z"]


def places(root, name):
    """The x coordinates of the marks whose titles begin with `name`."""
    marks = [e for e in root.iter() if any((t.text or "").startswith(f"{name}:") for t in e)]
    return [float(re.match(r"translate\(([\d.]+) ", e.get("transform"))[1]) for e in marks]


def ticks_of(root, names):
    return {
        e.text: float(e.get("x") or re.search(r"[\d.]+", e.get("transform"))[0]) for e in root.iter() if e.text in names
    }


def test_a_point_alone_in_its_category_stands_at_its_tick():
    names = ("a", "b", "c")
    root = root_of(Chart("t", "", "y", [Series("one", [0, 2], [1, 2]), Series("two", [1], [3])], categories=names))
    at = ticks_of(root, names)
    assert [at[n] for n in names] == pytest.approx([64 + (n + 0.5) * 544 / 3 for n in range(3)], abs=0.06)
    assert places(root, "one") == [at["a"], at["c"]] and places(root, "two") == [at["b"]]


@given(st.integers(2, 12))
def test_points_of_one_category_stand_apart_and_around_its_middle(series):
    chart = Chart("t", "", "y", [Series(f"s{n}", [0, 1], [1, 1]) for n in range(series)], categories=("a", "b"))
    for place in (0, 1):
        x = [chart.dodged(one)[place] for one in chart.series]
        assert sum(x) / series == pytest.approx(place)
        assert min(b - a for a, b in zip(x, x[1:], strict=False)) > 0.06
        assert max(x) - min(x) <= 0.8


def test_names_too_long_for_their_places_are_slanted_and_not_cut_off():
    names = [f"hierarchical-no-freeze-{n}" for n in range(10)]
    root = root_of(Chart("t", "", "y", [Series("one", range(10), range(10))], categories=names))
    labels = [e for e in root.iter() if e.text in names]
    assert len(labels) == 10
    _, _, width, height = map(float, root.get("viewBox").split())
    reach = charts.CHARACTER_WIDTH * len(names[0]) / 2**0.5
    for label in labels:
        x, y = map(float, re.match(r"translate\(([\d.]+) ([\d.]+)\) rotate\(-45\)", label.get("transform")).groups())
        assert 0 <= x - reach and x <= width and y + reach <= height
    plain = root_of(Chart("t", "", "y", [Series("one", [0, 1], [0, 1])], categories=("a", "b")))
    assert not [e for e in plain.iter() if "-45" in e.get("transform", "")]


def test_what_pointing_tells_names_the_category():
    assert "one: b, 2 ± 0.5" in draw_svg(
        Chart("t", "", "y", [Series("one", [1], [2], spread=[0.5])], categories=("a", "b"))
    )


def test_long_labels_have_room():
    chart = Chart("t", "x", "y", [Series("one", [0, 1], [0.99985, 0.99995])])
    ends = [float(e.get("x")) for e in root_of(chart).iter() if e.get("text-anchor") == "end"]
    assert min(ends) - charts.CHARACTER_WIDTH * len("0.99995") > 18  # right of the axis' title


def test_ticks_that_differ_read_differently():
    assert charts.tick_labels([0.99985, 0.9999, 0.99995]) == ["0.99985", "0.9999", "0.99995"]
    assert charts.tick_labels([0.25, 0.5]) == ["0.25", "0.5"]


def test_the_key_of_charts_is_in_the_order_of_looks():
    first = Chart("t", "x", "y", [Series("c", [1], [1], "line", style=2)])
    second = Chart("t", "x", "y", [Series(n, [1], [1], style=look) for look, n in enumerate("abc")])
    assert re.findall(r"</svg>(\w+)", shared_legend([first, second])) == ["a", "b", "c"]


def test_64_series_differ_in_color_or_shape():
    looks = {(n % len(charts.COLORS), charts.marker_of(n)) for n in range(64)}
    assert len(looks) == 64


@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_a_chart_for_a_paper(tmp_path, ending):
    pytest.importorskip("matplotlib")
    save_chart(CHART, tmp_path / f"chart.{ending}")
    assert (tmp_path / f"chart.{ending}").stat().st_size > 1000


def test_a_band_and_names_on_paper(tmp_path):
    pytest.importorskip("matplotlib")
    names = ["a name too long for its place", "b", "c"]
    series = [
        Series("one", [0, 1, 2], [1, 2, 3], "line", spread=[1, 0, 1]),
        Series("two", [0, 1], [1, 2], spread=[1, 1]),
    ]
    save_chart(Chart("t", "", "y", series, categories=names), tmp_path / "chart.svg")
    drawn = (tmp_path / "chart.svg").read_text()
    assert all(name in drawn for name in names) and "rotate(-45 " in drawn
    assert "FillBetween" in drawn


def test_an_ending_that_no_chart_has(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match=".xyz"):
        save_chart(CHART, tmp_path / "chart.xyz")
