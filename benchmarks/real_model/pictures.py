"""Pictures for the README, from the results of run.py: one latent in the dashboard, and the comparison of the runs.

    python benchmarks/real_model/pictures.py [--folder FOLDER] [--latent N] [--out docs]

Passages in a picture come only from texts whose licence allows showing them (`show` in packages.py): a latent is
refused if any of its passages comes from another text. Without --latent, the latents that may be shown are listed and
the first is used. Needs playwright, a Chromium on the PATH, and the finished results of run.py.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from dashboards import latent_entries, passages, unpack
from forward_hooks import PlainCache
from make_model import TEXT, default_folder
from packages import TEXTS

WIDTH, HEIGHT = 1280, {"dashboard": 860, "compare": 1060}
LISTED = 40
SHOWN = {package.name: package.show for package in TEXTS if package.show}


def source_of_contexts(cache: PlainCache, text: Path) -> list[str]:
    """The package that each held-out context comes from. A document's number is the number of its line."""
    sources = [json.loads(line)["source"] for line in text.read_text().split("\n") if line]
    return [sources[number] for number in cache.held_out().document]


def showable_latents(page: str, sources: list[str]) -> dict[int, set[str]]:
    """Latents all of whose passages come from texts that may be shown, with those texts; latents with the most passages
    come first."""
    found = []
    for latent, entry in zip(unpack(page, "table")["latent"], latent_entries(page), strict=True):
        shown = passages(entry)
        used = {sources[context] for context, _ in shown}
        if shown and used <= set(SHOWN):
            found.append((-len(shown), latent, used))
    return {latent: used for _, latent, used in sorted(found, key=lambda one: one[:2])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=default_folder())
    parser.add_argument("--arm", default="standing")
    parser.add_argument("--latent", type=int)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2] / "docs" / "images")
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    home = args.folder / args.arm
    dashboard = next(home.glob("runs/topk-*/dashboard.html"))
    page = dashboard.read_text()
    (manifest,) = home.glob("activations/*/manifest.json")
    allowed = showable_latents(page, source_of_contexts(PlainCache(manifest.parent), args.folder / TEXT))
    table = unpack(page, "table")
    words = unpack(page, "words")
    for latent in list(allowed)[:LISTED]:
        place = table["latent"].index(latent)
        tokens = " ".join(repr(words[token]) for token in table["tokens"][place])
        print(f"latent {latent:5} density {table['density'][place]:.2e}  {tokens}")
    if not allowed or args.latent not in (None, *allowed):
        sys.exit(
            f"Latent {args.latent} has passages from texts that may not be shown. Choose one of the latents listed."
        )
    latent = next(iter(allowed)) if args.latent is None else args.latent
    chromium = next(path for name in ("chromium", "google-chrome") if (path := shutil.which(name)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for name, target in (
            ("dashboard", f"{dashboard.as_uri()}#latent-{latent}"),
            ("compare", (home / "compare.html").as_uri()),
        ):
            tab = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT[name]})
            tab.goto(target)
            if name == "dashboard":
                tab.wait_for_selector("html[data-ready]", state="attached")
            tab.wait_for_timeout(500)
            tab.screenshot(path=args.out / f"{name}.png")
            print(f"{args.out / name}.png  {(args.out / f'{name}.png').stat().st_size / 1e3:.0f} kB")
        browser.close()
    print("latent", latent, "; its passages:", "; ".join(SHOWN[source] for source in sorted(allowed[latent])))


if __name__ == "__main__":
    main()
