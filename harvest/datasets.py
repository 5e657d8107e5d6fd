"""Open a text: the embedded corpus, local files, a dataset saved to disk, or a dataset on the Hub."""

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..common.errors import SaeError, UnavailableError, UsageError, first_line
from ..common.remote_code import load_dataset
from ..common.tables import Unreadable
from .dataset_reader import RETRY_SECONDS, Column, DatasetReader, FileReader
from .documents import Document, DocumentReader, ListedDocuments, TextSource
from .files import FILE_FORMATS, WHOLE, list_files
from .mini import corpus, spelling

PILE = "monology/pile-uncopyrighted"
EMBEDDED_TEXT = "python-stdlib"
SPELLING_LINES = 40  # spelling lines after each embedded document; about a tenth of all tokens
MAX_LISTED_SUBSETS = 20  # in an error message
MIN_SECTION = 2000  # least number of characters in a document cut from a plain text file
SEARCHED = {".txt", ".jsonl", ".json"}  # files that contain their text uncompressed
MOST_SEARCHED = 2**28  # bytes

Say = Callable[[str], None]  # called with a message for the user


def open_text(
    name: str, *, tokenizer: Any, revision: str | None, split: str, column: str, seed: int,
    say: Say = lambda sentence: None, subset: str | None = None, chat: bool = False,
) -> TextSource:  # fmt: skip
    """Open a text by name: "python-stdlib", a local file or folder, or a dataset on the Hub, which is streamed.

    With `chat`, the column holds conversations.

    Raises UsageError for a file that cannot be read or a missing column or split, and UnavailableError if the Hub
    cannot be reached.
    """
    path = Path(name)
    if subset is not None and (name == EMBEDDED_TEXT or path.is_file()):
        raise UsageError(f"--subset selects a configuration of a dataset, but {name} has none. Leave it out.")
    if name == EMBEDDED_TEXT and split not in WHOLE:
        raise UsageError(f"--split selects a split of a dataset, but {name} has no splits. Leave it out.")
    if name == EMBEDDED_TEXT:
        refuse_chat(name, chat)
        return open_embedded(tokenizer, seed, say)
    if path.exists():
        return open_local(path, subset, split, column, len(tokenizer), say, chat)
    if path.suffix.lower() in FILE_FORMATS or name.startswith((".", "/")):
        raise UsageError(
            f"There is no file {name}. Give a .txt, .jsonl, .parquet or .arrow file, a folder of them, a Hub dataset, "
            f"or {EMBEDDED_TEXT}."
        )
    return open_hub(name, revision, subset, split, column, len(tokenizer), say, chat)


def refuse_chat(name: str, chat: bool) -> None:
    if chat:
        raise UsageError(
            f"--chat-column needs a --dataset with a column of messages, and {name} is plain text without columns."
        )


def open_embedded(tokenizer: Any, seed: int, say: Say) -> TextSource:
    """The standard library of the running Python, with lines of spelling after each harvested document."""
    # Documents are ordered by a hash, so that a small harvest is a representative sample.
    library = sorted(corpus.stdlib_documents(), key=lambda d: hashlib.sha256(d.name.encode()).digest())
    digest = hashlib.sha256()
    for document in library:
        digest.update(f"{document.name}\0{document.text}\0".encode())
    words = spelling.spelling_words(tokenizer)

    def documents() -> Iterator[Document]:
        rng = random.Random(seed)
        for document in library:
            yield Document(document.text, document.held_out)
            if not document.held_out:  # a held-out spelling line would almost always repeat a harvested line
                lines = (spelling.spelling_line(rng.choice(words)) for _ in range(SPELLING_LINES))
                yield Document("".join(f"\n{line}" for line in lines), held_out=False)

    identity = {"name": EMBEDDED_TEXT, "revision": digest.hexdigest(), "spelled_lines": SPELLING_LINES}
    return TextSource(
        EMBEDDED_TEXT, identity, ListedDocuments(documents), say,
        may_contain=lambda strings: any(string in document.text for document in library for string in strings),
    )  # fmt: skip


def open_local(
    path: Path, subset: str | None, split: str, column: str, vocabulary: int, say: Say, chat: bool
) -> TextSource:
    """Open files of one format. A line of JSON or a row of a table is a document; plain text is cut at blank lines."""
    files = list_files(path, subset, split, say)
    suffixes = {file.suffix.lower() for file in files}
    formats = {FILE_FORMATS.get(suffix) for suffix in suffixes}
    if len(formats) != 1 or None in formats:
        found = " and ".join(sorted(suffix or "files without a suffix" for suffix in suffixes)) or "no files"
        raise UsageError(f"{path} has {found}; expected files of one format: {', '.join(FILE_FORMATS)}.")
    is_text = formats == {"text"}
    name = path.stem.removesuffix(".jsonl") or path.name
    identity = {"name": name, "revision": digest_of_files(path, files), "column": None if is_text else column}
    reader: DocumentReader
    if is_text:
        refuse_chat(name, chat)
        reader = ListedDocuments(lambda: (section for file in files for section in read_sections(file)))
    else:
        reader = FileReader(files, Column(column, source=str(path), vocabulary=vocabulary, chat=chat))
    return TextSource(name, identity, reader, say, may_contain=lambda strings: files_may_contain(files, strings))


