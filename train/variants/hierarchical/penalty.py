"""Paper 004, equation (5): the penalty is weaker while the reconstruction error is large."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...step import Mechanism, Step


class AdaptivePenalty(Mechanism):
    """alpha = clamp(target / L_recon, low, high), without a gradient (5).

    alpha is used as a coefficient. The mechanism's state includes the average of L_recon. L_recon is the error on the
    SAE's normalized input, multiplied by `scale`. If `scale` is 1, L_recon is in units of the normalized input. If
    `scale` is the divisor of the normalization, L_recon is in units of the raw activations. `reading` selects L_recon:
        mean   the mean squared error per element; at the paper's explained variance this is 2.35 = 0.098 * 24 for raw
               rows, so alpha is 1.06
        sum    the squared error per token, like the paper's loss of 4,668; alpha is then always 0.1
    L_recon is averaged over steps with decay `ema`. Paper: mentions no average. With a decay of 0, L_recon is the error
    of the current step.
    """

    reads_batch = True
    leaves_weights = True
    average: Tensor  # ()
    alpha: Tensor  # ()
    acted_alpha: Tensor  # () int64, number of steps in which alpha differed from the previous step

    def __init__(
        self, scale: Callable[[], Tensor], reading: str, target: float, low: float, high: float, ema: float
    ) -> None:
        super().__init__()
        self.scale, self.reading, self.target, self.low, self.high, self.ema = scale, reading, target, low, high, ema
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("alpha", torch.ones(()))
        self.register_buffer("acted_alpha", torch.zeros((), dtype=torch.int64))

    def recent_error(self, step: Step) -> Tensor:
        """L_recon, including this step."""
        square_BD, square = step.whole.error_BD.detach().square(), self.scale() ** 2
        if square.dim():  # one scale per dimension (normalize=standardize)
            square_BD, square = square_BD * square, square.new_ones(())
        error = square * (square_BD.mean() if self.reading == "mean" else square_BD.sum(1).mean())
        return torch.where(step.i == 0, error, torch.lerp(error, self.average, self.ema))

    def forward(self, step: Step) -> Tensor:
        return (self.target / self.recent_error(step)).clamp(self.low, self.high)

    def after_step(self, step: Step) -> None:
        alpha = self(step)
        self.acted_alpha += (alpha != self.alpha) & (step.i > 0)
        self.alpha.copy_(alpha)
        self.average.copy_(self.recent_error(step))

    def scalars(self) -> dict[str, Tensor]:
        return {"alpha": self.alpha, "alpha_moves": self.acted_alpha}
