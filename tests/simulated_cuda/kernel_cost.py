"""Formulas for the launches of the kernels in train/kernels, and for the bytes that they load and store.

Each function returns (launches, bytes). Arguments named `element` or `elements` are sizes in bytes. Triton's
interpreter would take minutes to count a step of real size; at small sizes tests/train/kernels compares these formulas
with its counts, to the byte.
"""

from collections.abc import Sequence
from math import prod

from sae.train.kernels.division import Division, Way
from sae.train.kernels.update_layout import Rows

INDEX, NUMBER = 8, 4  # bytes of an index in a result (int64), and of intermediate counts, bounds and indices (int32)
DIGIT = 256 * NUMBER  # bytes of the counts of the values of a digit


def of_largest(division: Division, rows: int, n: int, k: int, element: int) -> tuple[int, int]:
    """Find the k largest of the n elements of each row."""
    if not rows:
        return 0, 0
    way, parts, span = division
    row, result = n * element, k * INDEX
    if way is Way.ROW:
        return 1, rows * (row + result)
    if way is Way.PARTS:
        first = min(k, span)
        chosen = sum(min(first, max(0, n - part * span)) for part in range(parts))
        return 2, rows * (row + 2 * parts * first * NUMBER + chosen * element + result)
    digits = element  # of 8 bits
    counted = digits * (row + parts * (DIGIT + NUMBER)) + (digits - 1) * parts * NUMBER
    chosen = digits * (parts * DIGIT + 2 * NUMBER) + (digits - 1) * 2 * NUMBER + parts * (DIGIT + 3 * NUMBER)
    return 2 * digits + 1, rows * (counted + chosen + row + 3 * parts * NUMBER + result)


def of_decode(counts: Sequence[float], width: int, element: int, tile: tuple[int, int]) -> tuple[int, int]:
    """Decode tokens with `counts` latents each, from rows of `width` elements."""
    if not counts:
        return 0, 0
    (block, chunk), moved = tile, -INDEX  # the last token has no next start to read
    chunks = -(-width // chunk)
    for count in counts:
        first, more = min(count, block), max(count - block, 0)
        index, row = INDEX + NUMBER, width * element
        read_again = -(-more // block) * 2 * width * NUMBER  # reconstruction and x
        moved += 2 * INDEX + first * (index + row + NUMBER) + more * (chunks * index + INDEX + 2 * row + NUMBER)
        moved += read_again + 3 * width * NUMBER + NUMBER  # bias, x and reconstruction, and the squared error
    return 1, round(moved)


def of_sums(counts: Sequence[float], width: int, element: int, chunk: int) -> tuple[int, int]:
    """Compute sums of `counts` rows each, of `width` elements, in chunks."""
    chunks, rows = -(-width // chunk), sum(counts)
    per_chunk = 2 * len(counts) * INDEX - INDEX + rows * (INDEX + NUMBER)
    return 1, round(chunks * per_chunk + rows * width * element + len(counts) * width * NUMBER)


def of_jump(tokens: int, width: int, elements: int, sums: int, span: int) -> tuple[int, int]:
    """A kernel of JumpReLU that reads or writes `elements` bytes for each pre-activation, and `sums` sums."""
    parts = -(-tokens // span)
    return 1, tokens * width * elements + parts * width * (1 + sums) * NUMBER


def of_gate(
    tokens: int, width: int, elements: int, sums: int, scalars: int, span: int, columns: int
) -> tuple[int, int]:
    """A kernel of the gated SAE that reads or writes `elements` bytes for each pre-activation, and `sums` sums.

    Each program also reads three parameters of each of its latents, and `scalars` single numbers.
    """
    parts = -(-tokens // span)
    programs = parts * -(-width // columns)
    return 1, tokens * width * elements + (parts * width * (3 + sums) + programs * scalars) * NUMBER


def of_prefixes(shape: Sequence[int], element: int, span: int, columns: int, gradients: bool) -> tuple[int, int]:
    """Compare partial reconstructions of this shape (G, B, D) with x, or compute their gradients."""
    prefixes, tokens, width = shape
    parts = -(-tokens // span)
    programs, read = parts * -(-width // columns), prod(shape) * element + tokens * width * NUMBER
    written = prod(shape) * element + parts * width * NUMBER if gradients else tokens * width * NUMBER
    return 1, read + written + (parts * width + programs * prefixes) * NUMBER


def of_pairs(pairs: int, words: int) -> tuple[int, int]:
    """Count the common bits of pairs of rows of `words` words. A word has 8 bytes, and so has a result."""
    return 1, pairs * (2 * INDEX + 2 * words * 8 + 8)


def of_following(latents: int, element: int, parts: int) -> tuple[int, int]:
    """Move a threshold towards the smallest of `latents` latents."""
    return 2, latents * element + 2 * parts * NUMBER + 2 * (NUMBER + INDEX)


def of_normalizing(
    tokens: int, width: int, elements: tuple[int, int], subtracts: bool, tile: tuple[int, int]
) -> tuple[int, int]:
    """Normalize a batch. `elements` are for the batch and for the encoder's input."""
    parts, blocks = -(-tokens // tile[0]), -(-width // tile[1])
    first = tokens * width * (sum(elements) + NUMBER) + parts * width * (3 + subtracts) * NUMBER
    return 2, first + 2 * parts * width * NUMBER + (2 * parts + 1) * blocks * NUMBER


def of_comparing(tokens: int, width: int, element: int, tile: tuple[int, int]) -> tuple[int, int]:
    """Compute the error of a reconstruction. `element` is for the product with the decoder."""
    parts, blocks = -(-tokens // tile[0]), -(-width // tile[1])
    return 1, tokens * width * (element + 2 * NUMBER) + parts * (width + blocks) * NUMBER


def of_comparing_backward(tokens: int, width: int, element: int, tile: tuple[int, int]) -> tuple[int, int]:
    """Compute the gradient of that error. `element` is for the gradient."""
    parts, blocks = -(-tokens // tile[0]), -(-width // tile[1])
    return 1, tokens * width * (element + NUMBER) + parts * (width + blocks) * NUMBER


def of_update(
    shapes: Sequence[Sequence[int]], elements: Sequence[int], unit: Sequence[bool], copies: int, averaged: bool
) -> tuple[int, int]:
    """Update weights of these shapes by one step. `elements` are for their gradients.

    `unit` says which weights have rows of unit norm; the first `copies` weights also have a bfloat16 copy. `averaged`
    says whether the first moment is read and written.
    """
    moved = sums = 0
    for n, (shape, element, is_unit) in enumerate(zip(shapes, elements, unit, strict=True)):
        layout, size = Rows.of(shape, is_unit), prod(shape)
        sums += layout.adding
        added = size * (element + (NUMBER if is_unit else 0)) + NUMBER * layout.adding
        updated = size * (element + (6 if averaged else 4) * NUMBER + (2 if n < copies else 0))
        moved += added + updated + layout.rows * (6 * NUMBER + INDEX)
    return 2 * len(shapes) + 1, moved + NUMBER * sums + 4 * NUMBER + 3 * INDEX
