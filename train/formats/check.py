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

from ...cache.errors import SaeError, UsageError
from ...cache.layout import Hook
from ...cache.reader import Cache, caches
from ..sae import SAE
from .plain import Plain

ROWS, STRETCHES, AT_ONCE = 4096, 16, 256
WORST = 1e-5


@dataclass(frozen=True)
class Rows:
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
    worst: float = WORST

    @property
    def passed(self) -> bool:
        return self.different == 0 and max(self.error_f, self.error_x) <= self.worst

    def __str__(self) -> str:
        if self.different:
            return f"{self.different:,} latents fire on one side alone in {self.rows:,} rows ({self.what})"
        sets = "active sets equal"
        if self.rounded:
            sets = f"active sets equal but in {self.rounded:,} rows, at a threshold within float32's rounding"
        return (
            f"{self.rows:,} rows ({self.what}): {sets}, {self.l0:.1f} latents a row; relative error {self.error_f:.1e} of f, "
            f"{self.error_x:.1e} of x_hat"
        )

    def record(self) -> dict[str, Any]:
        return {**vars(self), "passed": self.passed}


Reference = Callable[[Tensor], tuple[Tensor, Tensor]]


def compare(sae: SAE, plain: Plain, reference: Reference, rows: Rows) -> Check:
    """An SAE of ours against the files. `plain` is the same SAE: it knows where rounding could decide."""
    wide = copy.deepcopy(sae).double().cpu().eval()
    different = rounded = 0
    fired = 0.0
    squares = dict.fromkeys(("f", "df", "x", "dx"), 0.0)
    with torch.no_grad():
        for x_BD in rows.x_RD.double().split(AT_ONCE):
            f_BF = wide.encode(x_BD)
            recon_BD = wide.decode(f_BF)
            theirs_BF, their_recon_BD = reference(x_BD)
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
    error_f, error_x = (relative(squares[f"d{name}"], squares[name]) for name in ("f", "x"))
    return Check(len(rows.x_RD), rows.what, fired / n, different, rounded, error_f, error_x)


def relative(off: float, whole: float) -> float:
    """sqrt(off / whole); of nothing at all 0, and infinite where it is no number."""
    if off == 0:
        return 0.0
    ratio = math.sqrt(off / whole) if whole > 0 else math.inf
    return ratio if math.isfinite(ratio) else math.inf


def insist(check: Check, doing: str) -> Check:
    if not check.passed:
        raise SaeError(f"{doing} failed its own check and nothing was left behind: {check}. Please report it.")
    return check


def cached_rows(cache: Cache, hook: Hook, count: int = ROWS) -> Rows:
    """Rows of a cache, from all over it."""
    name = cache.require(*hook)
    chunks = cache.chunk_rows
    count = min(count, sum(chunks))
    each = max(1, count // STRETCHES)
    parts: list[np.ndarray] = []
    ends = np.cumsum(chunks)
    for at in np.linspace(0, sum(chunks) - each, math.ceil(count / each)).astype(int):
        chunk = int(np.searchsorted(ends, at, side="right"))
        start = int(at - (ends[chunk] - chunks[chunk]))
        parts += cache.rows_of(name, chunk, start, min(each, chunks[chunk] - start))
    bits_RD = np.concatenate(parts)
    return Rows(torch.from_numpy(bits_RD).view(torch.bfloat16).float(), f"of the cache {cache.folder.name}")


def synthetic_rows(plain: Plain, count: int = ROWS) -> Rows:
    """Sums of decoder rows on b_dec, and a little noise, so large that about as many latents fire as were added."""
    generator = torch.Generator().manual_seed(0)
    several = min(32, plain.d_sae)
    at_RN = torch.randint(plain.d_sae, (count, several), generator=generator)
    amount_RN = 0.5 + torch.rand(count, several, generator=generator, dtype=torch.float64)
    sum_RD = torch.zeros(count, plain.d_in, dtype=torch.float64)
    for n in range(several):
        sum_RD += amount_RN[:, n, None] * plain.W_dec[at_RN[:, n]]
    sum_RD += 0.01 * torch.randn(count, plain.d_in, generator=generator, dtype=torch.float64)
    size = plain.W_dec.norm(dim=1).mean().clamp_min(1e-30)
    code = plain.within(("jumprelu", "topk"))
    assert code is not None
    scale = 1.0
    for power in range(-6, 24):
        scale = float(2.0**power / size)
        z_BF = (plain.b_dec + scale * sum_RD[:64]) @ code.W_enc + code.b_enc
        if ((z_BF > (0 if code.threshold is None else code.threshold)).sum(1).double().mean()) >= several:
            break
    x_RD = (plain.b_dec + scale * sum_RD).float()
    return Rows(
        x_RD,
        f"synthetic, no cache being at hand: b_dec plus {several} decoder rows times {scale:.3g} x U(0.5, 1.5), mean norm {float(x_RD.norm(dim=1).mean()):.3g}",
    )


def cache_of_run(origin: Mapping[str, Any]) -> Cache | None:
    """The cache that a run was trained on, where it stands now; None when it is gone."""
    if not isinstance(recorded := origin.get("cache"), str) or not isinstance(origin.get("fingerprint"), str):
        return None
    candidates = []
    if (Path(recorded) / "zarr.json").exists():
        candidates.append(Cache(recorded))
    candidates += [cache for cache in caches().values() if isinstance(cache, Cache)]
    return next((cache for cache in candidates if cache.fingerprint == origin["fingerprint"]), None)


def rows_of_run(origin: Mapping[str, Any], hook: Hook | None, given: Path | None) -> tuple[Cache | None, Rows | None]:
    """The cache of a run, or the one that was given, and rows of it; None where it is gone, or holds none any more."""
    cache = Cache(given) if given is not None else cache_of_run(origin)
    if cache is None or hook is None:
        return cache, None
    try:
        return cache, cached_rows(cache, hook)
    except UsageError:
        if given is not None:
            raise
        return cache, None  # a ring keeps no rows
