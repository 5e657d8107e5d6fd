"""Numbers, times and sizes as text for a reader."""

from collections.abc import Sequence
from pathlib import Path
from shlex import quote


def format_count(number: int, noun: str) -> str:
    """A number of things for a reader: 1 run, 2 runs."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_duration(seconds: float) -> str:
    """A time for a reader: seconds, minutes, hours or days."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def format_bytes(count: float) -> str:
    """A number of bytes for a reader: GB, or MB below a tenth of one."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def shell_paths(paths: Sequence[Path]) -> str:
    """Paths as arguments of a shell command: `folder/*` when they are all there is in a folder."""
    parents = {Path(path).parent for path in paths}
    if len(parents) == 1 and len(paths) > 2:
        parent = parents.pop()
        if {child for child in parent.iterdir() if not child.name.startswith(".")} == set(map(Path, paths)):
            return f"{quote(str(parent))}/*"
    return " ".join(quote(str(path)) for path in paths)
