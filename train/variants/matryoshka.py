"""Matryoshka SAE (Bussmann et al. 2025): every prefix of the dictionary is trained as a separate dictionary.

    L = mean_g |x - (f_{1:n_g} W_dec,{1:n_g} + b_dec)|^2,     n_g = n/2^(G-1), ..., n/2, n

BatchTopK selects once among all latents, and all prefixes share this selection. The order of the latents matters.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ...common.errors import UsageError
from .. import dense_ops, sparse_ops
from ..recipe import recipe
from ..sae import SAE, TrainingOutput
from ..step import LossTerm, Step
from ..variant import RunConfig, Variant
from .baselines import AUX_OPTIONS, batchtopk


class NestedMSE(LossTerm):
    """The squared error, averaged over prefixes.

    Each block between two prefixes is decoded once, and a prefix's reconstruction is the sum of the blocks in the
    prefix. The residuals of all prefixes that contain a block are summed before the gradient at the block is computed.
    So the gradient takes one matrix product, as with a plain decoder.
    """

    undivided = ""

    def __init__(self, ends: list[int]) -> None:
        super().__init__()
        self.sizes = [end - start for start, end in pairwise([0, *ends])]

    def blocks(self, step: Step) -> list[Tensor]:
        """Each block's part of the reconstruction (B, D)."""
        if step.kept:
            decoded = sparse_ops.decode(step.kept.by_section(self.sizes), step.sae.W_dec)
            return list(decoded.split(step.tokens))
        parts = zip(step.f_BF.split(self.sizes, -1), step.sae.W_dec.split(self.sizes), strict=True)
        return [f_BS @ dec_SD for f_BS, dec_SD in parts]

    def forward(self, step: Step) -> Tensor:
        if "squared_errors_G" in step.values:
            return step.values["squared_errors_G"].mean() / step.tokens
        recon_BD: Tensor = step.sae.b_dec
        losses = []
        for block_BD in self.blocks(step):
            recon_BD = block_BD + recon_BD
            losses.append((step.x_BD - recon_BD).square().sum(-1).mean())
        # The paper does not say whether the losses are summed or averaged. If they are averaged, the other terms of the
        # loss keep their relative weight.
        return torch.stack(losses).mean()


def decode_by_section(
    sae: SAE, x_BD: Tensor, centered_BD: Tensor | None = None, *, sizes: Sequence[int]
) -> TrainingOutput | None:
    """`SAE.run` with kernels and dense products: each section is decoded once, for all prefixes and the SAE itself."""
    topk = sae.selecting_activation()
    if topk is None or not topk.by_kernels or sae.sparse_activation():
        return None
    pre_BF = sae.pre_activations(x_BD, centered_BD)
    flat_index_N = topk.select(pre_BF.detach())
    f_BF, part_GBD, selected_N = dense_ops.select_decode_sections(pre_BF, flat_index_N, sae.W_dec, sizes)
    recon_BD, squared_G = dense_ops.squared_errors(part_GBD, sae.b_dec, x_BD)
    values = {"squared_errors_G": squared_G}
    return TrainingOutput(pre_BF, f_BF, recon_BD, None, squared_G[-1], selected_N, values)


@recipe("matryoshka", paper="Bussmann et al. 2025", switched_off=AUX_OPTIONS)
def matryoshka(
    config: RunConfig,
    k: float = 32,
    prefixes: int = 5,
    aux: float = 1 / 32,
    aux_k: int | None = None,
    k_anneal_steps: int = 0,
    k_start: float | None = None,
) -> Variant:
    """`batchtopk` that also decodes x from its first n/2, n/4, ... latents.

    Args:
        k: Active latents per token, on average over the batch.
        prefixes: Number of prefixes, each twice as long as the previous one; the last is the whole dictionary.
        aux: Weight of AuxK, which trains dead latents to model the residual.
        aux_k: Dead latents that AuxK uses per token. None: d_in / 2.
        k_anneal_steps: Steps over which k falls from `k_start` to `k`. 0: k is constant.
        k_start: k at the first step of the annealing. None: d_in.
    """
    most = config.d_sae.bit_length()
    if not 1 <= prefixes <= most:
        raise UsageError(
            f"invalid prefixes={prefixes}: {config.d_sae} latents allow 1 to {most} prefixes, because each prefix is "
            "half as long as the next. Set fewer prefixes, or a larger --width."
        )
    variant = batchtopk(config, k=k, aux=aux, aux_k=aux_k, k_anneal_steps=k_anneal_steps, k_start=k_start)
    nested = NestedMSE([config.d_sae >> g for g in reversed(range(prefixes))])
    variant.add_term("mse", 1.0, nested)
    variant.sae.own_pass = partial(decode_by_section, sizes=nested.sizes)
    return variant
