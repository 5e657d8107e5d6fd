"""Paper 000, 4.1: the projection, and the averages that other modules read. Neither changes training by itself."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ...mechanisms import ActivityEMA
from ...sae import SAE
from ...step import Mechanism, Step


class Sketch(Mechanism):
    """Projects rows to S dimensions with a random matrix R, which changes angles by about 1/sqrt(S) (4.1).

    R is the Q of the QR decomposition of a Gaussian matrix.

    Paper: R is d_sae x 128 and projects features. With d_sae = d_in, a feature could be a decoder row or the latents of
    a token. `on` selects the decoder, the encoder or the activations. For activations, only the ratio of the norms
    after and before the projection is logged.
    """

    every = 50
    R_DS: Tensor  # (d_sae, S) on activations
    mean_cosine: Tensor  # ()
    max_cosine: Tensor  # ()
    length: Tensor  # ()

    def __init__(self, d_in: int, d_sae: int, size: int = 128, on: str = "decoder") -> None:
        super().__init__()
        self.on = on
        self.undivided = "latents are projected in the whole batch" if on == "activations" else ""
        rows = d_sae if on == "activations" else d_in
        self.register_buffer("R_DS", torch.linalg.qr(torch.randn(rows, min(size, rows))).Q)
        for name in ("mean_cosine", "max_cosine", "length"):
            self.register_buffer(name, torch.zeros(()))

    def between_bytes(self, sae: SAE, tokens: int) -> int:
        return 4 * sae.d_sae * (2 * min(1024, sae.d_sae) + sae.d_in)  # blocks of cosines, rows

    def every_n_steps(self, step: Step) -> None:
        if self.on == "activations":
            f_BF = step.f_BF.detach().float()
            scale = (len(self.R_DS) / self.R_DS.shape[1]) ** 0.5  # on average, R scales squared lengths by S/F
            projected_B = (f_BF @ self.R_DS).norm(dim=1) * scale
            self.length.copy_((projected_B / f_BF.norm(dim=1).clamp_min(1e-8)).mean())
            return
        rows_FD = step.sae.W_dec if self.on == "decoder" else step.sae.W_enc.T
        unit_FS = F.normalize(rows_FD.detach() @ self.R_DS, dim=1)
        n = len(unit_FS)
        total = largest = torch.zeros((), device=unit_FS.device)
        for start in range(0, n, 1024):  # the n x n cosines of a wide dictionary do not fit into memory
            cosine_CF = (unit_FS[start : start + 1024] @ unit_FS.T).abs()
            cosine_CF.diagonal(start).zero_()
            total, largest = total + cosine_CF.sum(), torch.maximum(largest, cosine_CF.max())
        self.mean_cosine.copy_(total / (n * (n - 1)))
        self.max_cosine.copy_(largest)

    def scalars(self) -> dict[str, Tensor]:
        if self.on == "activations":
            return {"sketch_length": self.length}
        return {"sketch_mean_cosine": self.mean_cosine, "sketch_max_cosine": self.max_cosine}


class UtilizationEMA(ActivityEMA):
    """u_i of (2): how often latent i fired recently, averaged over steps with decay beta and bias correction.

    The running average is initialized to zero and divided by its accumulated weight 1 - beta^t.
    """

    gathered: Tensor  # ()
    leaves_weights = True

    def __init__(self, d_sae: int, beta: float = 0.9) -> None:
        super().__init__(d_sae, beta)
        self.register_buffer("gathered", torch.zeros(()))

    @property
    def u_F(self) -> Tensor:
        return self.rate_F / self.gathered.clamp_min(1e-8)

    def after_step(self, step: Step) -> None:
        super().after_step(step)
        self.gathered.lerp_(torch.ones_like(self.gathered), 1 - self.beta)

    def scalars(self) -> dict[str, Tensor]:
        return {"utilisation": self.u_F.mean(), "utilisation_max": self.u_F.max()}


class Totals(Mechanism):
    """Sums the counts of all steps since the start of the run, so that the log shows whether a mechanism had an effect.

    `counts` is a function that returns the counts of a step as name -> count. For a loss, these are `step.metrics`; for
    an activation, its `counts`.
    """

    leaves_weights = True

    def __init__(self, names: Iterable[str], counts: Callable[[Step], Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.names, self.counts = tuple(names), counts
        for name in self.names:
            self.register_buffer(f"acted_{name}", torch.zeros((), dtype=torch.int64))

    def after_step(self, step: Step) -> None:
        counts = self.counts(step)
        for name in self.names:
            getattr(self, f"acted_{name}").add_(counts[name])

    def scalars(self) -> dict[str, Tensor]:
        return {name: getattr(self, f"acted_{name}") for name in self.names}


class RecentError(Mechanism):
    """The mean squared error of a token, averaged over steps with decay beta. The first step initializes it."""

    value: Tensor  # ()
    leaves_weights = True

    def __init__(self, beta: float = 0.9) -> None:
        super().__init__()
        self.beta = beta
        self.register_buffer("value", torch.zeros(()))

    def after_step(self, step: Step) -> None:
        error = step.error_BD.detach().square().sum(-1).mean()
        self.value.copy_(torch.where(step.i == 0, error, self.value.lerp(error, 1 - self.beta)))
