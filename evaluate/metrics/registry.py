"""Which metrics there are, and which a user asks for by the name of a suite."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ...common.errors import UsageError, did_you_mean
from .absorption import Absorption
from .autointerp import Autointerp
from .base import Metric
from .core import Core
from .scr import Scr, ScrStdlib
from .sparse_probing import SparseProbing, SparseProbingStdlib
from .tpp import Tpp, TppStdlib
from .unlearning import Unlearning

METRIC_CLASSES = (
    Core,
    Absorption,
    SparseProbing,
    SparseProbingStdlib,
    Scr,
    ScrStdlib,
    Tpp,
    TppStdlib,
    Unlearning,
    Autointerp,
)
METRICS: dict[str, type[Metric]] = {metric.name: metric for metric in METRIC_CLASSES}
OPT_IN = ("autointerp",)  # it costs money: in no suite, unless an option of it is set
SUITES = {
    "quick": ("core", "absorption", "sparse_probing_stdlib", "scr_stdlib", "tpp_stdlib"),
    "full": tuple(name for name in METRICS if name not in OPT_IN),
}


def metrics_of_suite(suite: str, options: Sequence[str] = ()) -> list[Metric]:
    """The metrics of a suite, or of a list of names; `options` are `metric.option=value`. Names every mistake at once."""
    names = SUITES.get(suite) or tuple(dict.fromkeys(name for part in suite.split(",") if (name := part.strip())))
    if not names:
        raise UsageError(f"--suite {suite!r} names no metric; there are {', '.join([*SUITES, *METRICS])}.")
    names += tuple(name for name in OPT_IN if suite in SUITES and any(o.startswith(f"{name}.") for o in options))
    wrong = [
        f"--suite {suite}: {name} is a suite, which stands alone; name the metrics, such as {','.join(SUITES['quick'][:2])}."
        if name in SUITES
        else f"--suite {suite}: there is no metric {name}{did_you_mean(name, [*METRICS, *SUITES])}"
        for name in names
        if name not in METRICS
    ]
    asked: dict[str, dict[str, Any]] = {name: {} for name in names}
    for option in options:
        metric, _, rest = option.partition(".")
        name, equals, text = rest.partition("=")
        known = {f.name: f.default for f in fields(METRICS[metric])} if metric in METRICS else {}
        if not equals or metric not in asked or name not in known:
            wrong.append(
                f"--set {option}: write metric.option=value, with a metric of this suite"
                + (f" and an option of {metric}{did_you_mean(name, known)}" if known and name not in known else ".")
            )
            continue
        try:
            asked[metric][name] = parse_like(known[name], text)
        except ValueError:
            wrong.append(f"--set {option}: {text!r} is no value for {name}, which is {known[name]!r} by default.")
    if wrong:
        raise UsageError("\n".join(wrong))
    return [METRICS[name](**asked[name]) for name in names]


def parse_like(default: Any, text: str) -> Any:
    """The text as a value of the default's kind; of a tuple's elements (of an empty one: int), with commas between."""
    if isinstance(default, tuple):
        return tuple(parse_like(default[0] if default else 0, part.strip()) for part in text.split(","))
    if isinstance(default, bool):
        return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else int("")
    return type(default)(text)
