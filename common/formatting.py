"""Format counts, sizes, durations, shell arguments and long values for people."""

import re
from collections.abc import Sequence
from pathlib import Path

from .escaping import quote

LONGEST_WORD, LONGEST_LINE = 400, 4000  # characters; longer words and lines are shortened


def format_count(number: int, noun: str) -> str:
    """A count and its noun: `1 run`, `2 runs`, `1,200 files`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_bytes(count: float) -> str:
    """A size in GB, or in MB below 0.1 GB (decimal units): `1.50 GB`, `12.3 MB`."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def format_duration(seconds: float) -> str:
    """A duration in the largest unit that gives at least 2: `90 s`, `3.5 min`, `2.0 h`, `4.2 days`."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def shell_paths(paths: Sequence[Path]) -> str:
    """Paths as shell arguments: `folder/*` if there are three or more and the folder contains nothing else."""
    parents = {Path(path).parent for path in paths}
    if len(parents) == 1 and len(paths) > 2:
        parent = parents.pop()
        if {child for child in parent.iterdir() if not child.name.startswith(".")} == set(map(Path, paths)):
            return f"{quote(parent)}/*"
    return " ".join(quote(path) for path in paths)


def shorten_values(message: str) -> str:
    """A message in which the middle of each very long word or line, such as a value given by a user, is left out."""
    message = re.sub(rf"\S{{{LONGEST_WORD + 1},}}", lambda match: _without_middle(match[0], LONGEST_WORD), message)
    return "\n".join(_without_middle(line, LONGEST_LINE) for line in message.split("\n"))


def _without_middle(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]} ... ({len(text):,} characters) ... {text[-longest // 4 :]}"
