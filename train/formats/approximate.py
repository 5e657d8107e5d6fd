"""Replace an SAE that a format cannot store with the nearest SAE that the format can store; report the difference."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...common.errors import UsageError
from ..layer_norm import layer_normalize
from ..sae import SAE
from .canonical import CanonicalSAE, chain_name, fold_until_coupling, require_activation

APPROXIMATIONS = ("topk", "jumprelu", "relu")
FIT_ROWS = 1024


@torch.no_grad()
def approximate_sae(sae: SAE, activation: str, x_RD: Tensor) -> tuple[CanonicalSAE, dict[str, Any]]:
    """Replace the end of an SAE's activation chain by one of APPROXIMATIONS.

    What is replaced begins with the first link that couples latents. For topk, k is the mean L0 on the rows `x_RD`. For
    jumprelu, all latents get one threshold, chosen such that L0 is the same. For relu there is nothing to fit.

    Args:
        x_RD: activations to fit and measure on; at most FIT_ROWS of them are used.

    Returns:
        The approximation, and a record of how far it is from the SAE on these rows.

    Raises:
        UsageError: the activation is unknown, or the approximation explains less variance than the mean row.
    """
    if activation not in APPROXIMATIONS:
        raise UsageError(f"--approximate {activation} is unknown: expected one of {', '.join(APPROXIMATIONS)}.")
    x_RD = x_RD[:: max(1, len(x_RD) // FIT_ROWS)][:FIT_ROWS]
    if sae.layer_norm:  # fit only the part after the norm; the approximation keeps the norm
        x_RD, sae = layer_normalize(x_RD).x_BD, copy.copy(sae)
        sae.layer_norm = False
        normed, fit = approximate_sae(sae, activation, x_RD)
        return replace(normed, layer_norm=True), fit
    f_RF = sae.encode(x_RD)
    l0 = float((f_RF != 0).sum(1).double().mean())
    folded = fold_until_coupling(sae)
    relu = replace(folded.convert_to(("jumprelu",)) or folded, activation="relu", threshold=None).with_unit_rows()
    z_RF = x_RD.double() @ relu.W_enc + relu.b_enc
    nearest = fit_activation(relu, activation, z_RF, l0)
    nearest_f_RF = activate(nearest, z_RF)
    recon_RD, nearest_recon_RD = sae.decode(f_RF).double(), nearest_f_RF @ nearest.W_dec + nearest.b_dec
    variance = (x_RD - x_RD.mean(0)).double().square().sum()
    record: dict[str, Any] = {
        "of": chain_name(sae),
        "as": activation,
        "rows": len(x_RD),
        "l0": l0,
        "l0_approximated": float((nearest_f_RF != 0).sum(1).double().mean()),
        "explained_variance": float(1 - (x_RD - recon_RD).square().sum() / variance),
        "explained_variance_approximated": float(1 - (x_RD - nearest_recon_RD).square().sum() / variance),
        "relative_error_of_x_hat": float(
            ((recon_RD - nearest_recon_RD).square().sum() / recon_RD.square().sum()).sqrt()
        ),
    }
    if record["explained_variance_approximated"] < 0 < record["explained_variance"]:
        raise UsageError(
            f"The {activation} SAE that best approximates this {record['of']} SAE is worse than predicting the mean: "
            f"the approximation's explained variance is {record['explained_variance_approximated']:.3g}, and the "
            f"original's is {record['explained_variance']:.3g}. Nothing was written."
        )
    if activation == "topk":
        record["k"] = nearest.k
    elif nearest.threshold is not None:
        record["threshold"] = float(nearest.threshold[0])
    return require_activation(nearest).with_unit_rows(), record


def fit_activation(relu: CanonicalSAE, activation: str, z_RF: Tensor, l0: float) -> CanonicalSAE:
    """Replace the activation of a relu SAE by `activation`, fitted such that the L0 on pre-activations z_RF is `l0`."""
    if activation == "topk":
        return replace(relu, activation="topk", k=min(max(1, round(l0)), relu.d_sae))
    if activation == "jumprelu":
        descending_N = z_RF.flatten().sort(descending=True).values
        kept = min(max(1, round(l0 * len(z_RF))), len(descending_N) - 1)
        threshold = (descending_N[kept - 1] + descending_N[kept]) / 2
        return replace(relu, activation="jumprelu", threshold=threshold.clamp_min(0).expand(relu.d_sae).clone())
    return relu


def activate(canonical: CanonicalSAE, z_RF: Tensor) -> Tensor:
    """The latents for pre-activations z_RF. The activation has to be one of APPROXIMATIONS."""
    f_RF = z_RF.relu()
    if canonical.activation == "topk":
        top = f_RF.topk(canonical.k, dim=-1)
        return torch.zeros_like(f_RF).scatter(-1, top.indices, top.values)
    return f_RF if canonical.threshold is None else f_RF * (z_RF > canonical.threshold)


def describe_approximation(record: dict[str, Any]) -> str:
    fitted = "".join(f", {name} {record[name]:.4g}" for name in ("k", "threshold") if name in record)
    return (
        f"{record['of']} as {record['as']}{fitted}: relative error of x_hat {record['relative_error_of_x_hat']:.2g}, "
        f"L0 {record['l0']:.1f} -> {record['l0_approximated']:.1f}, explained variance "
        f"{record['explained_variance']:.4f} -> {record['explained_variance_approximated']:.4f} "
        f"({record['rows']:,} rows)"
    )
