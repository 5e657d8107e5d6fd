"""How the kernels that update weights divide the weights among GPU programs."""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

LONGEST_ROW = 8192  # elements of a row that a program holds in registers
CHUNK = 2048  # elements of a weight without unit rows that a program updates
ADDING = 1024  # maximum number of programs that add up the squares of one gradient; an H200 has 132 multiprocessors
TILE = 1024  # sums read at once by the program that adds up all of them
ELEMENTS = 8  # elements of each tensor that a thread holds


class Rows(NamedTuple):
    """A weight divided into rows: its own rows if they are unit vectors, otherwise chunks."""

    rows: int
    span: int  # elements in a row
    block: int  # `span` rounded up to a power of two

    @classmethod
    def of(cls, shape: Sequence[int], unit: bool) -> "Rows":
        """The layout of a weight; `unit` says whether the rows of a matrix are unit vectors."""
        size = prod(shape)
        rows, span = (shape[0], shape[1]) if unit else (-(-size // CHUNK), min(CHUNK, max(size, 1)))
        return cls(rows, span, 1 << (span - 1).bit_length())

    @property
    def adding(self) -> int:
        """The number of programs that add up the squares of the weight's gradient."""
        return min(self.rows, ADDING)


def warps(block: int) -> int:
    """The number of warps (32 threads each) in a program for a row of `block` elements."""
    return max(block // ELEMENTS // 32, 1)
