"""Verify exports and imports: encode the same rows in float64 with the SAE and with the files, and compare."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...cache.catalog import find_by_fingerprint
from ...cache.hooks import Hook
from ...cache.reader import Cache
from ...common.errors import DamagedError, SaeError, UsageError
from ..layer_norm import layer_normalize
from ..sae import SAE
from .base import Reference
from .canonical import CanonicalSAE

SAMPLE_ROWS, SAMPLE_BLOCKS = 4096, 16  # number of rows to compare, and of places in a cache from which to read them
BATCH_ROWS = 256
TOLERANCE = 1e-5  # largest relative error of f and of x_hat
MUCH_SMALLER = 0.5  # a squared error is much smaller than another if their ratio is below this

Progress = Callable[[int, int], None]  # (rows done, rows in all)


def no_progress(done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class SampleRows:
    """Activations for the comparison."""

    x_RD: Tensor  # float32
    description: str  # says where the rows come from


@dataclass(frozen=True)
class Check:
    """The result of a comparison.

    The two sides are the SAE and the files. A latent is active if it is not zero. Rows with ambiguous latents are left
    out of the two errors.
    """

    rows: int
    description: str  # of the rows
    l0: float  # active latents of the SAE per row
    mismatches: int  # (row, latent) pairs active on one side only; not explained by float32 rounding
    ambiguous_rows: int  # rows with a latent that is active on one side only, but near its threshold
    latent_error: float  # |f - f'| / |f| over all rows
    reconstruction_error: float  # the same for x_hat
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        errors = max(self.latent_error, self.reconstruction_error)
        return self.mismatches == 0 and self.ambiguous_rows < self.rows and errors <= self.tolerance

    def __str__(self) -> str:
        if self.mismatches:
            return (
                f"{self.mismatches:,} latents in {self.rows:,} rows ({self.description}) are active in the SAE or the "
                "files, but not in both"
            )
        if self.ambiguous_rows >= self.rows:
            return (
                f"none of the {self.rows:,} rows ({self.description}) can be compared: each has a latent within "
                "float32 rounding of its threshold"
            )
        sets = "active sets equal"
        if self.ambiguous_rows:
            sets += f" except in {self.ambiguous_rows:,} rows, within float32 rounding of a threshold"
        return (
            f"{self.rows:,} rows ({self.description}): {sets}, L0 {self.l0:.1f}; relative error "
            f"{self.latent_error:.1e} in f, {self.reconstruction_error:.1e} in x_hat"
        )

    def record(self) -> dict[str, Any]:
        """The check as recorded in run.json, with the same keys as in earlier versions."""
        return {
            "rows": self.rows,
            "what": self.description,
            "l0": self.l0,
            "different": self.mismatches,
            "rounded": self.ambiguous_rows,
            "error_f": self.latent_error,
            "error_x": self.reconstruction_error,
            "worst": self.tolerance,
            "passed": self.passed,
        }


def compare(
    sae: SAE,
    canonical: CanonicalSAE,
    reference: Reference,
    rows: SampleRows,
    scale_F: Tensor | None = None,
    progress: Progress = no_progress,
) -> Check:
    """Compare an SAE with `reference`, which computes latents and reconstructions from the files.

    Args:
        canonical: the same SAE in canonical form; decides where rounding can change which latents are active.
        scale_F: (d_sae) the factors by which the latents computed from the files are larger than those of `sae`.
    """
    sae64 = copy.deepcopy(sae).double().cpu().eval()
    mismatches = ambiguous_rows = 0
    active = 0.0
    squares = dict.fromkeys(("f", "df", "x", "dx"), 0.0)
    with torch.no_grad():
        for number, x_BD in enumerate(rows.x_RD.double().split(BATCH_ROWS)):
            progress(number * BATCH_ROWS, len(rows.x_RD))
            f_BF = sae64.encode(x_BD)
            recon_BD = sae64.decode(f_BF, x_BD)
            their_f_BF, their_recon_BD = reference(x_BD)
            if sae.layer_norm:  # our latents are in units of raw activations, theirs in units of the normalized token
                their_f_BF = their_f_BF * layer_normalize(x_BD).std_B1
            f_BF = f_BF if scale_F is None else f_BF * scale_F
            differs_BF = (f_BF != 0) != (their_f_BF != 0)
            ambiguous_BF = differs_BF & canonical.is_ambiguous(x_BD) if differs_BF.any() else differs_BF
            mismatches += int((differs_BF & ~ambiguous_BF).sum())
            ambiguous_rows += int(ambiguous_BF.any(1).sum())
            active += float((f_BF != 0).sum())
            agrees_B = ~differs_BF.any(1)
            pairs = {"f": f_BF, "df": f_BF - their_f_BF, "x": recon_BD, "dx": recon_BD - their_recon_BD}
            for name, t in pairs.items():
                squares[name] += float(t[agrees_B].square().sum())
    latent_error, reconstruction_error = (relative_error(squares[f"d{name}"], squares[name]) for name in ("f", "x"))
    count = len(rows.x_RD)
    l0 = active / max(count, 1)
    return Check(count, rows.description, l0, mismatches, ambiguous_rows, latent_error, reconstruction_error)


def relative_error(difference_square: float, square: float) -> float:
    """sqrt(difference_square / square): 0 when nothing differs, inf when the ratio is not finite."""
    if difference_square == 0:
        return 0.0
    ratio = math.sqrt(difference_square / square) if square > 0 else math.inf
    return ratio if math.isfinite(ratio) else math.inf


def require_passed(check: Check, action: str) -> Check:
    """Raise SaeError if a comparison failed. `action` is the subject of the error message: "The export to saelens"."""
    if not check.passed:
        raise SaeError(
            f"{action} failed verification, and no files were kept: {check}. This is a bug: please report it."
        )
    return check


def check_orientation(sae: SAE, rows: SampleRows | None, path: Path) -> list[str]:
    """Notes about a square SAE, whose matrices keep their shapes when they are transposed.

    Raises DamagedError if cached activations are reconstructed better with one or both matrices transposed. If there
    are no cached activations, a note says that this could not be checked.
    """
    if rows is None:
        return [
            f"d_in and d_sae are both {sae.d_in:,}: the shapes do not show whether a matrix is transposed, and there "
            "is no cache on which the reconstruction could show it."
        ]
    x_RD, errors = rows.x_RD.double(), dict[str, float]()
    for names in ((), ("W_enc",), ("W_dec",), ("W_enc", "W_dec")):
        turned = copy.deepcopy(sae).double().cpu().eval()
        for name in names:
            matrix = getattr(turned, name)
            matrix.data = matrix.data.T.contiguous()
        with torch.no_grad():
            errors[" and ".join(names)] = float((turned.decode(turned.encode(x_RD), x_RD) - x_RD).square().sum())
    best = min(errors, key=lambda names: errors[names])
    if errors[best] < MUCH_SMALLER * errors[""]:
        raise DamagedError(
            f"{path}: {best} seems to be transposed. On {len(x_RD):,} rows ({rows.description}), the squared error of "
            f"the reconstruction is {errors[''] / max(errors[best], 1e-30):.3g} times as large as with {best} "
            "transposed. Ask the author, or transpose it."
        )
    return []


# --- rows to compare --------------------------------------------------------------------------------------------------


def cached_rows(cache: Cache, hook: Hook, count: int = SAMPLE_ROWS) -> SampleRows:
    """Rows of a cache, in blocks spread evenly over the cache."""
    name = cache.require_array(*hook)
    chunks = cache.chunk_rows
    count = min(count, sum(chunks))
    block = max(1, count // SAMPLE_BLOCKS)
    parts: list[np.ndarray] = []
    chunk_ends = np.cumsum(chunks)
    for row in np.linspace(0, sum(chunks) - block, math.ceil(count / block)).astype(int):
        chunk = int(np.searchsorted(chunk_ends, row, side="right"))
        start = int(row - (chunk_ends[chunk] - chunks[chunk]))
        parts += cache.read_rows(name, chunk, start, min(block, chunks[chunk] - start))
    bits_RD = np.concatenate(parts)
    return SampleRows(torch.from_numpy(bits_RD).view(torch.bfloat16).float(), f"from cache {cache.folder.name}")


def synthetic_rows(canonical: CanonicalSAE, count: int = SAMPLE_ROWS) -> SampleRows:
    """Random sums of decoder rows, scaled to norms at which latents begin to activate, plus b_dec.

    Every second row is then moved along one latent's encoder direction until that latent is slightly above or below its
    threshold. Random rows are rarely near a threshold, so they would not reveal a wrong threshold.
    """
    generator = torch.Generator().manual_seed(0)
    summands = min(32, max(1, canonical.d_sae // 8))
    encoder = canonical.convert_to(("jumprelu", "topk"))
    assert encoder is not None
    threshold_F = torch.zeros_like(encoder.b_enc) if encoder.threshold is None else encoder.threshold
    sum_RD = torch.zeros(count, canonical.d_in, dtype=torch.float64)
    for latent_R in torch.randint(canonical.d_sae, (summands, count), generator=generator):
        weight_R = 0.5 + torch.rand(count, generator=generator, dtype=torch.float64)
        sum_RD += weight_R[:, None] * canonical.W_dec[latent_R]
    norm_R1 = activating_norm(canonical, encoder, threshold_F) * 2 ** (
        4 * torch.rand(count, 1, generator=generator, dtype=torch.float64) - 1
    )
    x_RD = canonical.b_dec + norm_R1 * sum_RD / sum_RD.norm(dim=1, keepdim=True).clamp_min(1e-30)
    move_near_thresholds(x_RD, encoder, threshold_F, generator)
    description = (
        f"synthetic, without a cache: b_dec plus {summands} decoder rows, half of them moved near a latent's "
        f"threshold, mean norm {float(x_RD.norm(dim=1).mean()):.3g}"
    )
    return SampleRows(x_RD.float(), description)


def activating_norm(canonical: CanonicalSAE, encoder: CanonicalSAE, threshold_F: Tensor) -> float:
    """The norm at which a row of activations brings a latent to its threshold; the median over all latents.

    If the encoder reads x - b_dec and has no bias, b_enc + b_dec W_enc is only a rounding error. In that case, the norm
    of b_dec is returned.
    """
    encoder_norm_F = encoder.W_enc.norm(dim=0).clamp_min(1e-30)
    bias_F = canonical.b_dec @ encoder.W_enc + encoder.b_enc
    norm = float(((threshold_F + bias_F.abs()) / encoder_norm_F).median())
    b_dec_norm = float(canonical.b_dec.norm())
    return (b_dec_norm or 1.0) if norm <= 1e-6 * b_dec_norm else norm


def move_near_thresholds(x_RD: Tensor, encoder: CanonicalSAE, threshold_F: Tensor, generator: torch.Generator) -> None:
    """Move every second row, in place, along a random latent's encoder direction.

    The distance is such that the latent's pre-activation is slightly above or below the latent's threshold.
    """
    spread = float((x_RD[:64] @ encoder.W_enc).std())
    latent_N = torch.randint(encoder.d_sae, (len(x_RD) // 2,), generator=generator)
    w_ND = encoder.W_enc.T[latent_N]
    noise_N = torch.rand(len(latent_N), generator=generator, dtype=torch.float64) - 0.5
    target_N = threshold_F[latent_N] + (threshold_F[latent_N] + spread) * noise_N
    moved_ND = x_RD[::2][: len(latent_N)]  # a view
    missing_N = target_N - (moved_ND * w_ND).sum(1) - encoder.b_enc[latent_N]
    square_N = w_ND.square().sum(1)
    moved_ND += torch.where(square_N > 0, missing_N / square_N, 0)[:, None] * w_ND


def find_run_cache(origin: Mapping[str, Any]) -> Cache | None:
    """The cache that a run was trained on, even if it was moved; None if it is gone. `origin` is the SAE's origin."""
    folder, fingerprint = origin.get("cache"), origin.get("fingerprint")
    if not isinstance(folder, str) or not isinstance(fingerprint, str):
        return None
    return find_by_fingerprint(fingerprint, folder)


def sample_run_rows(
    origin: Mapping[str, Any], hook: Hook | None, cache_folder: Path | None
) -> tuple[Cache | None, SampleRows | None]:
    """The cache in `cache_folder` (by default, the run's own cache), and a sample of its rows.

    The cache is None if it no longer exists. The rows are None if there is no cache, or if the cache is a ring
    buffer, which keeps no rows. Raises UsageError if an explicitly given cache has no rows for the hook.
    """
    cache = Cache(cache_folder) if cache_folder is not None else find_run_cache(origin)
    if cache is None or hook is None:
        return cache, None
    try:
        return cache, cached_rows(cache, hook)
    except UsageError:
        if cache_folder is not None:
            raise
        return cache, None
