"""A share of a harvest: the part done by one task of an array job, independently of the other tasks."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..common.errors import UsageError
from ..common.formatting import format_count


@dataclass(frozen=True)
class HarvestShare:
    """Share `number` of `count`, numbered from 1. It contains every count-th window."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> "HarvestShare":
        """The inverse of str. Raises UsageError if the text has another form, or if the number is not from 1 to
        count.
        """
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if match is None:
            raise UsageError(
                f"invalid --share {text!r}: expected the share's number and the number of shares, as in 3/64."
            )
        share = cls(int(match[1]), int(match[2]))
        if not 1 <= share.number <= share.count:
            hint = f" For a job array that begins at 0, give $((SLURM_ARRAY_TASK_ID + 1))/{share.count}." * (
                share.number == 0
            )
            raise UsageError(f"invalid --share {text}: shares are numbered from 1 to {share.count}.{hint}")
        return share

    def windows(self, n_windows: int) -> range:
        """The windows of this share."""
        return range(self.number - 1, n_windows, self.count)


def shares_of(windows: Sequence[int], count: int) -> str:
    """The shares that these windows belong to, as text: "share 5", "shares 5, 9 and 2 others"."""
    numbers = sorted({window % count + 1 for window in windows})
    if len(numbers) == 1:
        return f"share {numbers[0]}"
    named = ", ".join(map(str, numbers[:8]))
    return f"shares {named}" + (f" and {format_count(len(numbers) - 8, 'other')}" if len(numbers) > 8 else "")
