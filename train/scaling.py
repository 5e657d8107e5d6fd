"""Scaled defaults: a paper's constants, adapted to other widths and to activations of other magnitudes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .variant import RunConfig

PAPER_WIDTH = 2304  # d_in of Gemma-2-2B, the papers' model
PAPER_VARIANCE = 24.0
"""Elementwise variance of raw activations at layer 19 of Gemma-2-2B, from the papers' MSE and explained variance.

The values in paper 004 give 27.1 = 2.66 / (1 - 0.902), but its MSE is computed as in SAEBench, and is about 1.13 times
the elementwise MSE.
"""


class ScaledDefault:
    """A default that a paper states for d_in = 2304 or a variance of 24, with the rule that adapts it to a run.

    `resolve` returns the number with which the recipe is built. Values from `--set` and `--paper-exact` are not scaled.
    """

    of = "d_in"  # the field of RunConfig that the number is proportional to
    reference: float = PAPER_WIDTH

    def resolve(self, config: "RunConfig", raw: bool) -> Any:
        """The number for a run. `raw` is True if the run's input is not normalized."""
        raise NotImplementedError

    def value_in(self, config: "RunConfig") -> float:
        """The run's value of the field named by `of`."""
        return float(getattr(config, self.of))

    def __str__(self) -> str:
        return f"{self:g} at {self.of} {self.reference:g}"


class ScaleWithWidth(ScaledDefault, int):
    """A count that is a constant fraction of d_in, rounded and at least 1."""

    def resolve(self, config: "RunConfig", raw: bool) -> int:
        return max(1, round(self * config.d_in / PAPER_WIDTH))


class ScaleWithDictionary(ScaledDefault, float):
    """A number of latents that is a constant fraction of d_sae."""

    of = "d_sae"

    def resolve(self, config: "RunConfig", raw: bool) -> float:
        return self * config.d_sae / PAPER_WIDTH


class ScaleWithVariance(ScaledDefault, float):
    """A squared error, in raw units, that is a constant fraction of the variance of the activations."""

    of = "variance"
    reference = PAPER_VARIANCE

    def resolve(self, config: "RunConfig", raw: bool) -> float:
        return self * self.value_in(config) / PAPER_VARIANCE

    def value_in(self, config: "RunConfig") -> float:
        return PAPER_VARIANCE if config.variance is None else config.variance


class ScaleWithNorm(ScaleWithVariance):
    """A length, proportional to the standard deviation of raw input. Not scaled if the input has |x|^2 = 1."""

    def resolve(self, config: "RunConfig", raw: bool) -> float:
        return self * (self.value_in(config) / PAPER_VARIANCE) ** 0.5 if raw else float(self)

    def __str__(self) -> str:
        return f"{super().__str__()} of raw input"


def scale_options(options: dict[str, Any], config: "RunConfig", raw: bool) -> tuple[dict[str, Any], list[str]]:
    """The options, with scaled defaults resolved for a run, and a note for each number that differs from the paper's.

    `--paper-exact` scales only a k that is larger than the dictionary, because such a k could not be trained.
    """
    values, notes = dict(options), []
    for name, paper in options.items():
        if isinstance(paper, ScaledDefault):
            unscaled = int(paper) if isinstance(paper, int) else float(paper)  # type: ignore[arg-type]
            exact = config.paper_exact and not (name == "k" and unscaled > config.d_sae)
            values[name] = scaled = unscaled if exact else paper.resolve(config, raw)
            needs_variance = isinstance(paper, ScaleWithVariance) and (raw or not isinstance(paper, ScaleWithNorm))
            if needs_variance and config.variance is None and not config.paper_exact:
                notes.append(f"{name} {paper}, not scaled because the variance of the activations is not known yet")
            if scaled != unscaled:
                notes.append(f"{name} {paper} -> {scaled:.3g} at {paper.value_in(config):.4g}")
    return values, notes
