"""The numbers in a quoted line of a paper."""

import math
import re

NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]}%])[-−+])?(?P<digits>\d{1,3}(?:,\d{3})+(?![\d,])(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?:\s*(?:×|\\times)\s*10\^\{?(?P<power>[-−]?\d+)\}?)?"
)
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def printed_numbers(quote: str) -> list[tuple[float, int]]:
    """The numbers in a line, each with its number of printed decimals.

    1,735 is one number. In 5.4x, 3.5×, 82.4% and ±0.0002, the unit or the ± is ignored. A hyphen between two numbers is
    not a minus. 3×10^{-4} is one number with 4 decimals.
    """
    numbers = []
    for match in NUMBER.finditer(quote):
        digits = match["digits"].replace(",", "")
        power = int((match["power"] or "0").replace("−", "-"))
        sign = -1 if match["sign"] in ("-", "−") else 1
        numbers.append((sign * float(f"{digits}e{power}"), len(digits.partition(".")[2]) - power))
    words = re.findall(r"[a-z]+", quote.lower())
    return numbers + [(float(NUMBER_WORDS.index(word)), 0) for word in words if word in NUMBER_WORDS]


def is_same_number(number: float, value: float, either_sign: bool = False) -> bool:
    """Whether a printed number equals the value or, if `either_sign` is true, its negative, because the sign of a
    change is often expressed in words."""
    return math.isclose(number, value, rel_tol=1e-9) or (either_sign and math.isclose(number, -value, rel_tol=1e-9))
