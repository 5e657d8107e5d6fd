"""Reads what a finished dashboard.html shows."""

import base64
import gzip
import json
import re
from collections.abc import Iterator
from typing import Any


def unpack(page: str, name: str) -> Any:
    """The JSON that a dashboard stores under this name."""
    (packed,) = re.findall(rf'id="packed-{name}">([^<]*)<', page)
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def latent_entries(page: str) -> Iterator[dict[str, Any]]:
    """The entries of all latents of a dashboard, in the order of its table."""
    for number in range(len(re.findall(r'id="packed-\d+"', page))):
        yield from unpack(page, str(number))


def passages(entry: dict[str, Any]) -> list[tuple[int, int]]:
    """The held-out context and the position of each passage of a latent, the strongest first."""
    return [(context, position) for context, _, position, *_ in [*entry["top"], *entry["quantiles"]]]


def first_examples(page: str) -> list[tuple[int, int]]:
    """The context and the position of the strongest passage of each latent that fires."""
    return [passages(entry)[0] for entry in latent_entries(page) if entry["top"]]
