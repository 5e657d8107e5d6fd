"""Labeled texts for probing, SCR and TPP: train/test -> class -> texts, sampled as in SAEBench.

Eight datasets are named as on the Hub and have the same classes as in SAEBench, in the same order. Substitutes built
from the standard library (stdlib.py) have names that begin with `stdlib/`. Sizes count the texts of one binary task.
Each class provides half of them, so a class has train_set_size // 2 texts.

A dataset is read from the local file <data>/<name>/<split>.jsonl or .parquet if it exists (europarl:
<data>/<name>/<pair of languages>/train), else from the Hub. SAEBench uses names such as <bias_in_bios>_class_set1 and
<amazon_reviews>_sentiment for parts of a dataset; such a part is read from the folder of the dataset itself.
"""

import hashlib
import itertools
import platform
import random
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...common.errors import SaeError, UnavailableError, UsageError, did_you_mean, first_line
from ...common.remote_code import load_dataset
from ...common.tables import Unreadable, find_columns, read_rows
from . import hub, stdlib

SEED = 42
SPLITS = ("train", "test")
ROWS_PER_BLOCK = 1000
SUFFIXES = (".jsonl", ".parquet")
Texts = dict[str, dict[str, list[str]]]  # train, test -> class -> texts
Quadrants = dict[str, dict[str, list[str]]]  # train, test -> PP, NN, NP, PN -> texts
Row = dict[str, Any]


@dataclass(frozen=True)
class LabeledDataset:
    """A dataset whose rows have a label, and optionally an attribute over which every class is balanced.

    Attributes:
        name: the name of the dataset on the Hub.
        text, label, attribute: names of columns.
        classes: the values of the label that are used.
        values: the values of the attribute; SCR's positive value comes first.
        pairs: SCR's pairs of classes, by label.
    """

    name: str
    text: str
    label: str
    classes: tuple[Any, ...]
    attribute: str = ""
    values: tuple[Any, ...] = (None,)
    pairs: tuple[tuple[Any, Any], ...] = ()

    def read(self, dataset: str, data: Path | None, sizes: dict[str, int]) -> Texts:
        """A sample of each class, with equally many rows of each value of the attribute."""
        found: Texts = {}
        for split in SPLITS:
            quota = sizes[split] // 2 // len(self.values)
            groups = self.groups(split, data, self.classes)
            for (label, value), texts in groups.items():
                if len(texts) < quota:
                    raise too_few_texts(dataset, split, self.describe_group(label, value), len(texts), quota)
            found[split] = {
                str(label): [text for value in self.values for text in sample_texts(groups[label, value], quota)]
                for label in self.classes
            }
        return found

    def describe_group(self, label: Any, value: Any) -> str:
        return f"{self.label} {label}" + (f" with {self.attribute} {value}" if self.attribute else "")

    def groups(self, split: str, data: Path | None, labels: Iterable[Any]) -> dict[tuple[Any, Any], list[str]]:
        """(label, value of the attribute) -> texts, in the order of the dataset."""
        groups: dict[tuple[Any, Any], list[str]] = {(label, value): [] for label in labels for value in self.values}
        columns = [column for column in (self.text, self.label, self.attribute) if column]
        for row in read_dataset_rows(self.name, split, columns, data):
            key = (row[self.label], row[self.attribute] if self.attribute else None)
            if all(isinstance(part, Hashable) for part in key) and key in groups:
                groups[key].append(checked_text(self.name, split, row[self.text], self.text))
        return groups


