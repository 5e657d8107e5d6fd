"""A recipe builds a variant: an SAE, the terms of its loss, and the mechanisms around its steps.

    @recipe("topk", paper="Gao et al. 2024", equations="eq. 3, A.2")
    def topk(config: RunConfig, k: int = 32) -> Variant: ...

The arguments after `config` are the recipe's options, with their defaults; `--set k=64` reaches them by name. A recipe
with many options takes them as one dataclass (options.py). The registry is read by the command line, the tests and the
loader.
"""

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial, wraps
from typing import Any, Literal, get_args, get_origin

from ..common.errors import UsageError, did_you_mean
from .l0_control import control_l0
from .options import DeclaredBy, RecipeOptions, options_class, read_option_docs, read_options
from .scaling import ScaledDefault, scale_options
from .variant import Optimization, RunConfig, Variant

Build = Callable[..., Variant]


@dataclass(frozen=True)
class Recipe:
    """A registered way to build a variant.

    `width` is its default d_sae over d_in. `paper_exact` holds what `--paper-exact` sets: for each option whose default
    is not the paper's own setting, that setting and why it does not work as intended. Empty: the defaults are the
    paper's. None: they have not been compared with a paper.
    """

    name: str
    build: Build  # called with a RunConfig and the options by name
    declared_by: DeclaredBy
    options: Mapping[str, Any]  # the recipe's own options and their defaults
    types: Mapping[str, Any]  # of the recipe's own options
    description: str  # its first line is a summary
    paper: str
    equations: str
    width: float
    batch_size: int
    paper_exact: Mapping[str, tuple[Any, str]] | None = None

    @property
    def summary(self) -> str:
        return self.description.split("\n")[0]

    def option_types(self) -> dict[str, Any]:
        """The type of every option, those of the optimizer included."""
        return {**self.types, **{f.name: f.type for f in fields(Optimization)}}

    def option_docs(self) -> dict[str, str]:
        """The meaning of each of the recipe's own options, for those that are documented."""
        docs = read_option_docs(self.declared_by)
        return {name: docs[name] for name in self.options if name in docs}

    def make(self, config: RunConfig, given: Mapping[str, Any]) -> Variant:
        """Build the variant with some options given. UsageError lists everything that is wrong with them, at once."""
        own, kinds = self.options, self.option_types()
        exact = {name: value for name, (value, _) in (self.paper_exact or {}).items()} if config.paper_exact else {}
        asked: dict[str, Any] = exact | dict(given)
        problems: list[str] = []
        if config.l0 is not None:
            asked, problems = self.apply_l0(config, asked, given)
        problems += [
            f"{name} is no option of {self.name}{did_you_mean(name, kinds)}" for name in asked if name not in kinds
        ]
        unfit = [name for name in asked if name in kinds and not matches_type(asked[name], kinds[name])]
        problems += [type_mismatch(name, asked[name], kinds[name]) for name in unfit]
        understood = {n: int_as_float(v, kinds[n]) for n, v in asked.items() if n in kinds and n not in unfit}
        shared = {name: value for name, value in understood.items() if name not in own}
        problems += Optimization(**shared).validation_errors(config.steps)
        chosen = {name: value for name, value in understood.items() if name in own}
        values, notes = scale_options({**own, **chosen}, config, raw=shared.get("normalize") == "none")
        problems += [
            f"{name}={n} is negative or longer than the run of {config.steps} steps."
            for name, n in chosen.items()
            if name.endswith(("_warmup", "anneal_steps")) and n is not None and not 0 <= n <= config.steps
        ]
        if config.d_sae < 1:
            problems.append(f"the width {config.d_sae} is not positive.")
        elif max(config.d_in, config.d_sae) * config.d_sae >= 2**56:
            problems.append(f"no machine holds a width of {config.d_sae:,}: give a smaller --width.")
        elif (k := values.get("k")) is not None and not 0 < k <= config.d_sae:
            problems.append(
                f"k={k:g} latents cannot be kept of {config.d_sae}: give 1 to {config.d_sae}, or a larger --width."
            )
        else:
            try:
                variant = self.build(config, **values)
                variant.optimization = replace(variant.optimization, **shared)
                problems += variant.optimization.validation_errors(config.steps)
                if config.l0 is not None and not control_l0(variant, config.l0, config.steps) and "l0" not in own:
                    problems.append(
                        "--l0 has nothing to act on: no option k or l0, and no term that makes latents sparse."
                    )
            except UsageError as error:
                problems += str(error).splitlines()
        if problems:
            listed = "\n".join(f"  {problem}" for problem in dict.fromkeys(problems))
            raise UsageError(f"The variant {self.name} cannot be built:\n{listed}")
        variant.options, variant.notes = (
            values,
            [f"{self.name}: {n}" for n in notes + self.paper_exact_notes(config, given)],
        )
        return variant

    def apply_l0(
        self, config: RunConfig, asked: dict[str, Any], given: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """The options with `--l0` as k or as l0, where the recipe has one of them; and what is wrong with that."""
        l0, own = config.l0, self.options
        if l0 is None or not 0 < l0 <= config.d_sae:
            return asked, [f"--l0 {l0:g} latents a token cannot be had of {config.d_sae}."]
        knobs = [name for name in ("k", "l0") if name in own]
        asked = asked | {name: int(l0) if l0 == int(l0) else l0 for name in knobs}
        return asked, [
            f"--l0 {l0:g} and {name}={given[name]} set the same: give one." for name in knobs if name in given
        ]

    def paper_exact_notes(self, config: RunConfig, given: Mapping[str, Any]) -> list[str]:
        """The warnings of `--paper-exact`: what is void about the letter, for each option that follows it."""
        if not config.paper_exact:
            return []
        if not self.paper_exact:
            return [
                "its defaults are the letter" if self.paper_exact is not None else "has no paper's letter to follow"
            ]
        return [
            f"warning, {name}={v} is the letter: {why}"
            for name, (v, why) in self.paper_exact.items()
            if name not in given
        ]


def matches_type(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type, or one of its `Literal`s; an int is a float, a bool is neither."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_args(kind):
        return any(matches_type(value, one) for one in get_args(kind))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def int_as_float(value: Any, kind: Any) -> Any:
    """An int given for a float, as what it stands for: a tensor of ints is no tensor of floats."""
    kinds = get_args(kind) or (kind,)
    return float(value) if float in kinds and int not in kinds and isinstance(value, int) else value


def type_mismatch(name: str, value: Any, kind: Any) -> str:
    """The sentence for a value that does not fit."""
    known = [one for part in (kind, *get_args(kind)) if get_origin(part) is Literal for one in get_args(part)]
    if known:
        return f"{name}={value} is unknown: {', '.join(known)}."
    if isinstance(value, float) and not math.isfinite(value):
        return f"{name}={value} is not finite."
    return f"{name}={value!r} is no {inspect.formatannotation(kind)}."


RECIPES: dict[str, Recipe] = {}


def recipe(
    name: str,
    *,
    paper: str,
    equations: str = "",
    width: float = 8,
    batch_size: int = 2048,
    paper_exact: Mapping[str, tuple[Any, str]] | None = None,
    options: type[RecipeOptions] | None = None,
    summary: str | None = None,
    unused: Collection[str] = (),
    fixed: Mapping[str, Any] | None = None,
) -> Callable[[Build], Build]:
    """Register a build function. Its options are its arguments after `config`, or the fields of a RecipeOptions.

    Args:
        options: The class of its options; by default the annotation of its second argument.
        summary: One line that describes it; by default the docstring.
        unused: Options that have no effect in this recipe, and are not options of it.
        fixed: Values of options that are not options of this recipe. A `ScaledDefault` is another default instead.
    """

    def register(build: Build) -> Build:
        if name in RECIPES:
            raise TypeError(
                f"two recipes are called {name!r}: {RECIPES[name].declared_by.__module__}, {build.__module__}"
            )
        options_type = options or options_class(build)
        declared = read_options(options_type or build)
        defaults = {n: value for n, value in (fixed or {}).items() if isinstance(value, ScaledDefault)}
        constants = {n: value for n, value in (fixed or {}).items() if n not in defaults}
        own = [n for n in declared if n not in unused and n not in constants]
        RECIPES[name] = Recipe(
            name,
            partial(build if options_type is None else keyword_build(build, options_type), **constants),
            options_type or build,
            {n: defaults.get(n, declared[n].default) for n in own},
            {n: declared[n].type for n in own},
            summary or (inspect.getdoc(build) or "").partition("\nArgs:\n")[0].strip(),
            paper,
            equations,
            width,
            batch_size,
            paper_exact and {n: exact for n, exact in paper_exact.items() if n in own},
        )
        return build

    return register


def keyword_build(build: Build, options_type: type[RecipeOptions]) -> Build:
    """A build function that takes the fields of its options by name, and validates them."""

    @wraps(build)
    def build_from_keywords(config: RunConfig, **values: Any) -> Variant:
        options = options_type(**values)
        options.validate(config)
        return build(config, options)

    return build_from_keywords


def find_recipe(name: str) -> Recipe:
    """The recipe of a name; UsageError suggests the nearest."""
    from . import variants  # noqa: F401  (registers them)

    if name not in RECIPES:
        raise UsageError(f"There is no variant {name!r}{did_you_mean(name, RECIPES)} `sae variants` describes them.")
    return RECIPES[name]
