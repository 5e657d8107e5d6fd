"""Launches of the kernels of train/kernels, and the bytes that they load and store.

Formulas, since the interpreter takes minutes for the sizes of a real step. tests/train/kernels compares them with what
the interpreter counts, to the byte.
"""

from sae.train.kernels.division import Division, Way

INDEX, NUMBER = 8, 4  # bytes of a resulting index (int64), and of counts, bounds and places in between (int32)
DIGIT = 256 * NUMBER  # of the counts of a digit's values


def of_largest(division: Division, rows: int, n: int, k: int, element: int) -> tuple[int, int]:
    """Of the k largest of each row of n elements of so many bytes."""
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
