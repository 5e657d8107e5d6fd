"""Check a model's answer about an attribute of an entity with the rules of SAEBench 0.6.0 (`ravel/validation.py`).

In general, an answer is right if it begins with the expected value or if the expected value begins with it. Some
values have their own rules, because they have several names or because models do not state them to the last digit.
"""

import contextlib
import datetime
import re
from zoneinfo import ZoneInfo

DEGREES = 2  # allowed error of a coordinate
PLACE_WORDS = ("coord", "latitude", "longitude")  # words in questions about a coordinate


def is_right(text: str, value: str, answer: str) -> bool:
    """Whether `answer`, which continues the question `text`, says `value`. An answer ends at a quotation mark."""
    said = answer.split('"')[0].strip(' "').replace("\\/", "/").lower()
    if not value or not said:
        return False
    expected = value.lower()
    if any(word in text for word in PLACE_WORDS):
        return is_near(expected, said)
    if "United States" in value or "United Kingdom" in value:  # case-sensitive, and not cut at a quotation mark
        whole = answer.strip().replace("the ", "")
        return whole.startswith((value.strip().replace("the ", ""), "England"))
    if "South Korea" in value:
        return said.startswith(("korea", "south korea"))
    if "North America" in value:
        return expected in said or said == "na" or said.startswith("america")
    if "Mandarin" in value:
        return said in expected or said == "chinese"
    if "language" in text and "," in expected:
        return any(language in said for language in expected.split(","))
    if "UTC" in text and "/" in expected:
        return is_offset(value, said)
    return said.startswith(expected) or expected.startswith(said)


def is_near(expected: str, said: str) -> bool:
    """Whether the first whole number of an answer is within DEGREES of a coordinate, ignoring the sign."""
    number = re.search(r"\d+", said)
    with contextlib.suppress(ValueError):
        return number is not None and abs(float(expected.strip("-−")) - float(number[0])) <= DEGREES
    return False


def is_offset(zone: str, said: str) -> bool:
    """Whether an answer begins with the UTC offset, in hours, of a time zone such as Europe/Paris.

    The offsets in winter and in summer are both right. SAEBench accepts the offset on the day of its run and, for some
    zones, every offset within one hour of that offset.
    """
    number = re.match(r"\s*([+\-−]?)\s*(\d{1,2})", said)
    if number is None:
        return False
    hours = int(number[2]) * (-1 if number[1] in ("-", "−") else 1)
    with contextlib.suppress(Exception):  # there is no such zone, or this machine has no time zone data
        days = (datetime.datetime(2024, month, 1, tzinfo=ZoneInfo(zone)).utcoffset() for month in (1, 7))
        return hours in {int(offset.total_seconds() / 3600) for offset in days if offset is not None}
    return False
