"""The list of all metrics, the suites built from them, and the parser of `--suite` and `--set`.

To add a metric, write one new file with a subclass of `base.Metric` and add that class to METRIC_CLASSES.
"""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from ...common.errors import UsageError, did_you_mean
from .absorption import Absorption
from .autointerp import Autointerp
from .base import Metric
from .core import Core
from .ravel import Ravel, RavelFacts
from .sae_probes import SaeProbes
from .scr import Scr, ScrStdlib
from .sparse_probing import SparseProbing, SparseProbingStdlib
from .stability import Stability
from .tpp import Tpp, TppStdlib
from .unlearning import Unlearning

METRIC_CLASSES: tuple[type[Metric], ...] = (
    Core,
    Absorption,
    SparseProbing,
    SparseProbingStdlib,
    SaeProbes,
    Scr,
    ScrStdlib,
    Tpp,
    TppStdlib,
    Unlearning,
    Stability,
    Ravel,
    RavelFacts,
    Autointerp,
)
METRICS = {metric.name: metric for metric in METRIC_CLASSES}
# Metrics that are part of a suite only if `--set` sets one of their options: a judge costs money, and ravel_facts needs
# a model that knows geography.
OPT_IN = ("autointerp", "ravel_facts")
SUITES = {
    "quick": ("core", "absorption", "sparse_probing_stdlib", "stability"),
    "full": tuple(name for name in METRICS if name not in OPT_IN),
}


def caveats(metrics: Iterable[str]) -> list[str]:
    """The known weaknesses of these metrics: one sentence for each metric with a `caveat`."""
    return [f"{name}: {METRICS[name].caveat}" for name in metrics if METRICS[name].caveat]


def metrics_of_suite(suite: str, options: Sequence[str] = ()) -> list[Metric]:
    """The metrics that `--suite` and `--set` select.

    `suite` is the name of a suite or a comma-separated list of metrics; `options` are `metric.option=value`. Raises one
    UsageError that lists every mistake.
    """
    names = metric_names(suite, options)
    values: dict[str, dict[str, Any]] = {name: {} for name in names}
    mistakes = [unknown_metric(suite, name) for name in names if name not in METRICS]
    for option in options:
        try:
            metric, name, value = parse_option(option, names)
            values[metric][name] = value
        except UsageError as error:
            mistakes.append(str(error))
    if mistakes:
        raise UsageError("\n".join(mistakes))
    return [METRICS[name](**values[name]) for name in names]


def metric_names(suite: str, options: Sequence[str]) -> tuple[str, ...]:
    names = SUITES.get(suite) or tuple(dict.fromkeys(name for part in suite.split(",") if (name := part.strip())))
    if not names:
        raise UsageError(f"--suite {suite!r} names no metric. Choose from {', '.join([*SUITES, *METRICS])}.")
    if suite in SUITES:
        names += tuple(name for name in OPT_IN if any(option.startswith(f"{name}.") for option in options))
    return names


def unknown_metric(suite: str, name: str) -> str:
    if name in SUITES:
        example = ",".join(SUITES["quick"][:2])
        return (
            f"--suite {suite}: {name} is a suite and cannot be combined with metrics. List the metrics "
            f"instead, such as {example}."
        )
    return f"--suite {suite}: there is no metric {name}{did_you_mean(name, [*METRICS, *SUITES])}"


def parse_option(option: str, names: Sequence[str]) -> tuple[str, str, Any]:
    """Split `metric.option=value` into the metric, its option, and the value, in the type of the option's default."""
    metric, _, rest = option.partition(".")
    name, equals, text = rest.partition("=")
    defaults = {f.name: f.default for f in fields(METRICS[metric])} if metric in METRICS else {}
    if not equals or metric not in names or name not in defaults:
        hint = f" and an option of {metric}{did_you_mean(name, defaults)}" if defaults and name not in defaults else "."
        raise UsageError(f"--set {option}: write metric.option=value, with a metric of this suite{hint}")
    try:
        return metric, name, parse_like(defaults[name], text)
    except ValueError:
        raise UsageError(
            f"--set {option}: {text!r} is not a valid value for {name}, which is {defaults[name]!r} by default."
        ) from None


def parse_like(default: Any, text: str) -> Any:
    """Convert text to the type of `default`. Raises ValueError.

    A tuple's elements are separated by commas and have the type of the default's first element (int if the default is
    empty).
    """
    if isinstance(default, tuple):
        return tuple(parse_like(default[0] if default else 0, part.strip()) for part in text.split(","))
    if isinstance(default, bool):
        return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else int("")
    return type(default)(text)
