"""Untrained reference SAEs for comparison: the identity, zero, a PCA and a random dictionary."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..cache.contexts import Contexts
from ..cache.hooks import Hook
from ..cache.outliers import outlier_mask
from ..common.errors import UnavailableError
from ..common.files import digest_of
from ..train.activation_functions import TopK
from ..train.sae import SAE
from .context import EvalContext
from .metrics.base import EvalTarget, RowSet

FIT_CONTEXTS = 256  # number of training contexts that the PCA is fitted on: about 30,000 rows
GAIN_ROWS = 2048  # the first rows, which are used to measure the L0 of the SAEs and to fit the gain


class Identity:
    """x_hat = x, so every score is 1."""

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, f: Tensor) -> Tensor:
        return f


class Zero:
    """x_hat = 0 at every position, including BOS, so the scores are 0."""

    def encode(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape)

    def decode(self, f: Tensor) -> Tensor:
        return f


class PCA:
    """x_hat = mean + projection onto the `rank` directions of largest variance. Latents are signed and dense."""

    def __init__(self, x_RD: Tensor, rank: int) -> None:
        self.b_dec = x_RD.mean(0)
        covariance_DD = torch.cov(x_RD.T.double())
        self.W_dec = torch.linalg.eigh(covariance_DD).eigenvectors[:, -rank:].T.to(x_RD.dtype).contiguous()

    def encode(self, x: Tensor) -> Tensor:
        return (x - self.b_dec) @ self.W_dec.T

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.W_dec + self.b_dec


def random_dictionary(x_RD: Tensor, d_sae: int, k: int) -> SAE:
    """An SAE whose rows are random unit vectors. It applies TopK to their dot products with x - mean and has the
    least-squares gain."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sae = SAE(x_RD.shape[1], d_sae, [TopK(k)]).requires_grad_(False).to(x_RD.device).eval()
    sae.b_dec.copy_(x_RD.mean(0))
    recon_RD = sae.decode(sae.encode(x_RD)) - sae.b_dec
    sae.W_enc.mul_((recon_RD * (x_RD - sae.b_dec)).sum() / recon_RD.square().sum())
    return sae


def reference_targets(
    ctx: EvalContext, text: Contexts, row_set: RowSet, targets: Iterable[EvalTarget]
) -> dict[str, EvalTarget]:
    """The references for the SAEs of one row set: identity, zero, PCA and a random dictionary, with the median L0 and
    width of those SAEs.

    The targets are read one after another, so that not all of them have to be in memory.

    Raises UnavailableError if all rows of the text are outliers, or if `targets` is empty because every SAE is damaged.
    """
    hook, norm_limit = row_set
    x_RD = sample_activations(ctx, text, hook).float()
    x_RD = x_RD[~outlier_mask(x_RD, norm_limit)]
    if not len(x_RD):
        raise UnavailableError(
            f"all rows of {hook} are outliers, with norms over {norm_limit:.4g}. Pass --max-norm none to count them."
        )
    gain_RD = x_RD[:GAIN_ROWS]
    if not (sizes := [l0_and_width(target, gain_RD) for target in targets]):
        raise UnavailableError(
            f"no SAE at {hook} could be read. The PCA and the random dictionary need the L0 and width of an SAE."
        )
    l0s, widths = torch.stack([l0 for l0, _ in sizes]), torch.tensor([width for _, width in sizes])
    rank = min(max(round(float(l0s.median())), 1), x_RD.shape[1] - 1)
    width = max(int(widths.median()), rank)
    return {
        "identity": EvalTarget(Identity(), hook, reference=True, norm_limit=norm_limit),
        "zero": EvalTarget(Zero(), hook, everywhere=True, reference=True, norm_limit=norm_limit),
        f"pca-{rank}": EvalTarget(PCA(x_RD, rank), hook, reference=True, norm_limit=norm_limit),
        f"random-{rank}": EvalTarget(
            random_dictionary(gain_RD, width, rank), hook, reference=True, norm_limit=norm_limit
        ),
    }


def l0_and_width(target: EvalTarget, x_RD: Tensor) -> tuple[Tensor, int]:
    """The mean number of nonzero latents at these rows, and the total number of latents."""
    f_RF = target.sae.encode(x_RD)
    return (f_RF != 0).sum(1).float().mean(), f_RF.shape[1]


def sample_activations(ctx: EvalContext, text: Contexts, hook: Hook) -> Tensor:
    """Activations (R, D) of the first contexts of the text, from the artifact cache or one pass of the model."""
    text = text.select(slice(0, FIT_CONTEXTS))

    def capture() -> dict[str, Tensor]:
        batches = ctx.batches(16, FIT_CONTEXTS, text)
        return {"x": torch.cat([ctx.model.capture_hooks(b.ids, [hook])[hook][b.counted].cpu() for b in batches])}

    depends = {**ctx.model_identity, "skip": ctx.context_format.skip_record, **hook.record}
    depends |= {"ids": digest_of(text.ids.tolist())}
    depends |= {} if text.rows is None else {"rows": digest_of(text.rows.tolist())}
    return ctx.artifacts.get_or_compute("sample", depends, capture)["x"].to(ctx.device)
