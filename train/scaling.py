"""What makes runs comparable: a paper's constants at other widths and in other units, and one L0 for every recipe."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .variant import RunConfig

PAPER_WIDTH = 2304  # Gemma-2-2B's, at which the papers count
PAPER_VARIANCE = 24.0
"""Of an element of raw activations at layer 19 of Gemma-2-2B, by the papers' MSE and explained variance.

Those give 27.1, as 2.66 / (1 - 0.902) of paper 004; but the MSE is SAEBench's, about 1.13 times the elementwise one.
"""


class ScaledDefault:
    """The default of an option that a paper gives where d_in is 2304 or the variance 24: a number, and its rule.

    The recipe is built with the number `at` its own setting; `--paper-exact` and `--set` give raw ones.
    """

    of = "d_in"  # what the number is in proportion to
    reference: float = PAPER_WIDTH

    def resolve(self, config: "RunConfig", raw: bool) -> Any:
        """The number of this run; `raw`: its input is not normalised."""
        raise NotImplementedError

    def measured(self, config: "RunConfig") -> float:
        """What `of` is in this run."""
        return float(getattr(config, self.of))

    def __str__(self) -> str:
        return f"{self:g} at {self.of} {self.reference:g}"


class ScaleWithWidth(ScaledDefault, int):
    """A count: the same share of d_in, rounded, and 1 at least."""

    def resolve(self, config: "RunConfig", raw: bool) -> int:
        return max(1, round(self * config.d_in / PAPER_WIDTH))


class ScaleWithDictionary(ScaledDefault, float):
    """A pace of latents: the same share of d_sae."""

    of = "d_sae"

    def resolve(self, config: "RunConfig", raw: bool) -> float:
        return self * config.d_sae / PAPER_WIDTH


class ScaleWithVariance(ScaledDefault, float):
    """A squared error of raw activations: the same share of their variance."""

    of = "variance"
    reference = PAPER_VARIANCE

    def resolve(self, config: "RunConfig", raw: bool) -> float:
        return self * self.measured(config) / PAPER_VARIANCE

    def measured(self, config: "RunConfig") -> float:
        return PAPER_VARIANCE if config.variance is None else config.variance


class ScaleWithNorm(ScaleWithVariance):
    """A length: in proportion to raw activations where the input is raw, and as it is where the input has |x|^2 = 1."""

    def resolve(self, config: "RunConfig", raw: bool) -> float:
        return self * (self.measured(config) / PAPER_VARIANCE) ** 0.5 if raw else float(self)


def scale_options(options: dict[str, Any], config: "RunConfig", raw: bool) -> tuple[dict[str, Any], list[str]]:
    """The options with their numbers at this run, and a sentence for each that differs."""
    values, notes = dict(options), []
    for name, paper in options.items():
        if isinstance(paper, ScaledDefault):
            plain = int(paper) if isinstance(paper, int) else float(paper)  # type: ignore[arg-type]
            values[name] = here = plain if config.paper_exact else paper.resolve(config, raw)
            if isinstance(paper, ScaleWithVariance) and config.variance is None and not config.paper_exact:
                notes.append(f"{name} {paper}, and left so: the variance of these rows is not known")
            if here != plain:
                notes.append(f"{name} {paper} -> {here:.3g} at {paper.measured(config):.4g}")
    return values, notes
