"""How kernels divide their work among programs of the GPU."""

import math
from enum import Enum
from typing import NamedTuple

ROOM = 8192  # elements of a row that a GPU program holds in registers
PROGRAMS = 256  # programs that share a row when it is read several times; an H200 has 132 multiprocessors
CHUNK = 4096  # elements that each of these programs reads at once


class Way(Enum):
    """How the kernels find the k largest elements of a row."""

    ROW = "one program for each row, which is read once"
    PARTS = "one program for each part of a row, which is read once, and one for what they have chosen"
    DIGITS = "several programs for each row, which is read once for each digit of the bound, and once more"


class Division(NamedTuple):
    """How rows are divided among programs."""

    way: Way
    programs: int  # for each row
    span: int  # elements per program

    @classmethod
    def of(
        cls, rows: int, n: int, k: int, room: int = ROOM, programs: int = PROGRAMS, chunk: int = CHUNK
    ) -> "Division":
        """How `rows` rows of n elements are divided among programs that have room for `room` elements each."""
        parts = -(-n // room)
        span = -(-n // parts)
        if parts == 1:
            return cls(Way.ROW, 1, n)
        if parts * min(k, span) <= room:
            return cls(Way.PARTS, parts, span)
        span = -(-n // (max(1, programs // max(rows, 1)) * chunk)) * chunk
        return cls(Way.DIGITS, -(-n // span), span)


TILE = 4096  # elements of rows that a GPU program holds in registers
MOST_ROWS = 256  # maximum number of rows in a tile
JUMP_SPAN = 512  # tokens that a program of JumpReLU's kernels reads, one tile after the other
JUMP_TILE = 16, 128  # tokens and latents in a tile
BATCH_TILE = 32, 128  # tokens and columns of a batch that a program reads
SUM_TILE = 32, 16, 128  # rows that a program adds at once, sums that it computes, and columns of both
PREFIX_SPAN = 128  # tokens that a program of the prefixes' kernels reads, one tile after the other
PREFIX_COLUMNS = 64  # dimensions in a tile
PAIR_TILE = 32, 64  # pairs that a program counts, and words of 64 tokens that it reads at once
THRESHOLD_CHUNK = 1024  # latents that a program loads at once to find the smallest value


def equal_spans(size: int, programs: int, chunk: int) -> tuple[int, int]:
    """How many programs (at most `programs`) share `size` elements, and how many elements (whole chunks) each gets."""
    span = -(-size // (programs * chunk)) * chunk
    return -(-size // span), span


def row_tile(latents: float) -> tuple[int, int]:
    """How many rows and columns a program reads at once if a token has `latents` latents on average. Powers of two.

    The tile has room for a quarter more rows than the average token needs, since some tokens need more.
    """
    rows = min(MOST_ROWS, max(16, 1 << math.ceil(math.log2(max(1.25 * latents, 1)))))
    return rows, TILE // rows


def prefix_tile(prefixes: int) -> tuple[int, int]:
    """How many tokens and dimensions a program reads at once for each prefix. Powers of two."""
    return max(1, TILE // PREFIX_COLUMNS >> (prefixes - 1).bit_length()), PREFIX_COLUMNS
