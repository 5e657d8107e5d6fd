"""A recipe builds a variant: an SAE, the terms of its loss, and the mechanisms around its steps.

    @recipe("topk", paper="Gao et al. 2024", equations="eq. 3, A.2")
    def topk(run: Setting, k: int = 32) -> Variant: ...

The arguments after `run` are the recipe's options, with their defaults; `--set k=64` reaches them by name. The one
registry is read by the command line, the tests and the loader.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..cache.errors import UsageError
from .coefficients import Coefficient, constant
from .mechanisms import DeadLatents
from .sae import SAE, BatchTopK, TopK
from .step import Mechanism, Step, Term


class Setting(NamedTuple):
    """What a recipe has to know of the run it is built for."""

    d_in: int
    d_sae: int
    steps: int
    batch_size: int

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
    normalize: str = "unit_ms"  # divide by sqrt(E|x|^2) from the cache's manifest; or "none"
    center: bool = False  # also subtract the cache's mean row
    b_dec_init: str = "mean"  # the cache's mean row; or "zero"

    def warmup_steps(self, steps: int) -> int:
        return min(1000, steps // 10) if self.warmup is None else self.warmup

    def rate(self, i: Tensor, steps: int) -> Tensor:
        """lr min(1, (t+1)/w), and from `decay_start` linearly down; the first step already moves."""
        up = ((i + 1) / max(self.warmup_steps(steps), 1)).clamp(max=1.0)
        down = ((steps - i) / max(steps * (1 - self.decay_start), 1)).clamp(max=1.0)
        return self.lr * up * down

    def problems(self, steps: int) -> Iterator[str]:
        if not 0 < self.lr < math.inf:
            yield f"lr={self.lr} is not positive."
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name}={getattr(self, name)} is no decay rate: give 0 to below 1."
        for name in ("eps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                yield f"{name}={getattr(self, name)} is negative or not finite."
        if self.clip is not None and not self.clip > 0:
            yield f"clip={self.clip} would stop every step: give a positive norm, or none."
        if not 0 <= self.warmup_steps(steps) <= steps:
            yield f"warmup={self.warmup} is negative or longer than the run of {steps} steps."
        if not 0 <= self.decay_start <= 1:
            yield f"decay_start={self.decay_start} is no share of the run; give 0 to 1."
        if self.normalize not in ("unit_ms", "none"):
            yield f"normalize={self.normalize} is unknown: unit_ms or none."
        if self.b_dec_init not in ("mean", "zero"):
            yield f"b_dec_init={self.b_dec_init} is unknown: mean or zero."


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
        pre_BF, f_BF, recon_BD = self.sae(x_BD)
        return Step(i, self.sae, optimizer, x_BD, pre_BF, f_BF, recon_BD.float())

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
    """A registered way to build a variant. `width` is its default d_sae over d_in."""

    name: str
    build: Build
    paper: str
    equations: str
    width: float
    batch_size: int

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.build) or "").split("\n")[0]

    @property
    def options(self) -> dict[str, Any]:
        """The recipe's own options and their defaults."""
        return {p.name: p.default for p in list(inspect.signature(self.build).parameters.values())[1:]}

    def kinds(self) -> dict[str, str]:
        """Every option and its annotated type, as a string."""
        own = {
            p.name: inspect.formatannotation(p.annotation)
            for p in list(inspect.signature(self.build).parameters.values())[1:]
        }
        return own | {f.name: str(getattr(f.type, "__name__", f.type)) for f in fields(Optimization)}

    def make(self, setting: Setting, given: Mapping[str, Any]) -> Variant:
        """Build the variant with some options given. UsageError lists everything that is wrong with them, at once."""
        own, kinds = self.options, self.kinds()
        problems = [
            f"{name} is no option of {self.name}{did_you_mean(name, kinds)}" for name in given if name not in kinds
        ]
        unfit = [name for name in given if name in kinds and not fits(given[name], kinds[name])]
        problems += [f"{name}={given[name]!r} is no {kinds[name]}." for name in unfit]
        understood = {name: value for name, value in given.items() if name in kinds and name not in unfit}
        shared = {name: value for name, value in understood.items() if name not in own}
        problems += Optimization(**shared).problems(setting.steps)
        if setting.d_sae < 1:
            problems.append(f"the width {setting.d_sae} is not positive.")
        elif (k := understood.get("k", own.get("k"))) is not None and not 0 < k <= setting.d_sae:
            problems.append(
                f"k={k} latents cannot be kept of {setting.d_sae}: give 1 to {setting.d_sae}, or a larger --width."
            )
        if not problems:
            variant = self.build(setting, **{name: value for name, value in understood.items() if name in own})
            variant.optimization = replace(variant.optimization, **shared)
            problems += variant.optimization.problems(setting.steps)
            kept = [link.k for link in variant.sae.activation if isinstance(link, TopK | BatchTopK)]
            if kept and kept[0] > setting.d_sae:  # a k that follows from d_in
                problems.append(f"k={kept[0]} latents cannot be kept of {setting.d_sae}: give k, or a larger --width.")
        if problems:
            raise UsageError(f"The variant {self.name} cannot be built:\n" + "\n".join(f"  {p}" for p in problems))
        return variant


def fits(value: Any, kind: str) -> bool:
    """Whether a value is of an annotated type; an int is a float, a bool is neither."""
    accepted = {"int": int, "float": (int, float), "bool": bool, "str": str, "None": type(None)}
    return any(
        isinstance(value, accepted[k]) and (k == "bool" or not isinstance(value, bool)) for k in kind.split(" | ")
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}."


RECIPES: dict[str, Recipe] = {}


def recipe(
    name: str, *, paper: str, equations: str = "", width: float = 8, batch_size: int = 2048
) -> Callable[[Build], Build]:
    def register(build: Build) -> Build:
        if name in RECIPES:
            raise TypeError(f"two recipes are called {name!r}: {RECIPES[name].build.__module__}, {build.__module__}")
        RECIPES[name] = Recipe(name, build, paper, equations, width, batch_size)
        return build

    return register


def at_width(count: float, width: int) -> float:
    """A count that a paper gives at its width of 2304, at another: the same share of the width."""
    return count * width / 2304


def one_of(option: str, value: str, known: Iterable[str]) -> str:
    """The value, when it is a known one; UsageError lists those."""
    if value not in known:
        raise UsageError(f"{option}={value} is unknown: {', '.join(known)}.")
    return value


def ablation(name: str, of: Build, summary: str, about: dict[str, Any], *idle: str, **fixed: Any) -> None:
    """Register `of` with some options fixed. Those, and the ones that are idle then, are no longer options."""
    build = partial(of, **fixed)
    signature = inspect.signature(of)
    open_ = [p for p in signature.parameters.values() if p.name not in {*idle, *fixed}]
    build.__signature__ = signature.replace(parameters=open_)  # type: ignore[attr-defined]
    build.__doc__ = summary
    recipe(name, **about)(build)


def find_recipe(name: str) -> Recipe:
    """The recipe of a name; UsageError suggests the nearest."""
    from . import variants  # noqa: F401  (registers them)

    if name not in RECIPES:
        raise UsageError(f"There is no variant {name!r}{did_you_mean(name, RECIPES)} `sae variants` describes them.")
    return RECIPES[name]
