"""How large is a dashboard, and how soon is it there? `python benchmarks/bench_dashboard.py [--latents 1024,16384]`.

Pages of random SAEs on the embedded model's layer 12 and the text that a small cache of it holds out, opened by a headless
Chromium, each time in a fresh window. `ready`: from the beginning of the navigation until the table of latents is drawn,
by the page's own clock. `open`: until then by ours, with the start of the window. `a latent`: from a click on a link until
it is drawn, of latents in blocks that are not unpacked yet. Needs playwright and a Chromium on the PATH.
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
from sae.train.activations import TopK
from sae.train.sae import SAE, save_sae

LAYER, K = 12, 32


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def random_run(folder: Path, cache: Cache, latents: int) -> Path:
    """Random directions; its pre-activations have the spread of a trained SAE's, so most latents fire somewhere."""
    torch.manual_seed(0)
    rows_RD = torch.from_numpy(cache.read_chunk(f"layer_{LAYER}", 0).copy()).view(torch.bfloat16).float()
    sae = SAE(rows_RD.shape[1], latents, [TopK(K)])
    sae.b_dec.data = rows_RD.mean(0)
    scale_F = ((rows_RD - sae.b_dec) @ sae.W_enc).std(0).detach()
    sae.W_enc.data /= scale_F
    origin = {"model": cache.identity["model"], "layer": LAYER, "cache": str(cache.folder)}
    save_sae(sae, folder, {**origin, "fingerprint": cache.fingerprint})
    return folder


def made(found: InspectedRun, path: Path) -> tuple[float, float]:
    """Seconds of the processor and megabytes of memory, those of torch included, that the page takes to make."""
    started = Spent.now()
    with AnonymousPeak() as peak:
        write_page(path, dashboard_page(found, torch.arange(found.sae.d_sae), "", lambda done, total, note="": None))
    return Spent.since(started).processor, peak.mb


def opened(browser: Any, path: Path, latents: int, rounds: int) -> Iterator[tuple[float, float, float]]:
    """Milliseconds: ready, open, and a latent."""
    for number in range(rounds):
        started = time.perf_counter()
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(f"{path.as_uri()}#latents")
        page.wait_for_selector("html[data-ready]", state="attached")
        whole = 1e3 * (time.perf_counter() - started)
        ready = float(page.evaluate("document.documentElement.dataset.ready"))
        wanted = (number + 1) * latents // (rounds + 1)
        shown = page.evaluate(
            """(latent) => new Promise((resolve) => {
                const begun = performance.now(), article = document.getElementById("latent");
                new MutationObserver(() => resolve(performance.now() - begun)).observe(article, { childList: true });
                location.hash = `#latent-${latent}`;
            })""",
            wanted,
        )
        page.close()
        yield ready, whole, float(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=numbers, default=[1024, 16384])
    parser.add_argument("--tokens", type=int, default=100_000, help="held-out tokens that are read")
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    from playwright.sync_api import sync_playwright

    path = next(found for name in ("chromium", "google-chrome") if (found := shutil.which(name)))
    lines = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as running:
        os.environ["SAE_HOME"] = folder
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        request = HarvestConfig(model=mini.NAME, layers=(LAYER,), tokens=10 * asked.tokens)
        cache = run_harvest(plan_harvest(request))
        for latents in asked.latents:
            found = open_run(random_run(Path(folder) / "runs" / str(latents), cache, latents), asked.tokens)
            page = Path(folder) / f"{latents}.html"
            seconds, megabytes = made(found, page)
            times = [
                statistics.median(each) for each in zip(*opened(browser, page, latents, asked.rounds), strict=True)
            ]
            size = page.stat().st_size / 1e6
            shown = " | ".join(f"{each:.0f}" for each in times)
            lines.append(f"| {latents:,} | {found.tokens:,} | {seconds:.0f} | {megabytes:.0f} | {size:.2f} | {shown} |")
        browser_version = browser.version
    print(f"{machine('playwright')}; Chromium {browser_version}\n")
    print(
        "| latents | tokens | made in, processor s | memory of it, MB | file, MB | ready, ms | open, ms | a latent, ms |"
    )
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
