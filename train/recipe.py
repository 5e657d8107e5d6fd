"""A recipe builds a variant: an SAE, its loss terms, and the mechanisms that act around its steps.

    @recipe("topk", paper="Gao et al. 2024", equations="eq. 3, A.2")
    def topk(config: RunConfig, k: int = 32) -> Variant: ...

The arguments after `config` are the recipe's options with their defaults; `--set k=64` sets an option by name. A recipe
with many options declares them in a dataclass (options.py). The command line, the tests and the loader read the
registry.
"""

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial, wraps
from typing import Any, Literal, get_args, get_origin

from ..common.errors import UsageError, did_you_mean
from ..common.schemas import LATER_ENTRIES
from .l0_control import control_l0
from .optimization import ANY_NUMBER, CENTERING, SWITCHED_OFF, Optimization, SwitchedOff
from .options import DeclaredBy, RecipeOptions, options_class, read_option_docs, read_options
from .scaling import ScaledDefault, scale_options
from .variant import RunConfig, Variant

Build = Callable[..., Variant]


@dataclass(frozen=True)
class Recipe:
    """A registered way to build a variant.

    `width` is the recipe's default ratio d_sae / d_in. `paper_exact` contains the settings of `--paper-exact`: the
    paper's setting of each option whose default differs from it, and the reason why the paper's setting does not work
    as intended. If `paper_exact` is empty, the defaults are the paper's. If `paper_exact` is None, the defaults have
    not been compared with a paper. `switched_off` lists options that have no effect for some values of another option:
    name -> the other option and these values.
    """

    name: str
    build: Build  # called with a RunConfig and the options by name
    declared_by: DeclaredBy
    options: Mapping[str, Any]  # the recipe's own options and their defaults
    types: Mapping[str, Any]  # types of the recipe's own options
    description: str  # its first line is a summary
    paper: str
    equations: str
    width: float
    batch_size: int
    paper_exact: Mapping[str, tuple[Any, str]] | None = None
    switched_off: SwitchedOff = field(default_factory=dict)

    @property
    def summary(self) -> str:
        return self.description.split("\n")[0]

    @property
    def scaled_options(self) -> list[str]:
        """The options whose defaults are the paper's numbers, scaled to the run unless `--paper-exact` is given."""
        return [name for name, default in self.options.items() if isinstance(default, ScaledDefault)]

    @property
    def why_not_paper_exact(self) -> str:
        """The reason why `--paper-exact` changes nothing, as a phrase; "" if it changes something."""
        if self.paper_exact is None:
            return "the defaults of this recipe have not been compared with a paper"
        return "" if self.paper_exact or self.scaled_options else "every default is the paper's own setting"

    def option_types(self) -> dict[str, Any]:
        """The type of every option, including the options of the optimizer."""
        return {**self.types, **{f.name: f.type for f in fields(Optimization)}}

    def option_docs(self) -> dict[str, str]:
        """The recipe's own options with their descriptions. Options without a description are left out."""
        docs = read_option_docs(self.declared_by)
        return {name: docs[name] for name in self.options if name in docs}

    def make(self, config: RunConfig, given: Mapping[str, Any], stored: Mapping[str, Any] | None = None) -> Variant:
        """Build the variant of a run with the given options. Raises a UsageError that lists every problem.

        Args:
            config: the sizes of the run.
            given: options by name; all others have their defaults.
            stored: for a run that exists, all options that it was started with (`resolved` in run.json). Stored options
                override defaults that have changed since; `Variant.changed` lists such options.
        """
        exact = {name: value for name, (value, _) in (self.paper_exact or {}).items()} if config.paper_exact else {}
        options, problems = self.apply_l0(config, exact | dict(given), given)
        valid, type_problems = self.check_types(options)
        recipe_options = {name: value for name, value in valid.items() if name in self.options}
        shared = {name: value for name, value in valid.items() if name not in self.options}
        problems += [*type_problems, *Optimization(**shared).validation_errors(config.steps)]
        problems += duration_errors(recipe_options, config.steps)
        raw = shared.get("normalize") == "none"
        values, notes = scale_options({**self.options, **recipe_options}, config, raw)
        before: dict[str, Any] = {}
        now = values
        if stored is not None:
            before, stored_problems = self.options_before(config, stored)
            problems += stored_problems
            values = {name: before[name] for name in values}
        notes += duration_notes(values, config.steps)
        size_problems = list(size_errors(config, values.get("k")))
        problems += size_problems
        if not size_problems:  # otherwise the build would fail, or run out of memory
            try:
                variant = self.build(config, **values)
                settings = replace(variant.optimization, **shared)
                if settings.normalize in CENTERING and "center" not in shared:  # not requested by the user
                    settings = replace(settings, center=False)
                now = {**now, **asdict(settings)}
                if stored is not None:
                    settings = Optimization(**{name: before[name] for name in asdict(settings)})
                variant.configure(settings)
                problems += variant.optimization.validation_errors(config.steps)
                if stored is None:  # an existing run may have such options, since earlier versions did not check
                    problems += self.switched_off_errors(given, values | asdict(variant.optimization))
                notes += variant.optimization.notes(config.steps)
                if config.l0 is not None and not control_l0(variant, config.l0, config.steps) and "l0" not in values:
                    problems.append("--l0 has no effect on this recipe: it has no option k or l0 and no sparsity loss.")
            except UsageError as error:
                problems += str(error).splitlines()
        if problems:
            listed = "\n".join(f"  {problem}" for problem in dict.fromkeys(problems))
            raise UsageError(f"The variant {self.name} cannot be built:\n{listed}")
        variant.options = values
        variant.changed = {name: (value, now[name]) for name, value in before.items() if value != now[name]}
        variant.notes = [f"{self.name}: {note}" for note in [*notes, *self.paper_exact_notes(config, given)]]
        return variant

    def options_before(self, config: RunConfig, stored: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """All options of a run that was started with the `stored` options, and a list of problems.

        An option that did not exist when the run began gets the value that reproduces the earlier behaviour. This is
        the option's value in `LATER_ENTRIES` or, if `LATER_ENTRIES` does not list the option, its plain default,
        regardless of `--paper-exact` and of the recipe.
        """
        valid, problems = self.check_types({n: value for n, value in stored.items() if n in self.option_types()})
        removed = ", ".join(f"{name}={value}" for name, value in stored.items() if name not in self.option_types())
        if removed:
            problems.append(
                f"the run was started with {removed}, which this version's {self.name} does not have. "
                "Resume it with the version that started it, or start a new run with --out."
            )
        plain, _ = scale_options(dict(self.options), config, stored.get("normalize") == "none")
        plain |= {name: value for name, value in LATER_ENTRIES.items() if name in plain}
        # Values keep their stored type. A scaled k is stored as an int; converting it to the option's type, float,
        # would change sae.json.
        return {**plain, **asdict(Optimization()), **{name: stored[name] for name in valid}}, problems

    def apply_l0(
        self, config: RunConfig, options: dict[str, Any], given: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """The options and a list of problems.

        If the recipe has an option k or l0, that option is set to the value of `--l0`.
        """
        l0 = config.l0
        if l0 is None:
            return options, []
        if not 0 < l0 <= config.d_sae:
            return options, [
                f"--l0 {l0:g} is out of range: give a number above 0 and at most {config.d_sae}, the width."
            ]
        names = [name for name in ("k", "l0") if name in self.options]
        options = options | {name: int(l0) if l0 == int(l0) else l0 for name in names}
        return options, [
            f"--l0 {l0:g} and {name}={given[name]} set the same option: give one of them."
            for name in names
            if name in given
        ]

    def check_types(self, options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The options that exist and have the right type, and an error message for every other option."""
        types, valid, problems = self.option_types(), {}, []
        for name, value in options.items():
            if name not in types:
                problems.append(f"{self.name} has no option {name}{did_you_mean(name, types)}")
            elif not matches_type(value, types[name]):
                problems.append(type_mismatch(name, value, types[name]))
            else:
                valid[name] = int_as_float(value, types[name])
        return valid, problems

    def options_without_effect(self) -> SwitchedOff:
        """The options, of this recipe or of all recipes, that have no effect for some values of another option."""
        return {**self.switched_off, **SWITCHED_OFF}

    def switched_off_errors(self, given: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[str]:
        """An error message for each option that was given but has no effect because of another option.

        Such an option would change the run's name but not its results.
        """
        defaults = asdict(Optimization())  # allowed, so that a paper's optimizer can be specified completely
        for name, (other, off) in self.options_without_effect().items():
            value = values[other]
            is_off = value is not None if off is ANY_NUMBER else value in off
            if name in given and is_off and given[name] != defaults.get(name, math.nan):
                shown = f"{value:g}" if isinstance(value, float) else value
                yield f"{name}={given[name]} has no effect with {other}={shown}: leave it out."

    def paper_exact_notes(self, config: RunConfig, given: Mapping[str, Any]) -> list[str]:
        """Notes about `--paper-exact`: one for each setting that it changes, with the drawback of that setting."""
        if not config.paper_exact:
            return []
        if self.why_not_paper_exact:
            return [f"--paper-exact changes nothing: {self.why_not_paper_exact}"]
        exact = self.paper_exact or {}
        settings = [(name, value, fault) for name, (value, fault) in exact.items() if name not in given]
        notes = [f"warning, {name}={value} as in the paper: {fault}" for name, value, fault in settings]
        if unscaled := [name for name in self.scaled_options if name not in given and name not in exact]:
            names = ", ".join(unscaled)
            notes.append(f"--paper-exact uses the paper's number for {names} without scaling it to the run")
        return notes


def is_duration(name: str) -> bool:
    """Whether an option is the number of steps that a coefficient takes to reach its final value."""
    return name.endswith(("_warmup", "anneal_steps"))


def duration_errors(options: Mapping[str, Any], steps: int) -> Iterator[str]:
    """For each option that gives a number of steps: a sentence if the number is negative or too large for the run."""
    for name, value in options.items():
        if is_duration(name) and value is not None and value < 0:
            yield f"{name}={value} is negative."
        elif name == "k_anneal_steps" and value > steps:
            yield f"k_anneal_steps={value} is longer than the run of {steps} steps, so no step would be trained with k."


def duration_notes(options: Mapping[str, Any], steps: int) -> Iterator[str]:
    """A sentence for each coefficient that does not reach its final value within the run."""
    for name, value in options.items():
        if is_duration(name) and value is not None and value > steps:
            yield f"{name}={value} is longer than the run of {steps} steps: only {steps / value:.0%} of it takes place"


def size_errors(config: RunConfig, k: float | None) -> Iterator[str]:
    """An error message if the width is impossible, or if k is impossible for this width."""
    if config.d_sae < 1:
        yield f"the width {config.d_sae} is not positive."
    elif max(config.d_in, config.d_sae) * config.d_sae >= 2**56:
        yield f"the width {config.d_sae:,} is too large for any machine: give a smaller --width."
    elif k is not None and not 0 < k <= config.d_sae:
        yield f"k={k:g} is out of range: give 1 to {config.d_sae} (the width), or a larger --width."


def matches_type(value: Any, type_: Any) -> bool:
    """Whether a value fits an annotation: a type, a `Literal` or a union. An int counts as a float; a bool does not."""
    if get_origin(type_) is Literal:
        return value in get_args(type_)
    if get_args(type_):
        return any(matches_type(value, member) for member in get_args(type_))
    if type_ is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, type_) and (type_ is bool or not isinstance(value, bool))


def int_as_float(value: Any, type_: Any) -> Any:
    """Convert an int to float if the type is float, since a tensor built from ints has another dtype."""
    types = get_args(type_) or (type_,)
    return float(value) if float in types and int not in types and isinstance(value, int) else value


def type_mismatch(name: str, value: Any, type_: Any) -> str:
    """The error message for a value of the wrong type."""
    literals = [text for part in (type_, *get_args(type_)) if get_origin(part) is Literal for text in get_args(part)]
    if literals:
        return f"{name}={value} is unknown: expected one of {', '.join(literals)}."
    if isinstance(value, float) and not math.isfinite(value):
        return f"{name}={value} is not finite."
    return f"{name}={value!r} has the wrong type: expected {inspect.formatannotation(type_)}."


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
    switched_off: SwitchedOff | None = None,
) -> Callable[[Build], Build]:
    """Register a build function as a recipe.

    The options of the recipe are the function's arguments after `config`, or the fields of a RecipeOptions. One build
    function can be registered several times, for example once for a model and once for each of its ablations.

    Args:
        name: The recipe's name, as given to `--variant`.
        paper: Number of the paper, or its authors and year.
        equations: Equations or sections of the paper that it implements.
        width: Default ratio d_sae / d_in.
        batch_size: Default batch size in tokens.
        paper_exact: See `Recipe`.
        options: Class of the options. Default: the annotation of the second argument.
        summary: One line about the recipe. Default: the docstring up to `Args:`.
        unused: Options of the build function that have no effect in this recipe. The recipe does not accept these
            options.
        fixed: Fixed values for options. The recipe does not accept these options. A `ScaledDefault` only changes the
            default.
        switched_off: See `Recipe`.
    """

    def register(build: Build) -> Build:
        if name in RECIPES:
            raise TypeError(
                f"two recipes are named {name!r}: {RECIPES[name].declared_by.__module__}, {build.__module__}"
            )
        options_type = options or options_class(build)
        declared = read_options(options_type or build)
        defaults = {n: value for n, value in (fixed or {}).items() if isinstance(value, ScaledDefault)}
        constants = {n: value for n, value in (fixed or {}).items() if n not in defaults}
        own = [n for n in declared if n not in unused and n not in constants]
        RECIPES[name] = Recipe(
            name=name,
            build=partial(build if options_type is None else keyword_build(build, options_type), **constants),
            declared_by=options_type or build,
            options={n: defaults.get(n, declared[n].default) for n in own},
            types={n: declared[n].type for n in own},
            description=summary or (inspect.getdoc(build) or "").partition("\nArgs:\n")[0].strip(),
            paper=paper,
            equations=equations,
            width=width,
            batch_size=batch_size,
            paper_exact=paper_exact and {n: exact for n, exact in paper_exact.items() if n in own},
            switched_off={n: by for n, by in (switched_off or {}).items() if n in own and by[0] in own},
        )
        return build

    return register


def keyword_build(build: Build, options_type: type[RecipeOptions]) -> Build:
    """Wrap a build function: the wrapper accepts the fields of the options class by name, and validates them."""

    @wraps(build)
    def build_from_keywords(config: RunConfig, **values: Any) -> Variant:
        options = options_type(**values)
        options.validate(config)
        return build(config, options)

    return build_from_keywords


def find_recipe(name: str) -> Recipe:
    """The recipe with this name. Raises a UsageError that suggests the most similar name."""
    from . import variants  # noqa: F401  (registers them)

    if name not in RECIPES:
        raise UsageError(f"unknown variant {name!r}{did_you_mean(name, RECIPES)} `sae variants` lists them.")
    return RECIPES[name]
