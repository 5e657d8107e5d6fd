"""How the kernels that update weights divide them among programs of the GPU."""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

LONGEST_ROW = 8192  # elements of a row that a program holds in registers
CHUNK = 2048  # elements of a weight without unit rows that a program updates
ADDING = 1024  # programs that add up the squares of one gradient, at most; an H200 has 132 processors
TILE = 1024  # sums that the program which adds them up reads at once
ELEMENTS = 8  # elements of each tensor that a thread holds


class Rows(NamedTuple):
    """A weight as rows: its own rows if they are unit vectors, else chunks."""

    rows: int
    span: int  # elements of a row
    block: int  # the next power of two

    @classmethod
    def of(cls, shape: Sequence[int], unit: bool) -> "Rows":
        """The layout of a weight; `unit` says whether the rows of a matrix are unit vectors."""
        size = prod(shape)
        rows, span = (shape[0], shape[1]) if unit else (-(-size // CHUNK), min(CHUNK, max(size, 1)))
        return cls(rows, span, 1 << (span - 1).bit_length())

    @property
    def adding(self) -> int:
        """The programs that add up the squares of its gradient."""
        return min(self.rows, ADDING)


def warps(block: int) -> int:
    """The warps (32 threads each) of a program for a row of so many elements."""
    return max(block // ELEMENTS // 32, 1)
