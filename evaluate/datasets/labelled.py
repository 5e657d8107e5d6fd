"""Labelled texts: what probing, SCR and TPP read. train/test -> class -> texts, as SAEBench draws them.

Eight datasets under their names on the Hub, with SAEBench's classes in SAEBench's order, and stand-ins made of the
standard library (stdlib_texts.py) under names that begin with `stdlib/`. Sizes are those of one binary task: half of
its texts are of one class, so a class has train_set_size // 2 texts.

A dataset is looked for in a folder first, <data>/<name>/<split>.jsonl or .parquet (europarl:
<data>/<name>/<pair of languages>/train), then on the Hub. The names of the class sets of bias_in_bios and of the
sentiment of the reviews are SAEBench's; their folder is that of the dataset itself.
"""

import hashlib
import platform
import random
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...common.errors import SaeError, UnavailableError, UsageError, did_you_mean
from . import hub, stdlib

SEED = 42
SPLITS = ("train", "test")
ROWS_PER_BLOCK = 1000
READERS = {".jsonl": "json", ".parquet": "parquet"}
Texts = dict[str, dict[str, list[str]]]  # train, test -> class -> texts
Quadrants = dict[str, dict[str, list[str]]]  # train, test -> PP, NN, NP, PN -> texts
Row = dict[str, Any]


@dataclass(frozen=True)
class LabelledDataset:
    """A dataset whose rows have a label, and perhaps an attribute that every class is balanced over.

    `name` is where its rows are found. `pairs` are SCR's, by label; the first value of `values` is its positive one.
    """

    name: str
    text: str
    label: str
    classes: tuple[Any, ...]
    attribute: str = ""
    values: tuple[Any, ...] = (None,)
    pairs: tuple[tuple[Any, Any], ...] = ()

    def read(self, dataset: str, data: Path | None, sizes: dict[str, int]) -> Texts:
        """Of each class, and of each value of the attribute in it, a sample of its rows."""
        found: Texts = {}
        for split in SPLITS:
            quota = sizes[split] // 2 // len(self.values)
            groups = self.groups(split, data, self.classes)
            for (label, value), texts in groups.items():
                if len(texts) < quota:
                    raise too_few_texts(dataset, split, self.group(label, value), len(texts), quota)
            found[split] = {
                str(label): [text for value in self.values for text in sample_texts(groups[label, value], quota)]
                for label in self.classes
            }
        return found

    def group(self, label: Any, value: Any) -> str:
        return f"{self.label} {label}" + (f" with {self.attribute} {value}" if self.attribute else "")

    def groups(self, split: str, data: Path | None, labels: Iterable[Any]) -> dict[tuple[Any, Any], list[str]]:
        """The texts of each label and value of the attribute, in the order of the dataset."""
        groups: dict[tuple[Any, Any], list[str]] = {(label, value): [] for label in labels for value in self.values}
        columns = [column for column in (self.text, self.label, self.attribute) if column]
        for row in read_dataset_rows(self.name, split, columns, data):
            key = (row[self.label], row[self.attribute] if self.attribute else None)
            if all(isinstance(part, Hashable) for part in key) and key in groups:
                groups[key].append(checked_text(self.name, split, row[self.text], self.text))
        return groups


