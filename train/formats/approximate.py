"""What no format holds, as the nearest that one does: for those who ask for it, with how far it is."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...common.errors import UsageError
from ..sae import SAE
from .canonical import CanonicalSAE, fold_until_coupling, require_activation

APPROXIMATIONS = ("topk", "jumprelu", "relu")
FIT_ROWS = 1024


@torch.no_grad()
def approximate_sae(sae: SAE, kind: str, x_RD: Tensor) -> tuple[CanonicalSAE, dict[str, Any]]:
    """The SAE with its last activations replaced by one of `kind` with as many latents a row, and what that costs.

    topk: k is the mean number of latents of these rows; jumprelu: one threshold that leaves as many; relu: neither.
    """
    if kind not in APPROXIMATIONS:
        raise UsageError(f"--approximate {kind} is unknown: give one of {', '.join(APPROXIMATIONS)}.")
    x_RD = x_RD[:: max(1, len(x_RD) // FIT_ROWS)][:FIT_ROWS]
    f_RF = sae.encode(x_RD)
    l0 = float((f_RF != 0).sum(1).double().mean())
    plain = fold_until_coupling(sae)
    plain = replace(plain.within(("jumprelu",)) or plain, kind="relu", threshold=None).unit()
    z_RF = x_RD.double() @ plain.W_enc + plain.b_enc
    if kind == "topk":
        plain = replace(plain, kind="topk", k=min(max(1, round(l0)), plain.d_sae))
    elif kind == "jumprelu":
        ranked_N = z_RF.flatten().sort(descending=True).values
        at = min(max(1, round(l0 * len(x_RD))), len(ranked_N) - 1)
        jump = (ranked_N[at - 1] + ranked_N[at]) / 2
        plain = replace(plain, kind="jumprelu", threshold=jump.clamp_min(0).expand(plain.d_sae).clone())
    theirs_RF = z_RF.relu()
    if kind == "topk":
        top = theirs_RF.topk(plain.k, dim=-1)
        theirs_RF = torch.zeros_like(theirs_RF).scatter(-1, top.indices, top.values)
    elif plain.threshold is not None:
        theirs_RF = theirs_RF * (z_RF > plain.threshold)
    ours_RD, theirs_RD = sae.decode(f_RF).double(), theirs_RF @ plain.W_dec + plain.b_dec
    around = (x_RD - x_RD.mean(0)).double().square().sum()
    record: dict[str, Any] = {
        "of": "+".join(link.name for link in sae.activation),  # type: ignore[misc]
        "as": kind,
        "rows": len(x_RD),
        "l0": l0,
        "l0_approximated": float((theirs_RF != 0).sum(1).double().mean()),
        "explained_variance": float(1 - (x_RD - ours_RD).square().sum() / around),
        "explained_variance_approximated": float(1 - (x_RD - theirs_RD).square().sum() / around),
        "relative_error_of_x_hat": float(((ours_RD - theirs_RD).square().sum() / ours_RD.square().sum()).sqrt()),
    }
    if record["explained_variance_approximated"] < 0 < record["explained_variance"]:
        raise UsageError(
            f"The nearest {kind} of this {record['of']} is worse than no SAE at all: it explains "
            f"{record['explained_variance_approximated']:.3g} of the variance, where the SAE explains {record['explained_variance']:.3g}. "
            "Nothing was written."
        )
    if kind == "topk":
        record["k"] = plain.k
    elif plain.threshold is not None:
        record["threshold"] = float(plain.threshold[0])
    return require_activation(plain), record


def describe_approximation(record: dict[str, Any]) -> str:
    knob = "".join(f", {name} {record[name]:.4g}" for name in ("k", "threshold") if name in record)
    return (
        f"{record['of']} as {record['as']}{knob}: x_hat is {record['relative_error_of_x_hat']:.2g} of its size away, L0 "
        f"{record['l0']:.1f} -> {record['l0_approximated']:.1f}, explained variance {record['explained_variance']:.4f} -> "
        f"{record['explained_variance_approximated']:.4f} ({record['rows']:,} rows)"
    )