@dataclass(frozen=True)
class CodeDataset:
    """github-code: the first files of each language that are long enough, without their beginning (often a license)."""

    name: str
    languages: tuple[str, ...]
    min_length, head = 534, 150  # characters

    def read(self, dataset: str, data: Path | None, sizes: dict[str, int]) -> Texts:
        wanted = sum(size // 2 for size in sizes.values())
        found: dict[str, list[str]] = {language: [] for language in self.languages}
        for row in read_dataset_rows(self.name, "train", ["code", "language"], data):
            if not isinstance(row["language"], str) or row["language"] not in found:
                continue
            if len(code := checked_text(self.name, "train", row["code"], "code")) > self.min_length:
                found[row["language"]].append(code[self.head :])
                if all(len(texts) > wanted for texts in found.values()):
                    break
        return shuffle_and_split(dataset, found, sizes)


@dataclass(frozen=True)
class TranslationDataset:
    """europarl: for each language, the first sentences from one side of a language pair."""

    name: str
    subsets: tuple[tuple[str, str], ...]  # (language, the language pair it is read from)

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
# With these pairs, SCR's biased probe uses subject and kind; with other pairs or prose and code, only one of the two.
SUBJECT_PAIRS = (("network", "numbers"), ("numbers", "python"), ("files", "numbers"))

HUB: dict[str, LabeledDataset | CodeDataset | TranslationDataset] = {
    f"{BIOS}_class_set1": LabeledDataset(BIOS, classes=(0, 1, 2, 6, 9), pairs=BIOS_PAIRS, **BIOS_COLUMNS),
    f"{BIOS}_class_set2": LabeledDataset(BIOS, classes=(11, 13, 14, 18, 19), **BIOS_COLUMNS),
    f"{BIOS}_class_set3": LabeledDataset(BIOS, classes=(20, 21, 22, 25, 26), **BIOS_COLUMNS),
    REVIEWS: LabeledDataset(REVIEWS, classes=(1, 2, 3, 5, 6), pairs=REVIEWS_PAIRS, **REVIEW_COLUMNS),
    f"{REVIEWS}_sentiment": LabeledDataset(REVIEWS, "text", "rating", (1.0, 5.0)),
    GITHUB: CodeDataset(GITHUB, tuple(CODE_SUFFIXES)),
    "fancyzhx/ag_news": LabeledDataset("fancyzhx/ag_news", "text", "label", (0, 1, 2, 3)),
    EUROPARL: TranslationDataset(
        EUROPARL, (("en", "en-fr"), ("fr", "fr-it"), ("de", "de-en"), ("es", "es-fr"), ("nl", "nl-pt"))
    ),
}
STAND_INS: dict[str, LabeledDataset] = {
    "stdlib/library": LabeledDataset("stdlib/library", "text", "library", stdlib.LIBRARIES, "kind", ("prose", "code")),
    "stdlib/kind": LabeledDataset("stdlib/kind", "text", "kind", stdlib.KINDS),
    "stdlib/subject": LabeledDataset(
        "stdlib/subject", "text", "subject", tuple(stdlib.SUBJECTS), "kind", ("docstring", "code"), SUBJECT_PAIRS
    ),
}
DATASETS: dict[str, LabeledDataset | CodeDataset | TranslationDataset] = HUB | STAND_INS
# The names of classes that a dataset stores as numbers.
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
    """train/test -> class -> texts, with the classes in SAEBench's order and train_set_size // 2 (test_set_size // 2)
    texts per class.

    Raises UsageError for an unknown name, a missing column or a class with too few texts, and UnavailableError if the
    Hub cannot be reached.
    """
    for option, size in (("train_set_size", train_set_size), ("test_set_size", test_set_size)):
        if size < 4:
            raise UsageError(f"{option}={size} is too small for every class to have texts. Expected at least 4.")
    return find_dataset(name).read(name, data, {"train": train_set_size, "test": test_set_size})


def count_texts(name: str, train_set_size: int, test_set_size: int) -> int:
    """How many texts `load_texts` returns. Reads nothing."""
    source = find_dataset(name)
    if isinstance(source, LabeledDataset):
        classes = len(source.classes)
    else:
        classes = len(source.languages if isinstance(source, CodeDataset) else source.subsets)
    return classes * (train_set_size // 2 + test_set_size // 2)


def load_quadrants(
    name: str, data: Path | None, train_set_size: int = 4000, test_set_size: int = 1000
) -> dict[tuple[str, str], Quadrants]:
    """SCR's pairs of classes (c+, c-) -> train/test -> quadrant -> texts in the order of the dataset.

    Let q = size // 4, and let a+ and a- be the positive and the negative value of the attribute. PP has the first 2q
    texts of (c+, a+), NN the first 2q of (c-, a-), NP the first q of (c+, a-) and PN the first q of (c-, a+). As in
    SAEBench, at least 2q + 1 texts must exist for PP and for NN.

    Raises UsageError if the dataset has no pairs or a quadrant has too few texts, and the errors of `load_texts`.
    """
    source = find_dataset(name)
    if not isinstance(source, LabeledDataset) or not source.pairs:
        known = [known for known, other in DATASETS.items() if isinstance(other, LabeledDataset) and other.pairs]
        raise UsageError(f"{name} has no pairs of classes with a second attribute; these have: {', '.join(known)}.")
    positive, negative = source.values
    found: dict[tuple[str, str], Quadrants] = {(str(plus), str(minus)): {} for plus, minus in source.pairs}
    for split, size in zip(SPLITS, (train_set_size, test_set_size), strict=True):
        q = size // 4
        groups = source.groups(split, data, {label for pair in source.pairs for label in pair})
        for plus, minus in source.pairs:
            cells = {"PP": (plus, positive), "NN": (minus, negative), "NP": (plus, negative), "PN": (minus, positive)}
            needed = {"PP": 2 * q + 1, "NN": 2 * q + 1, "NP": q, "PN": q}
            for quadrant, (label, value) in cells.items():
                if (count := len(groups[label, value])) < needed[quadrant]:
                    raise too_few_texts(name, split, source.describe_group(label, value), count, needed[quadrant])
            found[str(plus), str(minus)][split] = {
                quadrant: groups[cell][: 2 * q if quadrant in ("PP", "NN") else q] for quadrant, cell in cells.items()
            }
    return found


def dataset_version(name: str, data: Path | None) -> str:
    """The version of a dataset, as recorded in a result's settings: a digest of local files, or a commit on the Hub.

    Raises UnavailableError if the Hub does not report the commit.
    """
    source = find_dataset(name)
    if name in STAND_INS:
        return f"python {platform.python_version()}"
    subsets = [f"/{subset}" for _, subset in source.subsets] if isinstance(source, TranslationDataset) else [""]
    splits = SPLITS if isinstance(source, LabeledDataset) else ("train",)
    places = [(f"{source.name}{subset}", split) for subset in subsets for split in splits]
    files = [local_file(place, split, data) for place, split in places]
    versions = []
    if any(files):
        digest = hashlib.sha256()
        for path in filter(None, files):
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        versions.append(f"sha256 {digest.hexdigest()}")
    for (place, split), path_or_none in zip(places, files, strict=True):
        if path_or_none is None:
            versions.append(f"the Hub {hub_commit(source.name, f'{place}/{split}')}")
            break
    return ", ".join(versions)


def hub_commit(name: str, place: str) -> str:
    """The pinned commit of a dataset on the Hub. Raises UnavailableError if the Hub does not report it."""
    try:
        return hub.pinned_commit(name)
    except Exception as error:  # huggingface_hub and its dependencies raise many types of errors
        raise error if isinstance(error, SaeError) else read_error(error, name, place) from error


def find_dataset(name: str) -> LabeledDataset | CodeDataset | TranslationDataset:
    if name not in DATASETS:
        raise UsageError(f"There is no labeled dataset {name}{did_you_mean(name, DATASETS)}")
    return DATASETS[name]


def class_name(dataset: str, label: str) -> str:
    """The name of a class if the dataset stores classes as numbers; otherwise the class itself."""
    source = DATASETS.get(dataset)
    return CLASS_NAMES.get(source.name, {}).get(label, label) if source else label


def sample_texts(texts: Sequence[str], count: int) -> list[str]:
    """The rows that `pandas.DataFrame.sample(count, random_state=42)` draws."""
    chosen = np.random.RandomState(SEED).choice(len(texts), size=count, replace=False)
    return [texts[number] for number in chosen]


def shuffle_and_split(name: str, texts_by_class: dict[str, list[str]], sizes: dict[str, int]) -> Texts:
    """Shuffle the texts of each class, one class after another, with a single generator. The first texts are for
    training, the next for testing."""
    train, test = (sizes[split] // 2 for split in SPLITS)
    rng = random.Random(SEED)
    for label, texts in texts_by_class.items():
        if len(texts) < train + test:
            raise too_few_texts(name, "train", label, len(texts), train + test)
        rng.shuffle(texts)
    return {
        "train": {label: texts[:train] for label, texts in texts_by_class.items()},
        "test": {label: texts[train : train + test] for label, texts in texts_by_class.items()},
    }


def checked_text(name: str, split: str, value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise UsageError(
            f"{name} has a row in {split} with {value!r:.40} in column {column}. Expected a text. Fix or "
            "remove that row."
        )
    return value


def too_few_texts(name: str, split: str, label: str, found: int, needed: int) -> UsageError:
    return UsageError(
        f"{name} has {found:,} texts of {label} in {split}, but {needed:,} are needed. "
        "Reduce train_set_size and test_set_size, or provide more text."
    )


def read_dataset_rows(
    name: str, split: str, columns: Sequence[str], data: Path | None, subset: str | None = None
) -> Iterator[Row]:
    """Yield the rows of a split in order, from the standard library, a file under `data`, or the Hub."""
    if name in STAND_INS:
        yield from stdlib.labeled_rows(name.removeprefix("stdlib/"), split)
        return
    place = f"{name}/{subset}" if subset else name
    if (file := local_file(place, split, data)) is not None:
        yield from read_local_rows(name, file, columns)
        return
    try:
        for block in open_on_hub(name, split, subset).iter(ROWS_PER_BLOCK):
            check_columns(name, name, columns, list(block))
            for values in zip(*(block[column] for column in columns), strict=True):
                yield dict(zip(columns, values, strict=True))
    except SaeError:
        raise
    except Exception as error:  # the library `datasets` and its dependencies raise many types of errors
        raise read_error(error, name, f"{place}/{split}") from error


def read_local_rows(name: str, file: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a local file. Raises UsageError if a row cannot be read: no row is skipped, because samples are drawn
    from all rows."""
    rows = read_rows([file], columns)
    first = next(rows, None)
    if first is None:
        return
    check_columns(name, str(file), columns, find_columns([file], columns))
    for row in itertools.chain([first], rows):
        if isinstance(row.values, Unreadable):
            raise UsageError(f"{file} cannot be read: {row.values.problem}. Correct or remove that row.")
        yield row.values


def check_columns(name: str, source: str, wanted: Sequence[str], found: Sequence[str]) -> None:
    if missing := [column for column in wanted if column not in found]:
        raise UsageError(
            f"{source} has no column {missing[0]!r}; its columns are {', '.join(map(repr, found))}. "
            f"{name} needs the columns {', '.join(map(repr, wanted))}."
        )


def local_file(name: str, split: str, data: Path | None) -> Path | None:
    candidates = [data / name / f"{split}{suffix}" for suffix in SUFFIXES] if data else []
    return next((file for file in candidates if file.is_file()), None)


def open_on_hub(name: str, split: str, subset: str | None) -> Any:
    """Open a dataset on the Hub. `datasets` caches datasets that are read whole. europarl and github-code are streamed,
    since their beginning is enough."""
    commit = hub.pinned_commit(name)
    if (error := hub.connection_error()) and hub.cached_commit(name) is None:
        raise error  # fail at once: `datasets` would keep trying for half a minute
    if name != GITHUB:
        opened = load_dataset(name, name=subset, split=split, streaming=subset is not None, revision=commit)
        hub.check_commit(name, commit, opened)
        return opened
    # The loading script of github-code, which `datasets` no longer runs, derives the language from the path.
    files = f"hf://datasets/{name}@{commit}/data/{split}-*.parquet"
    stream = load_dataset("parquet", data_files={split: files}, split=split, streaming=True)
    return stream.map(lambda row: {"language": language_of(row["path"])})


def language_of(path: str) -> str | None:
    return next((language for language, endings in CODE_SUFFIXES.items() if path.endswith(endings)), None)


def read_error(error: Exception, name: str, place: str) -> SaeError:
    """The error for texts that cannot be read."""
    from huggingface_hub.errors import GatedRepoError

    if isinstance(error, GatedRepoError) or isinstance(error.__cause__, GatedRepoError):
        return UnavailableError(
            f"The dataset {name} is gated: accept its terms at https://huggingface.co/datasets/{name}, "
            "then run `hf auth login`."
        )
    return UnavailableError(
        f"The dataset {name} could not be read: {first_line(error).rstrip('.')}. Check the network, or use "
        f"--data with a folder that contains {place}.jsonl (or .parquet)."
    )
