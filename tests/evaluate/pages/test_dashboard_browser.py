"""The dashboard in a browser: search, sorting, navigation, keys and touch. Any console message fails a test.

Only the search test runs by default, because each page takes more than a second of CPU time.
"""

import json
from pathlib import Path

import pytest
import torch

from sae.evaluate.charts import MAX_LINE_POINTS
from sae.evaluate.latents.inspection import open_run
from sae.evaluate.latents.passages import PassageWindow
from sae.evaluate.pages.dashboard import dashboard_page
from sae.evaluate.pages.page import write_page
from sae.train.activation_functions import TopK
from sae.train.sae import SAE, save_sae

HOSTILE = {
    7: "</script><script>document.title = 1</script>",
    11: "\u202egnp",
    13: "<img src=x onerror=alert(1)>",
    17: " " * 300,
}


PASSAGE = 16  # tokens


def make_run(cache, folder: Path, latents: int) -> Path:
    """A random SAE whose first latent never fires."""
    torch.manual_seed(0)
    sae = SAE(32, latents, [TopK(4)])
    sae.b_enc.data[0] = -1e3
    origin = {"model": cache.identity["model"], "layer": 1, "cache": str(cache.folder)}
    save_sae(sae, folder, {**origin, "fingerprint": cache.fingerprint})
    return folder


def make_page(found, latents: int) -> str:
    return dashboard_page(
        found, torch.arange(latents), "today", lambda done, total, note="": None, PassageWindow.of(PASSAGE)
    )


@pytest.fixture(scope="module")
def file(tiny_cache, tmp_path_factory) -> Path:
    """The page of an SAE with 400 latents, of which it shows 350. Latent 0 is dead, latent 5 has a label.

    Some tokens contain HTML, a right-to-left override or 300 spaces.
    """
    folder = make_run(tiny_cache, tmp_path_factory.mktemp("runs") / "one", 400)
    found = open_run(folder, 400, "cpu")
    found.labels[5] = ["the zebra latent <b>", "</script><i>" + "z" * 300]
    text = found.token_text.text
    found.token_text.text = lambda token: HOSTILE.get(token % 20, text(token))  # type: ignore[method-assign]
    write_page(folder / "dashboard.html", make_page(found, 350))
    return folder / "dashboard.html"


