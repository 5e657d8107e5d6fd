"""The three texts of a model, which share no document, and their caches: for training, tuning and testing."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1] / "real_model"))

from sae.cache.reader import Cache
from sae.harvest.mini.corpus import stdlib_documents
from sae.harvest.run import harvest_activations

CHARACTERS = 9_500_000  # in SmolLM2's three texts together: two million tokens to train on, plus tuning and test
KINDS = ("train", "tune", "test")
SMALL = {"held_out": 0.8, "window": 4096}  # for the caches from which only the held-out text is read
WINDOW = 65_536  # rows; an interrupted harvest loses at most one window
EMBEDDED = "gemma-2-mini"


class Caches(NamedTuple):
    """The caches of a model."""

    train: Cache
    tune: Cache
    test: Cache

    def record(self) -> dict[str, str]:
        """The identity of each cache: the model, the text, and how the text was cut."""
        return {name: cache.fingerprint for name, cache in zip(KINDS, self, strict=True)}


def side(name: str, shares: Mapping[str, float]) -> str:
    """Assigns a document to train, tune or test by a hash of its name; `shares` are the shares of tune and test."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    if place < shares["tune"]:
        return "tune"
    return "test" if place < shares["tune"] + shares["test"] else "train"


def shares_of(design: Mapping[str, Any], model: str) -> dict[str, float]:
    """The shares of tuning and test documents. For gemma-2-mini, all documents that its text holds out are divided
    between tuning and testing."""
    tune, test = design["fixed"]["tuning_documents"], design["fixed"]["test_documents"]
    whole = tune + test if model == EMBEDDED else 1.0
    return {"tune": tune / whole, "test": test / whole}


def write_texts(folder: Path, documents: Iterable[tuple[str, str]], shares: Mapping[str, float]) -> dict[str, Path]:
    """Write the name and text of every document to one JSON Lines file per kind (train, tune, test), unless the files
    exist."""
    paths = {kind: folder / f"{kind}.jsonl" for kind in KINDS}
    if all(path.exists() for path in paths.values()):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for name, text in documents:
        lines[side(name, shares)].append(json.dumps({"text": text, "document": name}))
    for kind, path in paths.items():
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text("".join(f"{line}\n" for line in lines[kind]))
        os.replace(unfinished, path)
    return paths


def mini_documents() -> Iterator[tuple[str, str]]:
    """Name and text of the documents that python-stdlib holds out. A module's docstrings and its source have the same
    name, and so get into the same split."""
    for document in sorted(stdlib_documents(), key=lambda one: one.name):
        if document.held_out:
            yield document.name.split(":", 1)[1], document.text


def real_documents(downloads: Path) -> Iterator[tuple[str, str]]:
    """The packages' texts, in an order in which every prefix is a representative mix."""
    from make_model import read_documents
    from packages import TEXTS
    from texts import SHARES, mix

    texts = {package.name: read_documents(package, downloads) for package in TEXTS}
    lengths = {name: [len(text) for _, text in listed] for name, listed in texts.items()}
    for source, index in mix(lengths, SHARES, CHARACTERS):
        name, text = texts[source][index]
        yield f"{source}/{name}", text


def open_caches(
    design: Mapping[str, Any], model: str, layers: Sequence[int], home: Path, say: Callable[[str], None]
) -> Caches:
    """Harvest the missing parts of a model's three caches, and open them. Interrupted harvests are resumed."""
    folder, shares = home / "texts" / model, shares_of(design, model)
    if model == EMBEDDED:
        name, paths = model, write_texts(folder, mini_documents(), shares)
        train: Path | str = "python-stdlib"
    else:
        from make_model import make_model

        base = home / "real-model"
        base.mkdir(parents=True, exist_ok=True)
        name = str(make_model(base, base / "downloads"))
        paths = write_texts(folder, real_documents(base / "downloads"), shares)
        train = paths["train"]
    caches = []
    for kind in KINDS:
        say(f"{model}: harvest of the {kind} text, layers {', '.join(map(str, layers))}")
        asked: dict[str, Any] = dict(SMALL)
        if kind == "train":
            asked = {"tokens": design["fixed"]["tokens"], "window": design["fixed"].get("window", WINDOW)}
            asked |= {} if model == EMBEDDED else {"held_out": 0.0}
        caches.append(
            harvest_activations(
                name, layers=list(layers), dataset=train if kind == "train" else paths[kind],
                out=home / "activations" / f"{model}-{kind}", device="cpu", dtype="float32", **asked,
            )
        )  # fmt: skip
    return Caches(*caches)
