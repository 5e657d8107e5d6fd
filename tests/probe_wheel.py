"""A wheel like sae-probes': two binary data sets of made-up words, one of three classes, and code that must not run."""

import csv
import hashlib
import io
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import zstandard

from sae.evaluate.datasets import sae_probes

INDEX_COLUMNS = ("Dataset name", "Dataset Tag", "Dataset save name", "Link", "Probe from", "Probe to", "Data type")
WORDS = {"cats": "the quick brown fox jumps over", "dogs": "a lazy dog while seven zebras read"}
TEXTS = 130  # of each data set


def table(columns: tuple[str, ...], rows: list[tuple[object, ...]]) -> bytes:
    """A compressed CSV file."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(rows)
    return zstandard.ZstdCompressor().compress(text.getvalue().encode())


def data_set(seed: int, texts: int = TEXTS) -> bytes:
    """Half of the texts of each class, in random order; one spans two lines and has a quoted comma."""
    rng = random.Random(seed)
    rows = [(" ".join(rng.choices(WORDS[c].split(), k=5)), c) for c in WORDS for _ in range(texts // 2)]
    rng.shuffle(rows)
    rows[0] = ('two\r\nlines, "quoted"', rows[0][1])
    return table(("prompt", "target"), rows)


def wheel_files() -> dict[str, bytes]:
    """Name in the wheel -> content."""
    binary, code = "Binary Classification", b"raise SystemExit('the code of the wheel ran')"
    index = [
        ("Pets", "pets", "cleaned_data/5_pets.csv", "https://pets.test", "sentence", "cat?", binary),
        ("", "more pets", "cleaned_data/21_more pets.csv", "", "", "dog?", binary),
        ("Sizes", "sizes", "cleaned_data/30_sizes.csv", "", "", "size", "Multiclass"),
    ]
    return {
        "sae_probes/__init__.py": code,
        "sae_probes/data/probing_datasets_MASTER.csv.zst": table(INDEX_COLUMNS, index),
        "sae_probes/data/cleaned_data/5_pets.csv.zst": data_set(0),
        "sae_probes/data/cleaned_data/21_more pets.csv.zst": data_set(1),
        "sae_probes/data/cleaned_data/30_sizes.csv.zst": table(("prompt", "target"), [("a", 1), ("b", 2), ("c", 3)]),
        "sae_probes-0.4.2.dist-info/METADATA": b"Metadata-Version: 2.1\nName: sae-probes\nVersion: 0.4.2\n",
        "sae_probes-0.4.2.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "sae_probes-0.4.2.dist-info/RECORD": b"",
        "sae_probes-0.4.2.dist-info/licenses/LICENSE": b"MIT",
    }


def write_wheel(folder: Path, monkeypatch: pytest.MonkeyPatch, files: Mapping[str, bytes] | None = None) -> Path:
    """Write the wheel, and make its digest the expected one."""
    path = folder / sae_probes.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (files or wheel_files()).items():
            archive.writestr(name, content)
    monkeypatch.setattr(sae_probes, "WHEEL_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path
