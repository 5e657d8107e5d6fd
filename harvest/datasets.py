"""Where text comes from: the embedded corpus, files, datasets saved to disk, datasets of the Hub."""

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..common.errors import SaeError, UnavailableError, UsageError
from ..common.files import read_json
from .contexts import Document, ListedDocuments, TextSource
from .dataset_reader import RETRY_SECONDS, DatasetReader, first_line
from .mini import corpus, spelling

PILE = "monology/pile-uncopyrighted"
EMBEDDED_TEXT = "python-stdlib"
FILE_FORMATS = {".jsonl": "json", ".json": "json", ".zst": "json", ".gz": "json", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}  # fmt: skip
SPELLING_LINES = 40  # of spelling after each embedded document: about one token in ten
MAX_LISTED_SUBSETS = 20  # of a dataset's configurations are listed at most

Say = Callable[[str], None]  # takes a sentence for the user


def open_text(
    name: str, *, tokenizer: Any, revision: str | None, split: str, column: str, seed: int,
    tell: Say = lambda sentence: None, subset: str | None = None,
) -> TextSource:  # fmt: skip
    """The embedded corpus, a local file or folder, or a dataset of the Hub, streamed.

    Raises UsageError for a file that cannot be read or a column or split that is not there, OutsideError without network.
    """
    path = Path(name)
    if subset is not None and (name == EMBEDDED_TEXT or path.exists()):
        raise UsageError(f"--subset is a configuration of a Hub dataset; {name} is none. Leave it out.")
    if name == EMBEDDED_TEXT:
        return open_embedded(tokenizer, seed, tell)
    if path.exists():
        return open_local(path, split, column, len(tokenizer), tell)
    if path.suffix in FILE_FORMATS or name.startswith((".", "/")):
        raise UsageError(
            f"There is no file {name}. Give a .txt, .jsonl, .parquet or .arrow file, a folder of them, a Hub dataset, or {EMBEDDED_TEXT}."
        )
    return open_hub(name, revision, subset, split, column, len(tokenizer), tell)


def open_embedded(tokenizer: Any, seed: int, tell: Say) -> TextSource:
    """The standard library of the running Python, each harvested document followed by a little spelling."""
    found = sorted(
        corpus.stdlib_documents(), key=lambda d: hashlib.sha256(d.name.encode()).digest()
    )  # a small harvest is a fair sample
    digest = hashlib.sha256()
    for document in found:
        digest.update(f"{document.name}\0{document.text}\0".encode())
    pool = spelling.spelling_words(tokenizer)

    def documents() -> Iterator[Document]:
        rng = random.Random(seed)
        for document in found:
            yield Document(document.text, document.held_out)
            if not document.held_out:  # a held-out line of spelling would hardly ever be a new one
                lines = (spelling.spelling_line(rng.choice(pool)) for _ in range(SPELLING_LINES))
                yield Document("".join(f"\n{line}" for line in lines), held_out=False)

    identity = {"name": EMBEDDED_TEXT, "revision": digest.hexdigest(), "spelled_lines": SPELLING_LINES}
    return TextSource(EMBEDDED_TEXT, identity, ListedDocuments(documents), tell)


def open_local(path: Path, split: str, column: str, vocabulary: int, tell: Say) -> TextSource:
    """Files of one kind. A line of JSON or a row of a table is a document; a text file is cut at blank lines."""
    files = list_files(path, split)
    kinds = {FILE_FORMATS.get(p.suffix) for p in files}
    if len(kinds) != 1 or None in kinds:
        raise UsageError(
            f"{path} has {sorted({p.suffix for p in files}) or 'no files'}; give files of one kind: {', '.join(FILE_FORMATS)}."
        )
    digest = hashlib.sha256()
    try:
        if not any(file.stat().st_size for file in files):
            raise UsageError(f"{path} is empty. Give a text to --dataset.")
        for file in files:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read: {error.strerror}.") from error
    (kind,) = kinds
    name = path.stem.removesuffix(".jsonl") or path.name
    identity = {"name": name, "revision": digest.hexdigest(), "column": column if kind != "text" else None}
    if kind == "text":
        source = ListedDocuments(
            lambda: (Document(section) for file in files for section in split_paragraphs(read_text(file)))
        )
        return TextSource(name, identity, source, tell)
    import datasets

    def unreadable(problem: str) -> SaeError:
        return UsageError(f"{path} cannot be read as {kind}: {problem}. It may be cut off, or another kind of file.")

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it would say the same before us, with a traceback
    try:
        stream = datasets.load_dataset(kind, data_files=[str(f) for f in files], split="train", streaming=True)
    except Exception as error:
        raise unreadable(first_line(error)) from error
    rows = DatasetReader(stream, column, name=str(path), vocabulary=vocabulary, sentence=unreadable, tell=tell)
    return TextSource(name, identity, rows, tell)


