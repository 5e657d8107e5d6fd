"""Parse user input: widths, and recipe options given with --set."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..common.errors import UsageError
from ..common.files import parse_toml
from .recipe import Recipe, matches_type

MAX_WIDTH = 2**31  # latents


def parse_width(text: str | None, recipe: Recipe, d_in: int) -> int:
    """d_sae from "4x" (times d_in), "16k" (times 1024) or a number. None: the recipe's width."""
    if text is None:
        return round(recipe.width * d_in)
    number, unit = split_width(text)
    return round(number * {"x": d_in, "k": 1024, "": 1}[unit])


def split_width(text: str) -> tuple[float, str]:
    """The number and the unit ("x", "k" or "") of a width. Raises UsageError for an impossible width."""
    unit = text[-1:].lower() if text[-1:].lower() in ("x", "k") else ""
    try:
        number = float(text[:-1]) if unit else int(text)
        if not 0 < number < math.inf:
            raise ValueError
    except ValueError:
        raise UsageError(
            f"invalid --width {text}: give a positive number such as 2304, 16k, or 8x for eight times d_in."
        ) from None
    if number >= MAX_WIDTH:
        raise UsageError(f"--width {text} is too large for any machine. Give a number such as 2304, 16k, or 8x.")
    return number, unit


def parse_options(options: Mapping[str, Any] | Sequence[str], recipes: Sequence[Recipe]) -> dict[str, dict[str, Any]]:
    """The options of each recipe: {variant: {option: value}}.

    `options` maps "option" or "variant.option" to values, or is a list of strings as given to --set: "option=value". An
    option without a variant is passed to every recipe that has it. --set reads `none` as None. If an option accepts the
    string "none" but does not accept None, None is replaced by that string.
    """
    parsed: dict[str, dict[str, Any]] = {recipe.name: {} for recipe in recipes}
    for key, value in (options if isinstance(options, Mapping) else split_options(options)).items():
        variant, dot, option = key.rpartition(".")
        if dot and variant not in parsed:
            raise UsageError(f"--set {key}: {variant} is not one of the variants {', '.join(parsed)}.")
        targets = [variant] if dot else [r.name for r in recipes if option in r.option_types()] or list(parsed)
        for recipe in recipes:
            if recipe.name in targets:
                parsed[recipe.name][option] = "none" if value is None and has_string_none(recipe, option) else value
    return parsed


def has_string_none(recipe: Recipe, option: str) -> bool:
    """Whether an option accepts the string "none" but does not accept None."""
    types = recipe.option_types()
    return option in types and matches_type("none", types[option]) and not matches_type(None, types[option])


def split_options(texts: Sequence[str]) -> dict[str, Any]:
    """Convert the "key=value" strings of --set to a mapping."""
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text} has no value: write --set option=value, or variant.option=value.")
        if key in options:
            raise UsageError(f"--set gives {key} more than once. Run one command for each value.")
        options[key] = parse_value(value)
    return options


def parse_value(text: str) -> Any:
    """Parse a TOML value. `none` becomes None, and text that is not valid TOML stays a string."""
    if text.lower() == "none":
        return None
    try:
        parsed = parse_toml(f"value = {text}", "--set")
    except UsageError:
        return text
    return parsed["value"] if len(parsed) == 1 else text
