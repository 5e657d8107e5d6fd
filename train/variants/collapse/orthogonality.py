"""Paper 000: orthogonal rows, by Gram-Schmidt in the forward pass (3), as a loss (5), or after the update (6)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....common.errors import UsageError
from ...activation_functions import Activation
from ...sae import SAE
from ...step import LossTerm, Mechanism, Step
from .groups import DecoderRows
from .monitors import Sketch, UtilizationEMA
from .options import fewest_groups

ROUNDING = 1e-6  # smaller changes in an element of a unit row are ignored


def count_moved(rows_FD: Tensor, before_FD: Tensor) -> Tensor:
    """() int64: how many unit rows differ from their earlier values by more than rounding."""
    return ((rows_FD - before_FD).abs().amax(1) > ROUNDING).sum()


class GroupOrthogonalityLoss(LossTerm):
    """L_orth = mean_G |D_G D_G^T - I|_F^2 / M^2 (5), with D_G the rows of a group. Gram-Schmidt makes it 0.

    With `on` = "activations", the rows of D_G are instead the values of each latent over the batch, normalized to
    length 1. The diagonal is left out, because an inactive latent cannot be normalized.

    Paper: the loss "penalizes non-orthogonal feature components", and the paper's f denotes activations.
    """

    def __init__(self, rows: DecoderRows, on: str = "decoder") -> None:
        super().__init__()
        self.rows, self.on = rows, on
        self.undivided = "" if on == "decoder" else "latents are compared over the whole batch"

    def forward(self, step: Step) -> Tensor:
        if self.on == "activations":
            unit_GMB = F.normalize(step.f_BF.float().T, dim=1).unflatten(0, (self.rows.groups, -1))
            cosine_GMM = (unit_GMB @ unit_GMB.mT).float()
            return (cosine_GMM.tril(-1) + cosine_GMM.triu(1)).square().mean()
        rows_GMD = self.rows.grouped(step.sae)
        gram_GMM = (rows_GMD @ rows_GMD.mT).float()
        return (gram_GMM - torch.eye(gram_GMM.shape[1], device=gram_GMM.device)).square().mean()


# 4.1, third component: (3).


def gram_schmidt(rows_GMD: Tensor) -> Tensor:
    """Unit rows with the directions that (3) gives, computed by a QR decomposition.

    Modified Gram-Schmidt gives the columns of Q diag(R), so the unit rows are the columns of Q, each with the sign of
    its element of diag(R). A QR can handle nearly dependent rows, such as d random rows in d dimensions. Training steps
    use `gram_schmidt_by_products`.

    Paper: sums over j <= k, which subtracts a row from itself; it should be j < k.
    """
    q_GDM, r_GMM = torch.linalg.qr(rows_GMD.mT)
    sign_GM = torch.where(r_GMM.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0)
    return (q_GDM * sign_GM[:, None, :].to(q_GDM.dtype)).mT


def cholesky_factor(gram_GMM: Tensor) -> tuple[Tensor, Tensor]:
    """L with A A^T = L L^T.

    First, 1e-6 times the diagonal's mean is added to the diagonal, since silent latents are rows of zeros, which make
    A A^T singular. Also returns, for each group (G), the row at which rounding made the factorization fail, or 0 if it
    succeeded.
    """
    guard_G = 1e-6 * gram_GMM.diagonal(dim1=1, dim2=2).mean(1) + 1e-12
    eye_MM = torch.eye(gram_GMM.shape[1], device=gram_GMM.device, dtype=gram_GMM.dtype)
    L_GMM, info_G = torch.linalg.cholesky_ex(gram_GMM + guard_G[:, None, None] * eye_MM)
    return L_GMM, info_G


def gram_schmidt_matrix(gram_GMM: Tensor) -> Tensor:
    """The unit lower triangular T such that T A is the result of (3) for the rows of A, given the Gram matrix A A^T.

    With A A^T = L L^T, T is diag(L) L^-1.
    """
    L_GMM, _ = cholesky_factor(gram_GMM)
    eye_MM = torch.eye(gram_GMM.shape[1], device=gram_GMM.device, dtype=gram_GMM.dtype)
    inverse_GMM = torch.linalg.solve_triangular(L_GMM, eye_MM.expand_as(L_GMM), upper=False)
    return inverse_GMM * L_GMM.diagonal(dim1=1, dim2=2).unsqueeze(2)


def gram_schmidt_by_products(rows_GMD: Tensor) -> Tensor:
    """Unit rows with the directions that (3) gives, computed by two Cholesky factorizations instead of a QR.

    A QR processes the rows one by one; on a GPU, each row needs one or more kernel launches. A Gram matrix squares the
    condition number of the rows, so a second factorization corrects the error of the first. For the free rows of a run,
    the condition number was at most 4 and the error 1e-7; at 30 times the learning rate they were 7,000 and 3e-6
    (benchmarks/gram_schmidt.py). A QR in float32 has two to three times as much rounding error. If the rows of a group
    are so close to linear dependence that the factorization fails, the group becomes NaN, which ends the run.
    """
    for _ in range(2):
        L_GMM, info_G = cholesky_factor(rows_GMD @ rows_GMD.mT)
        L_GMM = torch.where(info_G[:, None, None] == 0, L_GMM, math.nan)
        rows_GMD = F.normalize(torch.linalg.solve_triangular(L_GMM, rows_GMD, upper=False), dim=-1)
    return rows_GMD


class GramSchmidt(Mechanism):
    """Computes W_dec from free rows by (3), group by group. The optimizer updates the free rows; W_dec is saved.

    With `gradient` = "straight_through", each free row gets the gradient of its row of W_dec, minus the components
    along these two rows. With "through", (3) is differentiated. The first row of a group keeps its direction and the
    last row changes most; `order` = "utilisation" puts the most used latents first. If there is a sketch, (3) uses the
    inner products of the sketched rows.

    `orthogonalized` counts, over all steps, the rows that (3) moved by more than rounding.
    """

    acted_orthogonalized: Tensor  # () int64

    def __init__(
        self,
        sae: SAE,
        rows: DecoderRows,
        utilization: UtilizationEMA,
        order: str,
        gradient: str,
        sketch: Sketch | None = None,
    ) -> None:
        super().__init__()
        rows.free_FD = nn.Parameter(sae.W_dec.detach().clone())
        self.rows, self.utilisation = rows, utilization  # checkpoints contain this spelling
        self.order, self.gradient, self.sketch = order, gradient, sketch
        self.register_buffer("acted_orthogonalized", torch.zeros((), dtype=torch.int64))

    def orthogonalize(self, free_FD: Tensor) -> Tensor:
        """Apply (3) to the free rows (F, D). Returns unit rows (F, D)."""
        rows_GMD = free_FD.unflatten(0, (self.rows.groups, -1))
        order_GM1 = None
        if self.order == "utilisation":
            u_GM = self.utilisation.u_F.view(self.rows.groups, -1)
            order_GM1 = u_GM.argsort(dim=1, descending=True, stable=True)[..., None]
            rows_GMD = rows_GMD.take_along_dim(order_GM1, 1)
        if self.sketch is None:
            rows_GMD = gram_schmidt_by_products(rows_GMD)
        else:
            short_GMS = rows_GMD @ self.sketch.R_DS
            rows_GMD = F.normalize(gram_schmidt_matrix(short_GMS @ short_GMS.mT) @ rows_GMD, dim=-1)
        if order_GM1 is not None:
            rows_GMD = rows_GMD.take_along_dim(order_GM1.argsort(dim=1), 1)
        return rows_GMD.flatten(0, 1)

    def after_backward(self, step: Step) -> None:
        weight, gradient, free = step.sae.W_dec, step.sae.W_dec.grad, self.rows.free_FD
        assert gradient is not None and free is not None  # the step's loss has just been backpropagated
        if self.gradient == "through":
            with torch.enable_grad():
                free_FD = free.detach().requires_grad_()
                (to_free_FD,) = torch.autograd.grad(self.orthogonalize(free_FD), free_FD, gradient)
        else:
            to_free_FD = gradient - (gradient * weight).sum(1, keepdim=True) * weight
        total_FD = to_free_FD if free.grad is None else to_free_FD + free.grad
        free.grad = total_FD - (total_FD * free).sum(1, keepdim=True) * free
        gradient.zero_()  # `after_step` sets W_dec; the optimizer and clipping must ignore it

    def after_step(self, step: Step) -> None:
        assert self.rows.free_FD is not None
        free_FD = self.rows.free_FD.data
        free_FD /= free_FD.norm(dim=1, keepdim=True).clamp_min(1e-12)
        unit_FD = self.orthogonalize(free_FD)
        self.acted_orthogonalized.add_(count_moved(unit_FD, free_FD))
        step.sae.W_dec.data.copy_(unit_FD)

    def scalars(self) -> dict[str, Tensor]:
        return {"orthogonalized": self.acted_orthogonalized}


class GramSchmidtLatents(Activation, name="gram_schmidt_latents"):
    """Equation (3) as the paper prints it, applied to the latents: one column is a latent's values over the batch.

    The activation has no effect after training.

    Paper: with this activation, a token's latents depend on the rest of its batch, are sometimes negative and hardly
    ever zero. If there are more columns than tokens, nothing is left of the last columns after the earlier ones are
    projected out. The paper states no rule for a single token.
    """

    undivided = "Gram-Schmidt acts on latents over the whole batch"

    def __init__(self, groups: int, gradient: str = "straight_through") -> None:
        super().__init__(groups=groups, gradient=gradient)
        self.groups, self.gradient = groups, gradient
        self.counts: dict[str, Tensor] = {}  # counts of the last training batch, for `Totals`

    def forward(self, f_BF: Tensor) -> Tensor:
        if not self.training:
            return f_BF
        with torch.autocast(f_BF.device.type, enabled=False):
            rows_GMB = f_BF.float().T.unflatten(0, (self.groups, -1))
            T_GMM = gram_schmidt_matrix(rows_GMB @ rows_GMB.mT)
            out_GMB = (T_GMM if self.gradient == "through" else T_GMM.detach()) @ rows_GMB
            moved_GM = (T_GMM.detach() * rows_GMB.detach().norm(dim=2)[:, None]).tril(-1).abs().amax(2)
            self.counts = {"orthogonalized": (moved_GM > ROUNDING * rows_GMB.detach().abs().amax()).sum()}
            return out_GMB.flatten(0, 1).T


# Section 6, runs 9 and 10.


class HardOrthogonality(Mechanism):
    """After an update, replaces each group's rows by the nearest orthonormal rows.

    For this, it repeats X <- (3 X - X X^T X)/2 five times.

    `rows_projected` counts, over all steps, the rows that this replacement changed by more than rounding.

    Paper: states no formula. The iteration converges for rows that were orthonormal a few steps ago, and runs start
    with orthonormal rows.
    """

    acted_rows_projected: Tensor  # () int64

    def __init__(self, rows: DecoderRows, steps: int = 1) -> None:
        super().__init__()
        self.rows, self.steps = rows, steps
        self.register_buffer("acted_rows_projected", torch.zeros((), dtype=torch.int64))

    def after_step(self, step: Step) -> None:
        rows_FD = self.rows.parameter(step.sae).data
        x_GMD = rows_FD.unflatten(0, (self.rows.groups, -1))
        for _ in range(5):
            x_GMD = 1.5 * x_GMD - 0.5 * (x_GMD @ x_GMD.mT) @ x_GMD
        new_FD = torch.where((step.i + 1) % self.steps == 0, x_GMD.flatten(0, 1), rows_FD)
        self.acted_rows_projected.add_(count_moved(new_FD, rows_FD))
        rows_FD.copy_(new_FD)

    def scalars(self) -> dict[str, Tensor]:
        return {"rows_projected": self.acted_rows_projected}


def init_orthonormal(sae: SAE, rows: DecoderRows, part: str) -> None:
    """Initialize the decoder rows of each group as orthonormal rows, and the encoder as the decoder's transpose.

    Raises UsageError if a group has more than d_in latents. The error message begins with `part`.
    """
    size = sae.d_sae // rows.groups
    if size > sae.d_in:
        raise UsageError(
            f"{part} needs groups of at most d_in = {sae.d_in} latents, but each of the {rows.groups} groups in a "
            f"dictionary of {sae.d_sae} has {size}: give --set groups={fewest_groups(sae.d_in, sae.d_sae)}, "
            "or a smaller --width."
        )
    with torch.no_grad():
        unit_FD = gram_schmidt(rows.grouped(sae)).flatten(0, 1)
        sae.W_dec.copy_(unit_FD)
        sae.W_enc.copy_(unit_FD.T)
