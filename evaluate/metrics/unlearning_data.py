"""The texts of the unlearning metric: a forget corpus, a retain corpus, and multiple-choice questions."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..datasets.labeled import Row, hub_commit, local_file, read_dataset_rows

FORGET_QUESTIONS = "wmdp-bio"
FORGET_CORPUS = "bio-forget-corpus"  # name of the file that WMDP distributes, without .jsonl
MIN_CHARACTERS = 50  # only longer texts of the corpora are used
DatasetPath = tuple[Any, ...]  # dataset, split, columns and, for some datasets, a subset
ReadRows = Callable[[], Iterator[Row]]  # each call streams the rows from the start


def dataset_paths(side_effects: Sequence[str], data: Path | None) -> dict[str, DatasetPath]:
    """The two corpora and the sets of questions, by name. `side_effects` are names of MMLU subsets; `data` is a
    folder."""
    question, text = ("question", "choices", "answer"), ("text",)
    has_local_file = local_file("", FORGET_CORPUS, data) is not None
    return {
        "forget": ("", FORGET_CORPUS, text) if has_local_file else ("cais/wmdp-bio-forget-corpus", "train", text),
        "retain": ("Salesforce/wikitext", "test", text, "wikitext-2-raw-v1"),
        FORGET_QUESTIONS: ("cais/wmdp", "test", question, FORGET_QUESTIONS),
        **{name: ("cais/mmlu", "test", question, name) for name in side_effects},
    }


def reader(path: DatasetPath, data: Path | None) -> ReadRows:
    """A function that reads the rows of a corpus or of a set of questions."""
    dataset, split, columns, *subset = path
    return partial(read_dataset_rows, dataset, split, columns, data, *subset)


def data_version(path: DatasetPath, data: Path | None) -> str:
    """A digest of a local file's rows (equal for all file formats), or the commit of a dataset on the Hub."""
    dataset, split, _, *subset = path
    folder = "/".join([dataset, *subset])
    if local_file(folder, split, data):
        return digest_of_rows(reader(path, data))
    return f"the Hub {hub_commit(dataset, f'{folder}/{split}')}"


def digest_of_rows(read: ReadRows) -> str:
    """The sha256 of the rows, which is equal for a JSONL and a Parquet file."""
    digest = hashlib.sha256()
    for row in read():
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def sample_long_texts(read: ReadRows, rng: random.Random, most: int | None) -> list[str]:
    """Texts of more than MIN_CHARACTERS characters: all in order, or at most `most` of them, sampled by `rng`."""

    def long_texts() -> Iterator[str]:
        return (row["text"] for row in read() if isinstance(row["text"], str) and len(row["text"]) > MIN_CHARACTERS)

    if most is None:
        return list(long_texts())
    count = sum(1 for _ in long_texts())
    position = {number: i for i, number in enumerate(rng.sample(range(count), min(most, count)))}
    sampled = {position[number]: text for number, text in enumerate(long_texts()) if number in position}
    return [sampled[i] for i in range(len(sampled))]
