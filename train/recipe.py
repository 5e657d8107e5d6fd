"""A recipe builds a variant: an SAE, the terms of its loss, and the mechanisms around its steps.

    @recipe("topk", paper="Gao et al. 2024", equations="eq. 3, A.2")
    def topk(run: Setting, k: int = 32) -> Variant: ...

The arguments after `run` are the recipe's options, with their defaults; `--set k=64` reaches them by name. The one
registry is read by the command line, the tests and the loader.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args, get_origin

import torch
from torch import Tensor, nn

from ..cache.errors import UsageError, did_you_mean
from .coefficients import Coefficient, constant
from .knobs import Scaled, hold_l0, scaled
from .mechanisms import DeadLatents
from .sae import SAE
from .step import Mechanism, Step, Term


class Setting(NamedTuple):
    """What a recipe has to know of the run it is built for."""

    d_in: int
    d_sae: int
    steps: int
    batch_size: int
    l0: float | None = None  # what `--l0` asks for
    literal: bool = False  # the paper's letter instead of the readings that work
    variance: float | None = None  # of an element of the cache's rows; None: not known, nothing is scaled by it

    SIZES = ("d_in", "d_sae", "steps", "batch_size")

    def identity(self) -> dict[str, Any]:
        """What of it decides a run's result, beside the cache: knobs only where they are used."""
        knobs = {"l0": self.l0, "literal": self.literal}
        return {name: getattr(self, name) for name in self.SIZES} | {name: knob for name, knob in knobs.items() if knob}

    @classmethod
    def recorded(cls, record: Mapping[str, Any], variance: float) -> "Setting":
        """The setting with this identity."""
        sizes = (record[name] for name in cls.SIZES)
        return cls(*sizes, record.get("l0"), record.get("literal", False), variance)

    def growth(self, steps: int | None) -> int:
        """The steps over which a penalty grows: those given, else a twentieth of the run."""
        return self.steps // 20 if steps is None else steps

    @property
    def dead_tokens(self) -> int:
        """A latent is dead that has not fired for ten million tokens, or a tenth of a shorter run."""
        return min(10_000_000, max(self.steps * self.batch_size // 10, self.batch_size))


@dataclass(frozen=True)
class Optimization:
    """How the weights move: AdamW, its rate over the run, and the scale of the input. Options of every recipe."""

    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # decoupled, on W_enc alone: unit rows of W_dec would only be renormalised
    warmup: int | None = None  # steps; None: 1000, or a tenth of a shorter run
    decay_start: float = 0.8  # share of the run after which the rate falls linearly to zero
    clip: float | None = 1.0  # global gradient norm, after the decoder's projection; None: off
    normalize: Literal["unit_ms", "none"] = "unit_ms"  # divide by sqrt(E|x|^2) from the cache's manifest; or "none"
    center: bool = False  # also subtract the cache's mean row
    b_dec_init: Literal["mean", "zero"] = "mean"  # the cache's mean row; or "zero"

    def warmup_steps(self, steps: int) -> int:
        return min(1000, steps // 10) if self.warmup is None else self.warmup

    def rate(self, i: Tensor, steps: int) -> Tensor:
        """lr min(1, (t+1)/w), and from `decay_start` linearly down; the first step already moves."""
        up = ((i + 1) / max(self.warmup_steps(steps), 1)).clamp(max=1.0)
        down = ((steps - i) / max(steps * (1 - self.decay_start), 1)).clamp(max=1.0)
        return self.lr * up * down

    def problems(self, steps: int) -> Iterator[str]:
        if not self.lr > 0:
            yield f"lr={self.lr:g} is not positive."
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name}={getattr(self, name):g} is no decay rate: give 0 to below 1."
        for name in ("eps", "weight_decay"):
            if getattr(self, name) < 0:
                yield f"{name}={getattr(self, name):g} is negative."
        if self.clip is not None and not self.clip > 0:
            yield f"clip={self.clip:g} would stop every step: give a positive norm, or none."
        if not 0 <= self.warmup_steps(steps) <= steps:
            yield f"warmup={self.warmup} is negative or longer than the run of {steps} steps."
        if not 0 <= self.decay_start <= 1:
            yield f"decay_start={self.decay_start:g} is no share of the run; give 0 to 1."


class Mechanisms(nn.ModuleList):
    """Mechanisms in the order in which they run."""

    def __iter__(self) -> Iterator[Mechanism]:
        return super().__iter__()  # type: ignore[return-value]


class Variant(nn.Module):
    """One trainable thing: `.to()` moves all of it, `.state_dict()` resumes all of it."""

    mean_D: Tensor
    scale: Tensor  # ()

    def __init__(
        self,
        sae: SAE,
        terms: Mapping[str, tuple[Coefficient | float, Term]],
        mechanisms: Iterable[Mechanism] = (),
        optimization: Optimization = Optimization(),
        *,
        dead: DeadLatents,
    ) -> None:
        super().__init__()
        self.sae, self.terms, self.coefficients = sae, nn.ModuleDict(), dict[str, Coefficient]()
        for name, (coefficient, term) in terms.items():
            self.add_term(name, coefficient, term)
        self.dead = dead
        self.mechanisms = Mechanisms([dead, *mechanisms])
        self.optimization = optimization
        self.options: dict[str, Any] = {}  # those of the recipe, as it was built
        self.notes: list[str] = []  # what a reader of the run should know of them
        self.register_buffer("mean_D", torch.zeros(sae.d_in))
        self.register_buffer("scale", torch.ones(()))

    def add_term(self, name: str, coefficient: Coefficient | float, term: Term) -> None:
        self.terms[name] = term
        self.coefficients[name] = coefficient if callable(coefficient) else constant(coefficient)

    def adapt(self, mean_D: Tensor, mean_square_norm: float) -> None:
        """Take the constants of normalisation from the cache, once; they are saved with the run."""
        how, square = self.optimization, mean_square_norm
        if how.center:
            self.mean_D.copy_(mean_D)
            square -= float(mean_D.square().sum())
        if how.normalize == "unit_ms":
            self.scale.fill_(square**0.5)
        if how.b_dec_init == "mean":
            self.sae.b_dec.data.copy_((mean_D - self.mean_D) / self.scale)

    def forward(self, i: Tensor, x_BD: Tensor, optimizer: torch.optim.Optimizer) -> Step:
        """The forward pass of a step on raw activations."""
        x_BD = (x_BD.float() - self.mean_D) / self.scale
        pre_BF, f_BF, recon_BD, kept = self.sae(x_BD)
        return Step(i, self.sae, optimizer, x_BD, pre_BF, f_BF, recon_BD.float(), kept)

    def losses(self, step: Step) -> dict[str, Tensor]:
        """Each term times its coefficient; a coefficient that moves is noted."""
        losses = {}
        for name, term in self.terms.items():
            coefficient = self.coefficients[name](step)
            if isinstance(coefficient, Tensor):
                step.notes[f"{name}_coefficient"] = coefficient.detach()
            losses[name] = coefficient * term(step)
        return losses

    def scalars(self) -> dict[str, Tensor]:
        return {name: value for mechanism in self.mechanisms for name, value in mechanism.scalars().items()}


Build = Callable[..., Variant]


@dataclass(frozen=True)
class Recipe:
    """A registered way to build a variant. `width` is its default d_sae over d_in.

    `literal` holds what `--literal` sets: for each option whose default is not the paper's letter, the letter and what
    is void about it. Empty: the defaults are the letter. None: nobody has compared them.
    """

    name: str
    build: Build
    paper: str
    equations: str
    width: float
    batch_size: int
    literal: Mapping[str, tuple[Any, str]] | None = None

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.build) or "").split("\n")[0]

    @property
    def options(self) -> dict[str, Any]:
        """The recipe's own options and their defaults."""
        return {p.name: p.default for p in list(inspect.signature(self.build).parameters.values())[1:]}

    def kinds(self) -> dict[str, Any]:
        """Every option and its annotated type."""
        own = {p.name: p.annotation for p in list(inspect.signature(self.build).parameters.values())[1:]}
        return own | {f.name: f.type for f in fields(Optimization)}

    def make(self, setting: Setting, given: Mapping[str, Any]) -> Variant:
        """Build the variant with some options given. UsageError lists everything that is wrong with them, at once."""
        own, kinds = self.options, self.kinds()
        letter = {name: value for name, (value, _) in (self.literal or {}).items()} if setting.literal else {}
        asked, problems = letter | dict(given), []
        if setting.l0 is not None:
            asked, problems = self.with_l0(setting, asked, given)
        problems += [
            f"{name} is no option of {self.name}{did_you_mean(name, kinds)}" for name in asked if name not in kinds
        ]
        unfit = [name for name in asked if name in kinds and not fits(asked[name], kinds[name])]
        problems += [misfit(name, asked[name], kinds[name]) for name in unfit]
        understood = {n: as_float(v, kinds[n]) for n, v in asked.items() if n in kinds and n not in unfit}
        shared = {name: value for name, value in understood.items() if name not in own}
        problems += Optimization(**shared).problems(setting.steps)
        chosen = {name: value for name, value in understood.items() if name in own}
        values, notes = scaled(own | chosen, setting, raw=shared.get("normalize") == "none")
        problems += [
            f"{name}={n} is negative or longer than the run of {setting.steps} steps."
            for name, n in chosen.items()
            if name.endswith(("_warmup", "anneal_steps")) and n is not None and not 0 <= n <= setting.steps
        ]
        if setting.d_sae < 1:
            problems.append(f"the width {setting.d_sae} is not positive.")
        elif max(setting.d_in, setting.d_sae) * setting.d_sae >= 2**56:
            problems.append(f"no machine holds a width of {setting.d_sae:,}: give a smaller --width.")
        elif (k := values.get("k")) is not None and not 0 < k <= setting.d_sae:
            problems.append(
                f"k={k:g} latents cannot be kept of {setting.d_sae}: give 1 to {setting.d_sae}, or a larger --width."
            )
        else:
            try:
                variant = self.build(setting, **values)
                variant.optimization = replace(variant.optimization, **shared)
                problems += variant.optimization.problems(setting.steps)
                if setting.l0 is not None and not hold_l0(variant, setting.l0, setting.steps) and "l0" not in own:
                    problems.append(
                        "--l0 has nothing to act on: no option k or l0, and no term that makes latents sparse."
                    )
            except UsageError as error:
                problems += str(error).splitlines()
        if problems:
            listed = "\n".join(f"  {problem}" for problem in dict.fromkeys(problems))
            raise UsageError(f"The variant {self.name} cannot be built:\n{listed}")
        variant.options, variant.notes = values, [f"{self.name}: {n}" for n in notes + self.void(setting, given)]
        return variant

    def with_l0(
        self, setting: Setting, asked: dict[str, Any], given: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """The options with `--l0` as k or as l0, where the recipe has one of them; and what is wrong with that."""
        l0, own = setting.l0, self.options
        if l0 is None or not 0 < l0 <= setting.d_sae:
            return asked, [f"--l0 {l0:g} latents a token cannot be had of {setting.d_sae}."]
        knobs = [name for name in ("k", "l0") if name in own]
        asked = asked | {name: int(l0) if l0 == int(l0) else l0 for name in knobs}
        return asked, [
            f"--l0 {l0:g} and {name}={given[name]} set the same: give one." for name in knobs if name in given
        ]

    def void(self, setting: Setting, given: Mapping[str, Any]) -> list[str]:
        """The warnings of `--literal`: what is void about the letter, for each option that follows it."""
        if not setting.literal:
            return []
        if not self.literal:
            return ["its defaults are the letter" if self.literal is not None else "has no paper's letter to follow"]
        return [
            f"warning, {name}={v} is the letter: {why}" for name, (v, why) in self.literal.items() if name not in given
        ]


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an annotated type, or one of its `Literal`s; an int is a float, a bool is neither."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_args(kind):
        return any(fits(value, one) for one in get_args(kind))
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def as_float(value: Any, kind: Any) -> Any:
    """An int given for a float, as what it stands for: a tensor of ints is no tensor of floats."""
    kinds = get_args(kind) or (kind,)
    return float(value) if float in kinds and int not in kinds and isinstance(value, int) else value


def misfit(name: str, value: Any, kind: Any) -> str:
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
    literal: Mapping[str, tuple[Any, str]] | None = None,
) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        if name in RECIPES:
            raise TypeError(f"two recipes are called {name!r}: {RECIPES[name].build.__module__}, {build.__module__}")
        RECIPES[name] = Recipe(name, build, paper, equations, width, batch_size, literal)
        return build

    return register


def ablation(name: str, of: Build, summary: str, about: dict[str, Any], *idle: str, **fixed: Any) -> None:
    """Register `of` with some options fixed. Those, and the ones that are idle then, are no longer options.

    A number that is scaled to the run is another default of its option, which stays one.
    """
    defaults = {name: fixed.pop(name) for name, value in list(fixed.items()) if isinstance(value, Scaled)}
    build = partial(of, **fixed)
    signature = inspect.signature(of)
    open_ = [
        p.replace(default=defaults.get(p.name, p.default))
        for p in signature.parameters.values()
        if p.name not in {*idle, *fixed}
    ]
    build.__signature__ = signature.replace(parameters=open_)  # type: ignore[attr-defined]
    build.__doc__ = summary
    names = {p.name for p in open_}
    literal = {option: letter for option, letter in about["literal"].items() if option in names}
    recipe(name, **about | {"literal": literal})(build)


def find_recipe(name: str) -> Recipe:
    """The recipe of a name; UsageError suggests the nearest."""
    from . import variants  # noqa: F401  (registers them)

    if name not in RECIPES:
        raise UsageError(f"There is no variant {name!r}{did_you_mean(name, RECIPES)} `sae variants` describes them.")
    return RECIPES[name]
