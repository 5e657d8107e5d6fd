"""Merging of latents with nearly the same direction: equation (7) of paper 004."""

import torch
from torch import Tensor

from ...mechanisms import reset_adam_state
from ...sae import SAE
from ...step import Mechanism, Step
from .window import ResampleByWindow


def match_pairs(cosine_FF: Tensor, above: float) -> tuple[Tensor, Tensor]:
    """Disjoint pairs i < j whose cosine exceeds `above`. The most similar pairs come first, and no latent occurs twice.

    Paper: calls this hierarchical clustering and prints a rule for two latents, but does not say how to choose pairs.
    """
    i_P, j_P = (cosine_FF.triu(1) > above).nonzero(as_tuple=True)
    order_P = cosine_FF[i_P, j_P].argsort(descending=True, stable=True)
    matched: set[int] = set()
    pairs = []
    for i, j in zip(i_P[order_P].tolist(), j_P[order_P].tolist(), strict=True):
        if i not in matched and j not in matched:
            matched |= {i, j}
            pairs.append((i, j))
    i_M, j_M = torch.tensor(pairs, dtype=torch.int64, device=cosine_FF.device).view(-1, 2).unbind(1)
    return i_M, j_M


class MergeSimilar(Mechanism):
    """Merges latents i and j if their cosine exceeds `above`: i becomes the average of both (7).

    The Adam state of both latents is reset.

    The paper does not say which vectors the cosine compares, what happens to latent j, or what happens to W_dec and
    b_enc. Here `on` selects cosines of the rows of W_dec or of the columns of W_enc. `average` selects the weights that
    are averaged: only W_enc, as in (7), or `all`. With `all`, b_enc is averaged like W_enc, and W_dec,i becomes the
    direction of W_dec,i + W_dec,j. With `weights` = activity, each latent is weighted by how often it fired recently.
    The `partner` j is either restarted (`recycle`) or silenced for the rest of the run (`disable`, so that the
    "adaptive feature count" of 4.3 falls). With W_enc,j = 0 and b_enc,j = 0, a silenced latent gets no gradient, and
    weight decay and Adam's moments leave it at zero.
    """

    merged: Tensor  # () int64, in total
    disabled_F: Tensor  # bool
    leaves_weights = True

    def __init__(
        self, resample: ResampleByWindow, above: float, every: int, on: str, average: str, weights: str, partner: str
    ) -> None:
        super().__init__()
        self.resample, self.above, self.every = resample, above, every
        self.on, self.average, self.weights, self.partner = on, average, weights, partner
        self.register_buffer("merged", torch.zeros((), dtype=torch.int64))
        self.register_buffer("disabled_F", torch.zeros(resample.fired_WF.shape[1], dtype=torch.bool))

    def after_step(self, step: Step) -> None:
        # A disabled latent counts as neither dead nor silent, so nothing restarts it.
        self.resample.fired_WF.masked_fill_(self.disabled_F, 1)
        self.resample.dead.since_F.masked_fill_(self.disabled_F, 0)

    def every_n_steps(self, step: Step) -> None:
        if int(step.i) > self.resample.until:
            return
        i_M, j_M = self.similar_pairs(step.sae)
        share_M = torch.full(i_M.shape, 0.5, device=i_M.device)
        if self.weights == "activity":
            fired_F = self.resample.fired_WF.mean(0)
            share_M = fired_F[i_M] / (fired_F[i_M] + fired_F[j_M]).clamp_min(1e-12)
        self.average_into_first(step.sae, i_M, j_M, share_M)
        reset_adam_state(step, torch.cat([i_M, j_M]))
        if self.partner == "recycle":
            self.resample.restart(step, j_M)
        else:
            step.sae.W_enc.data[:, j_M] = 0
            step.sae.b_enc.data[j_M] = 0
            self.disabled_F[j_M] = True
        self.merged += len(i_M)

    def between_bytes(self, sae: SAE, tokens: int) -> int:
        return sae.d_sae * (8 * sae.d_in + 9 * sae.d_sae)  # unit rows; cosines, their upper triangle, and a mask

    def similar_pairs(self, sae: SAE) -> tuple[Tensor, Tensor]:
        rows_FD = sae.W_dec.data if self.on == "decoder" else sae.W_enc.data.T
        unit_FD = rows_FD / rows_FD.norm(dim=1, keepdim=True).clamp_min(1e-12)
        unit_FD = unit_FD.masked_fill(self.disabled_F[:, None], 0)
        return match_pairs(unit_FD @ unit_FD.T, self.above)

    def average_into_first(self, sae: SAE, i_M: Tensor, j_M: Tensor, share_M: Tensor) -> None:
        """Replace the weights of latent i by `share` times its own plus (1 - `share`) times those of latent j.

        If decoder rows are averaged too, the result is rescaled to unit norm.
        """
        sae.W_enc.data[:, i_M] = torch.lerp(sae.W_enc.data[:, j_M], sae.W_enc.data[:, i_M], share_M)
        if self.average == "encoder":
            return
        sae.b_enc.data[i_M] = torch.lerp(sae.b_enc.data[j_M], sae.b_enc.data[i_M], share_M)
        direction_MD = torch.lerp(sae.W_dec.data[j_M], sae.W_dec.data[i_M], share_M[:, None])
        sae.W_dec.data[i_M] = direction_MD / direction_MD.norm(dim=1, keepdim=True)

    def scalars(self) -> dict[str, Tensor]:
        return {"merged": self.merged}
