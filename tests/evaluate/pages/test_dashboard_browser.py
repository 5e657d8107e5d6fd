"""The page in a browser: search, sort, navigation, keys; any message on the console fails a test."""

from pathlib import Path

import pytest
import torch

from sae.evaluate.latents.inspection import open_run
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


@pytest.fixture(scope="module")
def file(tiny_cache, tmp_path_factory) -> Path:
    """Of an SAE of 400 latents, 350 of which are on it: number 0 is dead, 5 has a label, some tokens are hostile."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    torch.manual_seed(0)
    sae = SAE(32, 400, [TopK(4)])
    sae.b_enc.data[0] = -1e3
    origin = {"model": tiny_cache.identity["model"], "layer": 1, "cache": str(tiny_cache.folder)}
    save_sae(sae, folder, {**origin, "fingerprint": tiny_cache.fingerprint})
    found = open_run(folder, 400, "cpu")
    found.labels[5] = ["the zebra latent <b>", "</script><i>" + "z" * 300]
    text = found.token_text.text
    found.token_text.text = lambda token: HOSTILE.get(token % 20, text(token))  # type: ignore[method-assign]
    write_page(
        folder / "dashboard.html", dashboard_page(found, torch.arange(350), "today", lambda done, total, note="": None)
    )
    return folder / "dashboard.html"


@pytest.fixture
def page(opened, file):
    """The page, ready."""
    shown = opened(file)
    shown.wait_for_selector("html[data-ready]", state="attached")
    return shown


def latents(page) -> list[int]:
    """Those whose rows are drawn, from above."""
    return [int(text) for text in page.locator("#rows tr[data-place] td:first-child").all_inner_texts()]


def column(page, number: int) -> list[float]:
    cells = page.locator(f"#rows tr[data-place] td:nth-child({number})").all_inner_texts()
    return [float(cell.replace("%", "")) for cell in cells]


def shows(page, latent: int) -> None:
    page.get_by_role("heading", name=f"Latent {latent}", exact=True).wait_for()
    assert page.url.endswith(f"#latent-{latent}") and page.title().startswith(f"latent {latent} ")
    assert page.locator("#rows tr[aria-current] td").first.inner_text() == str(latent)


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
    assert latents(page)[0] == 34 and len(latents(page)) < 350  # the latent of that number first
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


@pytest.mark.parametrize(("head", "number"), [("density", 2), ("mean", 3), ("max", 4), ("latent", 1)])
def test_a_head_sorts_one_way_and_then_the_other(page, head, number):
    page.get_by_role("link", name="Latents (350)").click()
    page.locator("#which").select_option("alive")
    button = page.get_by_role("button", name=head, exact=True)
    seen, ends = [], []
    for _ in range(2):
        button.click()
        values = column(page, number)
        sort = page.locator(f"#rows th[data-key={head}]").get_attribute("aria-sort")
        assert values == sorted(values, reverse=sort == "descending")
        seen.append(sort)
        ends.append(values[0])
    assert set(seen) == {"ascending", "descending"} and ends[0] != ends[1]


def test_a_long_table_draws_what_is_seen(page):
    page.get_by_role("link", name="Latents (350)").click()
    page.get_by_role("button", name="latent", exact=True).click()
    assert len(latents(page)) < 100 and latents(page)[0] == 0
    page.locator("#rows").evaluate("box => box.scrollTop = box.scrollHeight")
    page.locator('#rows tr[data-place="349"]').wait_for()
    assert latents(page)[-1] == 349 and len(latents(page)) < 100
    page.locator("#rows tr[data-place]").last.locator("td").nth(2).click()  # anywhere on the row
    shows(page, 349)


def test_neighbours_lead_to_each_other_and_back(page, file):
    page.goto(f"{file.as_uri()}#latent-5")
    shows(page, 5)
    link = page.locator("#latent .lists a").first
    other = int(link.inner_text())
    link.click()
    shows(page, other)
    page.go_back()
    shows(page, 5)
    assert page.locator("#latent .passages li").count() >= 2
    shares = page.locator("#latent .fires").evaluate_all(
        "found => found.map(one => getComputedStyle(one).backgroundColor)"
    )
    assert len(set(shares)) > 1  # colored by how active they are


def test_keys(page):
    page.keyboard.press("/")
    page.locator("#search:focus").wait_for()
    page.keyboard.type("?j")  # in the search these are letters
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
    page.wait_for_url("**#latents")
    page.keyboard.press("Escape")
    page.locator("#view-run").wait_for()


@pytest.mark.parametrize(
    ("latent", "sentence"), [(380, "not on this page"), (400, "There is no latent 400"), (10**8, "There is no latent")]
)
def test_a_latent_that_is_not_there(page, file, latent, sentence):
    page.goto(f"{file.as_uri()}#latent-{latent}")
    page.locator("#latent p", has_text=sentence).wait_for()


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


@pytest.mark.parametrize("width", [360, 700, 1000, 1600])
def test_nothing_runs_out_of_the_window(page, file, width):
    page.set_viewport_size({"width": width, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.goto(f"{file.as_uri()}#latent-5")
    shows(page, 5)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_printed_latent_has_no_table_and_no_keys(page, file):
    page.goto(f"{file.as_uri()}#latent-5")
    shows(page, 5)
    page.emulate_media(media="print")
    assert page.locator("#latent h2").is_visible() and page.locator("#latent .passages").first.is_visible()
    assert not page.locator("#rows").is_visible() and not page.locator("nav").is_visible()
    page.emulate_media(media="screen")
    page.locator("#rows tr[aria-current]").wait_for()  # the table is drawn again, where it was


def test_without_the_script_the_run_is_there(browser, file):
    opened = browser.new_context(java_script_enabled=False).new_page()
    opened.goto(file.as_uri())
    assert opened.locator("#view-run").is_visible()
    assert "JavaScript, which is disabled" in opened.locator("noscript").inner_text()


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
