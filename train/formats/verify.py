"""Whether files say what an SAE does: both compute the same rows, in float64, and are compared."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...cache.layout import Hook
from ...cache.reader import Cache, list_caches
from ...common.errors import SaeError, UsageError
from ..sae import SAE
from .base import Reference
from .canonical import CanonicalSAE

SAMPLE_ROWS, SAMPLE_BLOCKS, BATCH_ROWS = 4096, 16, 256
TOLERANCE = 1e-5


@dataclass(frozen=True)
class SampleRows:
    """Activations to compare on, and what they are."""

    x_RD: Tensor  # float32
    what: str


@dataclass(frozen=True)
class Check:
    """What a comparison found; `passed` unless it is refused."""

    rows: int
    what: str
    l0: float  # latents a row, of the SAE of ours
    different: int  # pairs of row and latent that only one side has, out of reach of rounding
    rounded: int  # rows with such pairs within reach of it, left out of the errors
    error_f: float  # |f - f'| / |f| over all rows
    error_x: float
    worst: float = TOLERANCE

    @property
    def passed(self) -> bool:
        return self.different == 0 and self.rounded < self.rows and max(self.error_f, self.error_x) <= self.worst

    def __str__(self) -> str:
        if self.different:
            return f"{self.different:,} latents fire on one side alone in {self.rows:,} rows ({self.what})"
        if self.rounded >= self.rows:
            return f"no row of {self.rows:,} ({self.what}) can be compared: in each a latent is within float32's rounding of its threshold"
        sets = "active sets equal"
        if self.rounded:
            sets = f"active sets equal but in {self.rounded:,} rows, at a threshold within float32's rounding"
        return (
            f"{self.rows:,} rows ({self.what}): {sets}, {self.l0:.1f} latents a row; relative error {self.error_f:.1e} of f, "
            f"{self.error_x:.1e} of x_hat"
        )

    def record(self) -> dict[str, Any]:
        return {**vars(self), "passed": self.passed}


Progress = Callable[[int, int], None]  # rows done, of how many


def no_progress(done: int, total: int) -> None:
    pass


def compare(
    sae: SAE,
    plain: CanonicalSAE,
    reference: Reference,
    rows: SampleRows,
    size_F: Tensor | None = None,
    progress: Progress = no_progress,
) -> Check:
    """An SAE of ours against the files. `plain` is the same SAE: it knows where rounding could decide.

    `size_F`: how many times as large the latents of the files are.
    """
    wide = copy.deepcopy(sae).double().cpu().eval()
    different = rounded = 0
    fired = 0.0
    squares = dict.fromkeys(("f", "df", "x", "dx"), 0.0)
    with torch.no_grad():
        for number, x_BD in enumerate(rows.x_RD.double().split(BATCH_ROWS)):
            progress(number * BATCH_ROWS, len(rows.x_RD))
            f_BF = wide.encode(x_BD)
            recon_BD = wide.decode(f_BF)
            theirs_BF, their_recon_BD = reference(x_BD)
            f_BF = f_BF if size_F is None else f_BF * size_F
            apart_BF = (f_BF != 0) != (theirs_BF != 0)
            close_BF = apart_BF & plain.doubt(x_BD) if apart_BF.any() else apart_BF
            different += int((apart_BF & ~close_BF).sum())
            same_B = ~apart_BF.any(1)
            rounded += int(close_BF.any(1).sum())
            fired += float((f_BF != 0).sum())
            pairs = {"f": f_BF, "df": f_BF - theirs_BF, "x": recon_BD, "dx": recon_BD - their_recon_BD}
            for name, t in pairs.items():
                squares[name] += float(t[same_B].square().sum())
    n = max(len(rows.x_RD), 1)
    error_f, error_x = (relative_error(squares[f"d{name}"], squares[name]) for name in ("f", "x"))
    return Check(len(rows.x_RD), rows.what, fired / n, different, rounded, error_f, error_x)


def relative_error(off: float, whole: float) -> float:
    """sqrt(off / whole); of nothing at all 0, and infinite where it is no number."""
    if off == 0:
        return 0.0
    ratio = math.sqrt(off / whole) if whole > 0 else math.inf
    return ratio if math.isfinite(ratio) else math.inf


def require_passed(check: Check, doing: str) -> Check:
    if not check.passed:
        raise SaeError(f"{doing} failed its own check and nothing was left behind: {check}. Please report it.")
    return check


def cached_rows(cache: Cache, hook: Hook, count: int = SAMPLE_ROWS) -> SampleRows:
    """Rows of a cache, from all over it."""
    name = cache.require(*hook)
    chunks = cache.chunk_rows
    count = min(count, sum(chunks))
    each = max(1, count // SAMPLE_BLOCKS)
    parts: list[np.ndarray] = []
    ends = np.cumsum(chunks)
    for at in np.linspace(0, sum(chunks) - each, math.ceil(count / each)).astype(int):
        chunk = int(np.searchsorted(ends, at, side="right"))
        start = int(at - (ends[chunk] - chunks[chunk]))
        parts += cache.rows_of(name, chunk, start, min(each, chunks[chunk] - start))
    bits_RD = np.concatenate(parts)
    return SampleRows(torch.from_numpy(bits_RD).view(torch.bfloat16).float(), f"of the cache {cache.folder.name}")


def synthetic_rows(plain: CanonicalSAE, count: int = SAMPLE_ROWS) -> SampleRows:
    """Sums of decoder rows on b_dec, of sizes at which latents begin to fire.

    Every other one is moved along a latent's encoder until that latent stands near its threshold, on either side: rows
    that are drawn alone hardly ever come near one.
    """
    generator = torch.Generator().manual_seed(0)
    several = min(32, max(1, plain.d_sae // 8))
    code = plain.within(("jumprelu", "topk"))
    assert code is not None
    jump_F = torch.zeros_like(code.b_enc) if code.threshold is None else code.threshold
    sum_RD = torch.zeros(count, plain.d_in, dtype=torch.float64)
    for at_R in torch.randint(plain.d_sae, (several, count), generator=generator):
        amount_R = 0.5 + torch.rand(count, generator=generator, dtype=torch.float64)
        sum_RD += amount_R[:, None] * plain.W_dec[at_R]
    # As long as a row has to be for a latent to come to its threshold. Where b_enc is that of an encoder that sees
    # x - b_dec and has no bias, only the rounding of their difference is left, and b_dec gives the scale.
    norm_F = code.W_enc.norm(dim=0).clamp_min(1e-30)
    reach = float(((jump_F + (plain.b_dec @ code.W_enc + code.b_enc).abs()) / norm_F).median())
    if reach <= 1e-6 * (length := float(plain.b_dec.norm())):
        reach = length or 1.0
    length_R1 = reach * 2 ** (4 * torch.rand(count, 1, generator=generator, dtype=torch.float64) - 1)
    x_RD = plain.b_dec + length_R1 * sum_RD / sum_RD.norm(dim=1, keepdim=True).clamp_min(1e-30)
    spread = float((x_RD[:64] @ code.W_enc).std())
    at_N = torch.randint(plain.d_sae, (count // 2,), generator=generator)
    w_ND = code.W_enc.T[at_N]
    aside_N = (jump_F[at_N] + spread) * (torch.rand(len(at_N), generator=generator, dtype=torch.float64) - 0.5)
    short_N = jump_F[at_N] + aside_N - (x_RD[::2][: len(at_N)] * w_ND).sum(1) - code.b_enc[at_N]
    square_N = w_ND.square().sum(1)
    x_RD[::2][: len(at_N)] += torch.where(square_N > 0, short_N / square_N, 0)[:, None] * w_ND
    norm = float(x_RD.norm(dim=1).mean())
    what = f"synthetic, no cache being at hand: b_dec plus {several} decoder rows, half of them moved to near a latent's threshold, mean norm {norm:.3g}"
    return SampleRows(x_RD.float(), what)


def find_run_cache(origin: Mapping[str, Any]) -> Cache | None:
    """The cache that a run was trained on, where it stands now; None when it is gone."""
    if not isinstance(recorded := origin.get("cache"), str) or not isinstance(origin.get("fingerprint"), str):
        return None
    candidates = []
    if (Path(recorded) / "zarr.json").exists():
        candidates.append(Cache(recorded))
    candidates += [cache for cache in list_caches().values() if isinstance(cache, Cache)]
    return next((cache for cache in candidates if cache.fingerprint == origin["fingerprint"]), None)


def sample_run_rows(
    origin: Mapping[str, Any], hook: Hook | None, given: Path | None
) -> tuple[Cache | None, SampleRows | None]:
    """The cache of a run, or the one that was given, and rows of it; None where it is gone, or holds none any more."""
    cache = Cache(given) if given is not None else find_run_cache(origin)
    if cache is None or hook is None:
        return cache, None
    try:
        return cache, cached_rows(cache, hook)
    except UsageError:
        if given is not None:
            raise
        return cache, None  # a ring keeps no rows