def files_may_contain(files: list[Path], strings: Sequence[str]) -> bool:
    """False if none of these strings occurs in the files; True if one of them might.

    Compressed and large files are not searched: the answer for them is True.
    """
    if (
        any(file.suffix.lower() not in SEARCHED for file in files)
        or sum(file.stat().st_size for file in files) > MOST_SEARCHED
    ):
        return True
    spellings = {string.encode() for string in strings}
    # JSON can write any character as \u1234, and can escape a slash with a backslash.
    escapes = {rf"\u{ord(character):04x}".encode() for string in strings for character in string if character.isascii()}
    escapes |= {string.replace("/", r"\/").encode() for string in strings}
    for file in files:
        data = file.read_bytes()
        if any(spelling in data for spelling in spellings):
            return True
        if file.suffix.lower() != ".txt" and b"\\" in data and any(escape in data.lower() for escape in escapes):
            return True
    return False


def digest_of_files(path: Path, files: list[Path]) -> str:
    """sha256 over the bytes of all files. Raises UsageError if all files are empty or a file cannot be read."""
    digest = hashlib.sha256()
    try:
        if not any(file.stat().st_size for file in files):
            raise UsageError(f"{path} is empty. Give a text with --dataset.")
        for file in files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


def read_sections(file: Path) -> Iterator[Document]:
    """The sections of a text file; a section with bytes that are not UTF-8 becomes Unreadable."""
    text = file.read_text(encoding="utf-8", errors="surrogateescape")
    line = 1
    for section in split_paragraphs(text):
        try:
            section.encode()
        except UnicodeEncodeError as error:
            byte, place = ord(section[error.start]) - 0xDC00, line + section.count("\n", 0, error.start)
            yield Document(Unreadable(f"{file.name} line {place}: the byte {byte:#x} is not UTF-8"))
        else:
            yield Document(section)
        line += section.count("\n") + 2


def split_paragraphs(text: str, min_characters: int = MIN_SECTION) -> Iterator[str]:
    """The documents of a plain text file: runs of paragraphs with at least `min_characters` characters in total."""
    section: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        section.append(paragraph)
        size += len(paragraph)
        if size >= min_characters:
            yield "\n\n".join(section)
            section, size = [], 0
    if any(paragraph.strip() for paragraph in section):
        yield "\n\n".join(section)


def open_hub(
    name: str, revision: str | None, subset: str | None, split: str, column: str, vocabulary: int, say: Say, chat: bool
) -> TextSource:
    """Open a dataset on the Hub at a pinned commit, for streaming."""
    import huggingface_hub

    def unreachable(problem: str) -> SaeError:
        return UnavailableError(
            f"The dataset {name} could not be read: {problem.rstrip('.')}. Check the network and the name, give a "
            f"local file to --dataset, or use the embedded text: --dataset {EMBEDDED_TEXT}"
        )

    try:
        commit = huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=20).sha
        stream = load_dataset(name, name=subset, revision=commit, split=split, streaming=True)
    except Exception as error:
        raise hub_error(error, name, revision) or unreachable(first_line(error)) from error
    identity = {"name": name, "revision": commit, "split": split, "column": column}
    identity |= {} if subset is None else {"subset": subset}
    rows = DatasetReader(
        stream, Column(column, source=name, vocabulary=vocabulary, chat=chat), make_error=unreachable, say=say,
        retry_seconds=RETRY_SECONDS,
    )  # fmt: skip
    return TextSource(name.split("/")[-1], identity, rows, say)


def hub_error(error: Exception, name: str, revision: str | None) -> SaeError | None:
    """The error to raise if the dataset, revision, subset or split does not exist or access is denied; else None."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError) or isinstance(error.__cause__, GatedRepoError):
        return UnavailableError(
            f"The dataset {name} is gated: accept its terms at https://huggingface.co/datasets/{name}, then run "
            f"`hf auth login`. To try `sae` without this dataset, use --dataset {EMBEDDED_TEXT}"
        )
    if isinstance(error, RepositoryNotFoundError):
        return UnavailableError(
            f"There is no dataset {name} on the Hub that you can read. Check the name. For a private dataset, run "
            "`hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return UsageError(f"The dataset {name} has no revision {revision}. Give a commit with --dataset-revision.")
    if match := re.match(r"(Config name is missing|BuilderConfig .* not found).*?\[(.*?)\]", str(error), re.DOTALL):
        subsets = match[2].split(", ")
        more = len(subsets) - MAX_LISTED_SUBSETS
        listed = ", ".join(subsets[:MAX_LISTED_SUBSETS]) + (f" and {more:,} more" if more > 0 else "")
        problem = "has several configurations" if match[1].startswith("Config") else "has no such configuration"
        return UsageError(f"The dataset {name} {problem}. Choose one with --subset: {listed}.")
    if str(error).startswith("Bad split"):
        return UsageError(f"{name}: {first_line(error)}. Choose one with --split.")
    return None