def list_files(path: Path, split: str) -> list[Path]:
    """The files of a text, in order. A folder that `save_to_disk` wrote says which they are."""
    if (path / "dataset_dict.json").is_file():
        splits = read_json(path / "dataset_dict.json", "splits")["splits"]
        if split not in splits:
            raise UsageError(
                f"{path} has no split {split!r}; its splits are {', '.join(map(repr, splits))}. Choose one with --split."
            )
        path = path / split
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        listed = read_json(path / "state.json", "_data_files")["_data_files"]
        return [path / Path(file["filename"]).name for file in listed]
    return sorted(p for p in path.rglob("*") if p.suffix in FILE_FORMATS) if path.is_dir() else [path]


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file} is not UTF-8 text (byte {error.start}). Convert it, or give .jsonl or .parquet."
        ) from error


def split_paragraphs(text: str, at_least: int = 2000) -> Iterator[str]:
    """Runs of paragraphs of at least `at_least` characters: the documents of a plain text file."""
    held, size = [], 0
    for paragraph in text.split("\n\n"):
        held.append(paragraph)
        size += len(paragraph)
        if size >= at_least:
            yield "\n\n".join(held)
            held, size = [], 0
    if any(paragraph.strip() for paragraph in held):
        yield "\n\n".join(held)


def open_hub(
    name: str, revision: str | None, subset: str | None, split: str, column: str, vocabulary: int, tell: Say
) -> TextSource:
    import datasets
    import huggingface_hub

    def unreachable(problem: str) -> SaeError:
        return UnavailableError(
            f"The dataset {name} could not be read: {problem} Check the network and the name, give a local file to --dataset, "
            f"or use the embedded text: --dataset {EMBEDDED_TEXT}"
        )

    try:
        commit = huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=20).sha
        stream = datasets.load_dataset(name, name=subset, revision=commit, split=split, streaming=True)
    except Exception as error:
        raise hub_error(error, name, revision) or unreachable(first_line(error)) from error
    identity = {"name": name, "revision": commit, "split": split, "column": column}
    identity |= {} if subset is None else {"subset": subset}
    rows = DatasetReader(
        stream, column, name=name, vocabulary=vocabulary, sentence=unreachable, tell=tell, waits=RETRY_SECONDS
    )
    return TextSource(name.split("/")[-1], identity, rows, tell)


def hub_error(error: Exception, name: str, revision: str | None) -> SaeError | None:
    """The sentence for a dataset that the Hub has not, or does not give; None when something else is wrong."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError) or isinstance(error.__cause__, GatedRepoError):
        return UnavailableError(
            f"The dataset {name} is gated: accept its terms at https://huggingface.co/datasets/{name}, then run `hf auth login`. "
            f"To try everything without it: --dataset {EMBEDDED_TEXT}"
        )
    if isinstance(error, RepositoryNotFoundError):
        return UnavailableError(
            f"There is no dataset {name} on the Hub that you can read. Check the name; if it is private, run `hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return UsageError(f"The dataset {name} has no revision {revision}. Give a commit with --dataset-revision.")
    if found := re.match(r"(Config name is missing|BuilderConfig .* not found).*?\[(.*?)\]", str(error), re.DOTALL):
        subsets = found[2].split(", ")
        listed = ", ".join(subsets[:MAX_LISTED_SUBSETS]) + (
            f" and {len(subsets) - MAX_LISTED_SUBSETS:,} more" if subsets[MAX_LISTED_SUBSETS:] else ""
        )
        lacking = "has several configurations" if found[1].startswith("Config") else "has no such configuration"
        return UsageError(f"The dataset {name} {lacking}: there are {listed}. Choose one with --subset.")
    if str(error).startswith("Bad split"):
        return UsageError(f"{name}: {first_line(error)}. Choose one with --split.")
    return None