@dataclass(frozen=True)
class CodeDataset:
    """github-code: the first files of each language that are long enough, without their head (often a licence)."""

    name: str
    languages: tuple[str, ...]
    shortest, head = 534, 150  # characters

    def read(self, dataset: str, data: Path | None, sizes: dict[str, int]) -> Texts:
        wanted = sum(size // 2 for size in sizes.values())
        found: dict[str, list[str]] = {language: [] for language in self.languages}
        for row in read_dataset_rows(self.name, "train", ["code", "language"], data):
            if not isinstance(row["language"], str) or row["language"] not in found:
                continue
            if len(code := checked_text(self.name, "train", row["code"], "code")) > self.shortest:
                found[row["language"]].append(code[self.head :])
                if all(len(texts) > wanted for texts in found.values()):
                    break
        return shuffle_and_split(dataset, found, sizes)


@dataclass(frozen=True)
class TranslationDataset:
    """europarl: the first sentences of one side of a pair of languages each."""

    name: str
    subsets: tuple[tuple[str, str], ...]  # language, and the pair of languages it is read from

    def read(self, dataset: str, data: Path | None, sizes: dict[str, int]) -> Texts:
        wanted = 1 + sum(size // 2 for size in sizes.values())
        found: dict[str, list[str]] = {}
        for language, subset in self.subsets:
            found[language] = []
            for row in read_dataset_rows(self.name, "train", ["translation"], data, subset):
                sides = row["translation"] if isinstance(row["translation"], dict) else {}
                found[language].append(checked_text(self.name, "train", sides.get(language), f"translation.{language}"))
                if len(found[language]) == wanted:
                    break
        return shuffle_and_split(dataset, found, sizes)


BIOS, REVIEWS = "LabHC/bias_in_bios", "canrager/amazon_reviews_mcauley_1and5"
GITHUB, EUROPARL = "codeparrot/github-code", "Helsinki-NLP/europarl"
CODE_SUFFIXES = {
    "C": (".c", ".h"),
    "Python": (".py",),
    "HTML": (".html",),
    "Java": (".java",),
    "PHP": (".php", ".php3", ".php4", ".php5", ".phps", ".phpt"),
}
BIOS_COLUMNS: dict[str, Any] = {"text": "hard_text", "label": "profession", "attribute": "gender", "values": (0, 1)}
REVIEW_COLUMNS: dict[str, Any] = {"text": "text", "label": "category", "attribute": "rating", "values": (1.0, 5.0)}
# (professor, nurse), (architect, journalist), (surgeon, psychologist), (attorney, teacher); 0 is male, 1 female
BIOS_PAIRS = ((21, 13), (1, 11), (25, 22), (2, 26))
# (books, CDs and vinyl), (software, electronics), (pet supplies, office products), (industrial, toys and games)
REVIEWS_PAIRS = ((24, 26), (30, 6), (18, 11), (3, 1))
# Pairs of which a probe of both picks up both: with prose against code, or with other pairs, it reads nothing but that.
SUBJECT_PAIRS = (("network", "numbers"), ("numbers", "python"), ("files", "numbers"))

HUB: dict[str, LabelledDataset | CodeDataset | TranslationDataset] = {
    f"{BIOS}_class_set1": LabelledDataset(BIOS, classes=(0, 1, 2, 6, 9), pairs=BIOS_PAIRS, **BIOS_COLUMNS),
    f"{BIOS}_class_set2": LabelledDataset(BIOS, classes=(11, 13, 14, 18, 19), **BIOS_COLUMNS),
    f"{BIOS}_class_set3": LabelledDataset(BIOS, classes=(20, 21, 22, 25, 26), **BIOS_COLUMNS),
    REVIEWS: LabelledDataset(REVIEWS, classes=(1, 2, 3, 5, 6), pairs=REVIEWS_PAIRS, **REVIEW_COLUMNS),
    f"{REVIEWS}_sentiment": LabelledDataset(REVIEWS, "text", "rating", (1.0, 5.0)),
    GITHUB: CodeDataset(GITHUB, tuple(CODE_SUFFIXES)),
    "fancyzhx/ag_news": LabelledDataset("fancyzhx/ag_news", "text", "label", (0, 1, 2, 3)),
    EUROPARL: TranslationDataset(
        EUROPARL, (("en", "en-fr"), ("fr", "fr-it"), ("de", "de-en"), ("es", "es-fr"), ("nl", "nl-pt"))
    ),
}
STAND_INS: dict[str, LabelledDataset] = {
    "stdlib/library": LabelledDataset("stdlib/library", "text", "library", stdlib.LIBRARIES, "kind", ("prose", "code")),
    "stdlib/kind": LabelledDataset("stdlib/kind", "text", "kind", stdlib.KINDS),
    "stdlib/subject": LabelledDataset(
        "stdlib/subject", "text", "subject", tuple(stdlib.SUBJECTS), "kind", ("docstring", "code"), SUBJECT_PAIRS
    ),
}
DATASETS: dict[str, LabelledDataset | CodeDataset | TranslationDataset] = HUB | STAND_INS
# What classes that are numbers in a dataset stand for there.
CLASS_NAMES: dict[str, dict[str, str]] = {
    BIOS: {str(number): name for number, name in enumerate((
        "accountant architect attorney chiropractor comedian composer dentist dietitian dj filmmaker interior_designer "
        "journalist model nurse painter paralegal pastor personal_trainer photographer physician poet professor "
        "psychologist rapper software_engineer surgeon teacher yoga_teacher"
    ).split())},
    REVIEWS: {
        "1": "Toys_and_Games", "2": "Cell_Phones_and_Accessories", "3": "Industrial_and_Scientific",
        "5": "Musical_Instruments", "6": "Electronics",
    },
    "fancyzhx/ag_news": {"0": "World", "1": "Sports", "2": "Business", "3": "Sci/Tech"},
}  # fmt: skip


def load_texts(name: str, data: Path | None, train_set_size: int = 4000, test_set_size: int = 1000) -> Texts:
    """train/test -> class -> texts, in SAEBench's order of classes: train_set_size // 2 (test_set_size // 2) of each.

    Raises UsageError for an unknown name, a missing column and a class with too few texts, OutsideError without the Hub.
    """
    for option, size in (("train_set_size", train_set_size), ("test_set_size", test_set_size)):
        if size < 4:
            raise UsageError(f"{option}={size} leaves no text for a class. Give at least 4.")
    return find_dataset(name).read(name, data, {"train": train_set_size, "test": test_set_size})


def load_quadrants(
    name: str, data: Path | None, train_set_size: int = 4000, test_set_size: int = 1000
) -> dict[tuple[str, str], Quadrants]:
    """For each of SCR's pairs of classes (c+, c-): train/test -> quadrant -> texts in the order of the dataset.

    With q = size // 4 and the attribute's positive (a+) and negative (a-) value: PP has the first 2q texts of (c+, a+),
    NN of (c-, a-); NP the first q of (c+, a-), PN of (c-, a+). SAEBench asks for one more in PP and NN, and so do we.

    Raises UsageError for a dataset without pairs and a quadrant with too few texts, and what `labelled` raises.
    """
    table = find_dataset(name)
    if not isinstance(table, LabelledDataset) or not table.pairs:
        known = [known for known, other in DATASETS.items() if isinstance(other, LabelledDataset) and other.pairs]
        raise UsageError(f"{name} has no pairs of classes with a second attribute; these have: {', '.join(known)}.")
    positive, negative = table.values
    found: dict[tuple[str, str], Quadrants] = {(str(plus), str(minus)): {} for plus, minus in table.pairs}
    for split, size in zip(SPLITS, (train_set_size, test_set_size), strict=True):
        q = size // 4
        groups = table.groups(split, data, {label for pair in table.pairs for label in pair})
        for plus, minus in table.pairs:
            cells = {"PP": (plus, positive), "NN": (minus, negative), "NP": (plus, negative), "PN": (minus, positive)}
            needed = {"PP": 2 * q + 1, "NN": 2 * q + 1, "NP": q, "PN": q}
            for quadrant, (label, value) in cells.items():
                if (count := len(groups[label, value])) < needed[quadrant]:
                    raise too_few_texts(name, split, table.group(label, value), count, needed[quadrant])
            found[str(plus), str(minus)][split] = {
                quadrant: groups[cell][: 2 * q if quadrant in ("PP", "NN") else q] for quadrant, cell in cells.items()
            }
    return found


def dataset_version(name: str, data: Path | None) -> str:
    """What stands for the texts of a dataset in the settings of a result: the digest of files, a commit of the Hub.

    Raises OutsideError when they are of the Hub and its commit cannot be known.
    """
    source = find_dataset(name)
    if name in STAND_INS:
        return f"python {platform.python_version()}"
    subsets = [f"/{subset}" for _, subset in source.subsets] if isinstance(source, TranslationDataset) else [""]
    splits = SPLITS if isinstance(source, LabelledDataset) else ("train",)
    places = {(f"{source.name}{subset}", split): local_file(f"{source.name}{subset}", split, data) for subset in subsets for split in splits}  # fmt: skip
    digest = hashlib.sha256()
    for file in filter(None, places.values()):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    found = [f"sha256 {digest.hexdigest()}"] if any(places.values()) else []
    for (place, split), file in places.items():
        if file is None:
            return ", ".join([*found, f"the Hub {hub_commit(source.name, f'{place}/{split}')}"])
    return found[0]


def hub_commit(name: str, place: str) -> str:
    """The commit of a dataset that is read from the Hub; OutsideError when it cannot be known."""
    try:
        return hub.pinned_commit(name)
    except Exception as error:  # whatever `huggingface_hub` and what stands below it can raise
        raise error if isinstance(error, SaeError) else read_error(error, name, place, None) from error


def find_dataset(name: str) -> LabelledDataset | CodeDataset | TranslationDataset:
    if name not in DATASETS:
        raise UsageError(f"There is no labelled dataset {name}{did_you_mean(name, DATASETS)}")
    return DATASETS[name]


def class_name(dataset: str, label: str) -> str:
    """What a class of a dataset is called, where it is a number there; else the class itself."""
    source = DATASETS.get(dataset)
    return CLASS_NAMES.get(source.name, {}).get(label, label) if source else label


def sample_texts(texts: Sequence[str], count: int) -> list[str]:
    """The rows that pandas' `DataFrame.sample(count, random_state=42)` draws."""
    chosen = np.random.RandomState(SEED).choice(len(texts), size=count, replace=False)
    return [texts[number] for number in chosen]


def shuffle_and_split(name: str, found: dict[str, list[str]], sizes: dict[str, int]) -> Texts:
    """All texts of each class shuffled, one class after the other with one generator; the first are for training."""
    train, test = (sizes[split] // 2 for split in SPLITS)
    rng = random.Random(SEED)
    for label, texts in found.items():
        if len(texts) < train + test:
            raise too_few_texts(name, "train", label, len(texts), train + test)
        rng.shuffle(texts)
    return {
        "train": {label: texts[:train] for label, texts in found.items()},
        "test": {label: texts[train : train + test] for label, texts in found.items()},
    }


def checked_text(name: str, split: str, value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise UsageError(
            f"{name} has a row in {split} with {value!r:.40} in {column}, where a text was expected. "
            "Mend that row, or take it out of the dataset."
        )
    return value


def too_few_texts(name: str, split: str, label: str, found: int, needed: int) -> UsageError:
    return UsageError(
        f"{name} has {found:,} texts of {label} in {split}, but {needed:,} are needed. "
        "Ask for fewer with train_set_size and test_set_size, or give more text."
    )


def read_dataset_rows(
    name: str, split: str, columns: Sequence[str], data: Path | None, subset: str | None = None
) -> Iterator[Row]:
    """The rows of a split, in order: of the standard library, of a file under `data`, or of the Hub."""
    if name in STAND_INS:
        yield from stdlib.labelled_rows(name.removeprefix("stdlib/"), split)
        return
    place = f"{name}/{subset}" if subset else name
    file = local_file(place, split, data)
    shown = str(file) if file else name
    try:
        stream = open_file(file) if file else open_on_hub(name, split, subset)
        for block in stream.iter(ROWS_PER_BLOCK):
            if lacking := [column for column in columns if column not in block]:
                raise UsageError(
                    f"{shown} has no column {lacking[0]!r}; its columns are {', '.join(map(repr, block))}. "
                    f"{name} needs {', '.join(map(repr, columns))}."
                )
            for values in zip(*(block[column] for column in columns), strict=True):
                yield dict(zip(columns, values, strict=True))
    except SaeError:
        raise
    except Exception as error:  # whatever `datasets` and what stands below it can raise
        raise read_error(error, name, f"{place}/{split}", file) from error


def local_file(name: str, split: str, data: Path | None) -> Path | None:
    candidates = [data / name / f"{split}{suffix}" for suffix in READERS] if data else []
    return next((file for file in candidates if file.is_file()), None)


def open_file(file: Path) -> Any:
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would say the same before us, with a traceback
    return datasets.load_dataset(READERS[file.suffix], data_files=str(file), split="train", streaming=True)


def open_on_hub(name: str, split: str, subset: str | None) -> Any:
    """What is read whole is kept by `datasets`; of europarl and github-code the beginning is enough, so they stream."""
    import datasets

    at = hub.pinned_commit(name)
    if (error := hub.connection_error()) and hub.cached_commit(name) is None:
        raise error  # at once, where `datasets` tries for half a minute
    if name != GITHUB:
        found = datasets.load_dataset(name, name=subset, split=split, streaming=subset is not None, revision=at)
        hub.check_commit(name, at, found)
        return found
    # Its script, which `datasets` no longer runs, adds the language to files that have only a path.
    files = f"hf://datasets/{name}@{at}/data/{split}-*.parquet"
    stream = datasets.load_dataset("parquet", data_files={split: files}, split=split, streaming=True)
    return stream.map(lambda row: {"language": language_of(row["path"])})


def language_of(path: str) -> str | None:
    return next((language for language, endings in CODE_SUFFIXES.items() if path.endswith(endings)), None)


def read_error(error: Exception, name: str, place: str, file: Path | None) -> SaeError:
    """The sentence for texts that cannot be read."""
    from huggingface_hub.errors import GatedRepoError

    problem = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if file:
        return UsageError(f"{file} cannot be read: {problem.rstrip('.')}. It may be cut off, or another kind of file.")
    if isinstance(error, GatedRepoError) or isinstance(error.__cause__, GatedRepoError):
        return UnavailableError(
            f"The dataset {name} is gated: accept its terms at https://huggingface.co/datasets/{name}, then run `hf auth login`."
        )
    return UnavailableError(
        f"The dataset {name} could not be read: {problem.rstrip('.')}. Check the network, or name a folder that holds "
        f"{place}.jsonl (or .parquet) with --data."
    )
