"""Check that the papers contain the quotes of `evaluate/papers/*.toml`, and that the quotes contain the papers'
numbers.

    python benchmarks/check_quotes.py --papers DIR # DIR contains the papers as text: DIR/000*.txt and so on

Runs of white space count as one space, and a hyphen at the end of a line may or may not be part of the word. Prints the
quotes that are not found, and the numbers of a paper that are in no quote, so that no claim is missed. Numbers in
formulas, headings, citations, names and the list of references are not results and are left out. Exits with 1 if
anything was printed.
"""

import argparse
import re
import sys
from pathlib import Path

from sae.evaluate.papers.claims import PAPERS, Paper
from sae.evaluate.papers.parse import load_paper
from sae.evaluate.papers.quotes import NUMBER

REFERENCES = re.compile(r"^\W*REFERENCES\s*$", re.MULTILINE)
# Numbers that are neither a result nor a setting. A section number is one or two digits before a capital letter.
NAMES = re.compile(
    r"\$\$.*?\$\$"  # formulas on lines of their own
    r"|\b(?:19|20)\d\d[ab]?\)"  # citations
    r"|Gemma-2-2B|Gemma-2B|bfloat16|\bL[012]\b"
    r"|(?:Figures?|Sections?|Tables?|Equations?|\(Run) \d(?:\.\d)?(?: and \d)?"
    r"|\(\d\)|\\tag\{\d\}"  # equations, and points of a list
    r"|(?<![\d.])\d(?:\.\d)?\.? (?=\+?[A-Z*]|autoencoder)"  # sections, and points of a list
    r"|[_^]\{?\d|\\(?:in|sim|mathbb)\b[^$]*\$"  # indices
)


def normal(text: str, hyphen: str) -> str:
    return " ".join(re.sub(r"-[ \t]*\n\s*", hyphen, text).split())


def missing(paper: Paper, text: str) -> list[str]:
    forms = [normal(text, hyphen) for hyphen in ("-", "")]
    return [quote for quote in dict.fromkeys(paper.quotes()) if not any(normal(quote, "-") in form for form in forms)]


def loose_numbers(paper: Paper, text: str) -> list[str]:
    """The numbers outside all quotes and names, each with its surrounding text."""
    body = normal(REFERENCES.split(text)[0], "-")
    quoted = [False] * len(body)
    spans = [match.span() for match in NAMES.finditer(body)]
    for quote in paper.quotes():
        spans += [match.span() for match in re.finditer(re.escape(normal(quote, "-")), body)]
    for start, end in spans:
        quoted[start:end] = [True] * (end - start)
    places = [match.start("digits") for match in NUMBER.finditer(body)]
    return [f"{body[max(0, at - 60) : at]}>>{body[at : at + 50]}" for at in places if not quoted[at]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--papers", type=Path, required=True, help="a folder with the papers as text files")
    args = parser.parse_args()
    failed = 0
    for number in PAPERS:
        files = sorted(args.papers.glob(f"{number}*.txt"))
        if len(files) != 1:
            print(f"{args.papers} has {len(files)} files {number}*.txt; expected one.", file=sys.stderr)
            return 2
        paper, text = load_paper(number), files[0].read_text(encoding="utf-8")
        gone, loose = missing(paper, text), loose_numbers(paper, text)
        failed += len(gone) + len(loose)
        print(f"{number}: {len(set(paper.quotes()))} quotes, {len(gone)} not found; {len(loose)} numbers in no quote")
        print("".join(f"  not found: {quote}\n" for quote in gone), end="")
        print("".join(f"  in no quote: {line}\n" for line in loose), end="")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