@pytest.fixture(scope="module")
def unlabeled(tiny_cache, tmp_path_factory) -> Path:
    """The page of an SAE with 60 latents and no labels; its run logged 2,000 lines and was not evaluated."""
    folder = make_run(tiny_cache, tmp_path_factory.mktemp("runs") / ("a-long-name-" * 6), 60)
    lines = [
        {"step": n, "tokens": 50 * n, "loss": 1 / n, "l0": 4.0, "explained_variance": 1 - 1 / n} for n in range(1, 2001)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    write_page(folder / "dashboard.html", make_page(open_run(folder, 400, "cpu"), 60))
    return folder / "dashboard.html"


@pytest.fixture
def page(opened, file):
    """The page after its script has run."""
    shown = opened(file)
    shown.wait_for_selector("html[data-ready]", state="attached")
    return shown


def latents(page) -> list[int]:
    """The latents whose rows are drawn, from top to bottom."""
    return [int(text) for text in page.locator("#rows tr[data-place] th[scope=row]").all_inner_texts()]


def column(page, number: int) -> list[float]:
    cells = page.locator(f"#rows tr[data-place] > :nth-child({number})").all_inner_texts()
    return [float(cell.replace("%", "")) for cell in cells]


def shows(page, latent: int) -> None:
    page.get_by_role("heading", name=f"Latent {latent}", exact=True).wait_for()
    assert page.url.endswith(f"#latent-{latent}") and page.title().startswith(f"latent {latent} ")
    assert page.locator("#rows tr[aria-current] th").first.inner_text() == str(latent)


@pytest.mark.slow
def test_the_run_comes_first_and_its_dead_latents_lead_on(page):
    assert page.locator("#view-run").is_visible() and not page.locator("#view-latents").is_visible()
    page.get_by_text("Dead latents").click()
    page.locator('#view-run a[href="#latent-0"]').click()
    shows(page, 0)
    assert "does not fire on any" in page.locator("#latent").inner_text()


def test_search_finds_numbers_tokens_and_labels(page):
    page.get_by_role("link", name="Latents (350)").click()
    search = page.locator("#search")
    search.fill("34")
    assert latents(page)[0] == 34 and len(latents(page)) < 350  # latent 34 comes first
    search.fill("ZEBRA lat")
    assert latents(page) == [5] and page.locator("#found").inner_text() == "1 of 350"
    search.press("Enter")
    shows(page, 5)
    assert "the zebra latent <b>; </script><i>zzz" in page.locator("#latent .label").inner_text()
    search.fill("no latent has this")
    assert "No latent matches." in page.locator("#rows").inner_text()
    search.press("Escape")
    assert search.input_value() == "" and page.locator("#found").inner_text() == "350 of 350"
    page.locator("#which").select_option("labeled")
    assert latents(page) == [5]
    page.locator("#which").select_option("dead")
    assert 0 in latents(page) and set(column(page, 2)) == {0.0}


@pytest.mark.slow
def test_a_head_sorts_one_way_and_then_the_other(page):
    page.get_by_role("link", name="Latents (350)").click()
    page.locator("#which").select_option("alive")
    for head, number in (("density", 2), ("mean", 3), ("max", 4), ("latent", 1)):
        button = page.get_by_role("button", name=head, exact=True)
        seen, ends = [], []
        for _ in range(2):
            button.click()
            values = column(page, number)
            sort = page.locator(f"#rows thead th[data-key={head}]").get_attribute("aria-sort")
            assert values == sorted(values, reverse=sort == "descending"), head
            seen.append(sort)
            ends.append(values[0])
        assert set(seen) == {"ascending", "descending"} and ends[0] != ends[1], head


@pytest.mark.slow
def test_a_long_table_draws_what_is_seen(page):
    page.get_by_role("link", name="Latents (350)").click()
    page.get_by_role("button", name="latent", exact=True).click()
    assert len(latents(page)) < 100 and latents(page)[0] == 0
    page.locator("#rows").evaluate("box => box.scrollTop = box.scrollHeight")
    page.locator('#rows tr[data-place="349"]').wait_for()
    assert latents(page)[-1] == 349 and len(latents(page)) < 100
    page.locator("#rows tr[data-place]").last.locator("td").nth(1).click()  # anywhere on the row
    shows(page, 349)


@pytest.mark.slow
def test_neighbours_lead_to_each_other_and_back(page, file):
    page.goto(f"{file.as_uri()}#latent-5")
    shows(page, 5)
    link = page.locator("#latent .lists th[scope=row] a").first
    other = int(link.inner_text())
    link.click()
    shows(page, other)
    page.go_back()
    shows(page, 5)
    assert page.locator("#latent .passages li").count() >= 2
    shares = page.locator("#latent .fires").evaluate_all(
        "found => found.map(one => getComputedStyle(one).backgroundColor)"
    )
    assert len(set(shares)) > 1  # tokens are colored by activation


@pytest.mark.slow
def test_keys(page):
    page.keyboard.press("/")
    page.locator("#search:focus").wait_for()
    page.keyboard.type("?j")  # in the search field they are typed, not shortcuts
    assert page.locator("#search").input_value() == "?j"
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    first, second, third = latents(page)[:3]
    for key, latent in [
        ("j", first),
        ("j", second),
        ("ArrowDown", third),
        ("k", second),
        ("ArrowUp", first),
        ("k", first),
    ]:
        page.keyboard.press(key)
        shows(page, latent)
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    page.wait_for_function("location.hash === '#latents'")
    page.keyboard.press("Escape")
    page.locator("#view-run").wait_for()


@pytest.mark.slow
def test_a_latent_that_is_not_there(page, file):
    for latent, sentence in (
        (380, "Latent 380 is not on this page"), (400, "There is no latent 400"), (10**8, "There is no latent 100"),
    ):  # fmt: skip
        page.goto(f"{file.as_uri()}#latent-{latent}")
        page.locator("#latent p", has_text=sentence).wait_for()


@pytest.mark.slow
def test_hostile_tokens_are_texts(page, file):
    page.goto(f"{file.as_uri()}#latents")
    shown = []
    for latent in latents(page)[:12]:
        page.goto(f"{file.as_uri()}#latent-{latent}")
        shows(page, latent)
        shown.append(page.locator("#latent").text_content())
    text = "".join(shown)
    assert "</script><script>" in text and "⟨202E⟩gnp" in text and "<img src=x" in text and "·×300" in text
    assert "\u202e" not in text and page.locator("img").count() == 0
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 0


def heads(page) -> list[str]:
    return page.locator("#rows th button").all_inner_texts()


@pytest.mark.slow
def test_a_column_without_a_value_has_no_head_and_takes_no_room(page, opened, unlabeled):
    page.get_by_role("link", name="Latents (350)").click()
    assert heads(page) == ["latent", "density", "mean", "max", "top tokens", "label"]
    plain = opened(unlabeled)
    plain.wait_for_selector("html[data-ready]", state="attached")
    plain.get_by_role("link", name="Latents (60)").click()
    assert heads(plain) == ["latent", "density", "mean", "max", "top tokens"]
    assert plain.locator("#rows tr[data-place] >> nth=0 >> td").count() == 4
    assert plain.locator("#which option").all_inner_texts() == ["all", "alive", "dead"]
    assert plain.locator("#search").get_attribute("placeholder") == "token or number"
    box, last = plain.locator("#rows").bounding_box(), plain.locator("#rows thead th").last.bounding_box()
    assert last["x"] + last["width"] > box["x"] + box["width"] - 20  # the last column reaches the edge


def tokens_of(line) -> list[str]:
    return line.locator("span").all_text_contents()


@pytest.mark.slow
def test_a_passage_has_the_asked_number_of_tokens_and_more_shows_the_whole_context(page, file):
    """The central token does not move on the screen."""
    page.goto(f"{file.as_uri()}#latent-5")
    shows(page, 5)
    first = page.locator("#latent .passages li").first
    line, button = first.locator("p"), first.get_by_role("button", name="more")
    passage, place = tokens_of(line), first.locator(".chosen").bounding_box()
    assert len(passage) == PASSAGE and button.get_attribute("aria-expanded") == "false"
    button.click()
    whole = tokens_of(line)
    assert len(whole) == 32 and "".join(passage) in "".join(whole)
    assert page.locator("#latent .passages li >> nth=1 >> p >> span").count() == PASSAGE  # other passages do not change
    assert line.locator(".chosen").count() == 1 and abs(first.locator(".chosen").bounding_box()["y"] - place["y"]) < 2
    assert line.locator(".dim").count() >= 32 - PASSAGE  # the page has no activations of these tokens
    less = first.get_by_role("button", name="less")
    assert less.get_attribute("aria-expanded") == "true"
    less.press("Enter")
    assert tokens_of(line) == passage


@pytest.mark.slow
def test_a_long_curve_has_enough_points_and_not_too_many(page, opened, unlabeled):
    """The run has 100,000 steps and logged every 50th."""
    plain = opened(unlabeled)
    paths = plain.locator("#view-run svg.chart[aria-label^='loss'] g path").evaluate_all(
        "found => found.map(one => one.getAttribute('d').split('L').length)"
    )
    assert len(paths) == 1 and 100 <= paths[0] <= MAX_LINE_POINTS
    assert plain.locator("#view-run svg.chart[aria-label^='loss'] text", has_text="tokens").count() == 1


@pytest.fixture
def phone(opened, unlabeled):
    shown = opened(unlabeled, 390, phone=True)
    shown.wait_for_selector("html[data-ready]", state="attached")
    return shown


@pytest.mark.slow
def test_on_a_phone_nothing_scrolls_sideways(phone):
    for view in ("#run", "#latents", "#latent-5"):
        phone.goto(phone.url.split("#")[0] + view)
        phone.wait_for_function("view => location.hash === view", arg=view)
        assert phone.evaluate("document.documentElement.scrollWidth") == 390
        assert phone.evaluate("innerWidth") == 390  # the browser did not zoom out to fit a wider element
        assert phone.locator("#rows").evaluate("box => box.scrollWidth <= box.clientWidth")
    for button in phone.locator("#latent button.more").all():
        button.tap()
    assert phone.evaluate("document.documentElement.scrollWidth") == 390


@pytest.mark.slow
def test_on_a_phone_everything_is_large_enough_for_a_finger(phone):
    phone.locator("nav a", has_text="Latents").tap()
    phone.locator("#rows tr[data-place]").nth(2).tap()
    phone.locator("#latent .passages li").first.wait_for()
    sizes = phone.locator("button, select, input, nav a, #rows th a, .lists th a").evaluate_all(
        """found => found.filter(one => one.offsetWidth > 0 && !one.closest("dialog"))
            .map(one => [one.textContent, one.getBoundingClientRect()])
            .map(([text, box]) => [text, box.width, box.height])"""
    )
    assert len(sizes) > 20
    assert [one for one in sizes if min(one[1:]) < 43.5] == []
    text = phone.locator(".passage").first.evaluate("line => parseFloat(getComputedStyle(line).fontSize)")
    phone.locator("nav a", has_text="Run").tap()
    phone.locator("svg.chart text").first.wait_for()
    heights = "found => found.map(one => one.getBoundingClientRect().height)"
    labels = phone.locator("svg.chart text").evaluate_all(heights)
    assert text >= 13 and min(labels) >= 9  # pixels


@pytest.mark.slow
def test_on_a_phone_a_chosen_latent_comes_into_view_and_buttons_lead_on(phone):
    phone.locator("nav a", has_text="Latents").tap()
    first, second = latents(phone)[:2]
    phone.locator("#rows tr[data-place]").first.locator("td").nth(0).tap()
    shows(phone, first)
    phone.wait_for_function("document.querySelector('#latent h2').getBoundingClientRect().top < innerHeight / 2")
    phone.get_by_role("button", name="Next latent").tap()
    shows(phone, second)
    phone.get_by_role("button", name="Previous latent").tap()
    shows(phone, first)


@pytest.mark.slow
def test_nothing_runs_out_of_the_window(page, file):
    for width in (360, 700, 1000, 1600):
        page.set_viewport_size({"width": width, "height": 700})
        page.goto(f"{file.as_uri()}#run")
        page.locator("#view-run").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.goto(f"{file.as_uri()}#latent-5")
        shows(page, 5)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_a_screen_reader_learns_the_size_of_the_table_and_the_place_of_a_row(page, file):
    page.goto(f"{file.as_uri()}#latents")
    rows = page.locator("#rows tr[data-place]")
    rows.first.wait_for()
    assert rows.first.get_attribute("aria-rowindex") == "2"
    found = int(page.locator("#found").inner_text().split()[0].replace(",", ""))
    assert page.get_by_role("region", name="Table of latents").locator("table").get_attribute("aria-rowcount") == str(
        found + 1
    )


@pytest.mark.slow
def test_a_printed_latent_has_no_table_and_no_keys(page, file):
    page.goto(f"{file.as_uri()}#latent-5")
    shows(page, 5)
    page.emulate_media(media="print")
    assert page.locator("#latent h2").is_visible() and page.locator("#latent .passages").first.is_visible()
    assert not page.locator("#rows").is_visible() and not page.locator("nav").is_visible()
    page.emulate_media(media="screen")
    page.locator("#rows tr[aria-current]").wait_for()  # the table is drawn again at the same position


@pytest.mark.slow
def test_without_the_script_the_run_is_there(browser, file):
    opened = browser.new_context(java_script_enabled=False).new_page()
    opened.goto(file.as_uri())
    assert opened.locator("#view-run").is_visible()
    assert "because JavaScript is disabled" in opened.locator("noscript").inner_text()


@pytest.mark.slow
def test_the_policy_stops_a_script_that_is_not_the_page_s(browser, file):
    opened = browser.new_page()
    opened.goto(file.as_uri())
    found = opened.evaluate(
        """() => new Promise((resolve) => {
            document.addEventListener("securitypolicyviolation", (event) => resolve(event.violatedDirective),
                { once: true });
            document.body.append(Object.assign(
                document.createElement("script"), { textContent: "window.broken = true" }));
            setTimeout(() => resolve("nothing was stopped"), 5000);
        })"""
    )
    assert found.startswith("script-src") and opened.evaluate("window.broken") is None
    opened.close()
