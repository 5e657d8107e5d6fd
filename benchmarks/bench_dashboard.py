"""Size of a dashboard and the time to open it: `python benchmarks/bench_dashboard.py [--latents 1024,16384]`.

The pages show random SAEs on the embedded model's layer 12, with the held-out text of a small cache. A headless
Chromium opens them, each time in a new window. `ready` is the time from the start of the navigation until the table of
latents is drawn, measured by the page. `open` is the time that this script measures until the same moment; it includes
the opening of the window. `a latent` is the time from a click on a link until the latent is drawn, for latents whose
data block in the page has not been unpacked before. The script needs playwright and a Chromium on the PATH.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from common import AnonymousPeak, Spent, machine
from sae.cache.reader import Cache
from sae.evaluate.latents.inspection import InspectedRun, open_run
from sae.evaluate.pages.dashboard import dashboard_page
from sae.evaluate.pages.page import write_page
from sae.harvest import mini
from sae.harvest.plan import HarvestConfig, plan_harvest
from sae.harvest.run import run_harvest
from sae.train.activation_functions import TopK
from sae.train.sae import SAE, save_sae

LAYER, K = 12, 32


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def random_run(folder: Path, cache: Cache, latents: int) -> Path:
    """The run of a random SAE, whose encoder is scaled so that most latents are active on some token."""
    torch.manual_seed(0)
    rows_RD = torch.from_numpy(cache.read_chunk(f"layer_{LAYER}", 0).copy()).view(torch.bfloat16).float()
    sae = SAE(rows_RD.shape[1], latents, [TopK(K)])
    sae.b_dec.data = rows_RD.mean(0)
    scale_F = ((rows_RD - sae.b_dec) @ sae.W_enc).std(0).detach()
    sae.W_enc.data /= scale_F
    origin = {"model": cache.identity["model"], "layer": LAYER, "cache": str(cache.folder)}
    save_sae(sae, folder, {**origin, "fingerprint": cache.fingerprint})
    return folder


def time_page(view: InspectedRun, path: Path) -> tuple[float, float]:
    """Processor seconds and megabytes of memory, including torch's, to make a page."""
    started = Spent.now()
    with AnonymousPeak() as peak:
        write_page(path, dashboard_page(view, torch.arange(view.sae.d_sae), "", lambda done, total, note="": None))
    return Spent.since(started).processor, peak.mb


def time_opening(browser: Any, path: Path, latents: int, rounds: int) -> Iterator[tuple[float, float, float]]:
    """Milliseconds until ready, until open, and to show a latent, for each round."""
    for number in range(rounds):
        started = time.perf_counter()
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(f"{path.as_uri()}#latents")
        page.wait_for_selector("html[data-ready]", state="attached")
        open_ms = 1e3 * (time.perf_counter() - started)
        ready = float(page.evaluate("document.documentElement.dataset.ready"))
        latent = (number + 1) * latents // (rounds + 1)
        latent_ms = page.evaluate(
            """(latent) => new Promise((resolve) => {
                const begun = performance.now(), article = document.getElementById("latent");
                new MutationObserver(() => resolve(performance.now() - begun)).observe(article, { childList: true });
                location.hash = `#latent-${latent}`;
            })""",
            latent,
        )
        page.close()
        yield ready, open_ms, float(latent_ms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=numbers, default=[1024, 16384])
    parser.add_argument("--tokens", type=int, default=100_000, help="held-out tokens to read")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    chromium = next(path for name in ("chromium", "google-chrome") if (path := shutil.which(name)))
    lines = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        os.environ["SAE_HOME"] = folder
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        config = HarvestConfig(model=mini.NAME, layers=(LAYER,), tokens=10 * args.tokens)
        cache = run_harvest(plan_harvest(config))
        for latents in args.latents:
            view = open_run(random_run(Path(folder) / "runs" / str(latents), cache, latents), args.tokens)
            page = Path(folder) / f"{latents}.html"
            seconds, megabytes = time_page(view, page)
            opened = time_opening(browser, page, latents, args.rounds)
            times = [statistics.median(column) for column in zip(*opened, strict=True)]
            size = page.stat().st_size / 1e6
            milliseconds = " | ".join(f"{time:.0f}" for time in times)
            cost = f"{seconds:.0f} | {megabytes:.0f} | {size:.2f}"
            lines.append(f"| {latents:,} | {view.tokens:,} | {cost} | {milliseconds} |")
        browser_version = browser.version
    print(f"{machine('playwright')}; Chromium {browser_version}\n")
    print("| latents | tokens | to make, CPU s | to make, MB | file, MB | ready, ms | open, ms | a latent, ms |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
