"""Export an SAE in another library's file format. The files are verified before their folder gets its final name."""

import contextlib
import errno
import itertools
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...common.addresses import disk_path
from ...common.errors import UsageError
from ...common.files import fsync_folder, make_folder, os_error
from ..sae import SAE, load_sae
from .approximate import approximate_sae, describe_approximation
from .base import Format, find_format
from .canonical import UNIT_NORM_TOLERANCE, CanonicalSAE, from_canonical, to_canonical
from .metadata import export_metadata, run_hook
from .safe_read import ForeignFolder
from .verify import Check, Progress, SampleRows, compare, no_progress, require_passed, sample_run_rows, synthetic_rows

NUMBERS = itertools.count()  # used in the names of temporary folders


@dataclass
class ExportResult:
    """The result of an export: the folder and the verification. The result can be used as a path to the folder."""

    folder: Path
    format: str
    check: Check
    metadata: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def __fspath__(self) -> str:
        return os.fspath(self.folder)


def export_sae(
    run: SAE | str | os.PathLike[str],
    to: str,
    out: str | os.PathLike[str] | None = None,
    *,
    approximate: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress = no_progress,
) -> ExportResult:
    """Write an SAE in the file format of another library, and verify the files.

    The exported SAE reads raw activations and has unit decoder rows and float32 weights. Any factor by which training
    scaled the activations is folded in. The files are then read back. The latents and reconstructions computed from the
    files are compared with those computed by the SAE, on 4,096 rows of its cache, or on synthetic rows if the cache is
    gone. The sets of active latents have to be equal, and relative errors have to be at most 1e-5.

    Args:
        run: a run folder (a path or a `Run`), or an `SAE` in memory.
        to: "saelens", "gemma-scope", "dictionary-learning" or "sparsify".
        out: the folder to write, new or empty. Default: exports/<to> in the run folder.
        approximate: "topk", "jumprelu" or "relu": if the format cannot store the SAE exactly, write the nearest SAE
            with this activation, and record how much it differs.
        cache: the cache whose rows are used for the verification. Default: the cache that the run was trained on.
        progress: called with (rows compared, rows in all).

    Returns:
        An `ExportResult` with `.folder`, `.files`, `.check` (the comparison) and `.notes`.

    Raises:
        UsageError: the format cannot store this SAE, or `out` is not empty.
        SaeError: the verification failed; nothing is left behind.

    Examples:
        >>> exported = sae.export_sae("runs/topk-L12-n18432-s0-1a2b3c", "saelens", "exported")
        >>> print(exported.check)
        4,096 rows (from cache gemma-2-2b--pile--1a2b3c4d): active sets equal, L0 32.0; relative error 5.1e-08 in f, ...
    """
    fmt = find_format(to)
    folder = None if isinstance(run, SAE) else disk_path(run)
    sae = run if isinstance(run, SAE) else load_sae(run)
    target = export_folder(folder, to, out)
    source, rows = sample_run_rows(sae.origin, run_hook(sae), disk_path(cache) if cache is not None else None)
    metadata = export_metadata(sae, folder, source)
    notes: list[str] = []
    canonical, record = fit_to_format(sae, fmt, approximate, rows, notes)
    if record is not None:
        metadata["approximation"] = record
    compared = sae if record is None else from_canonical(canonical)
    scale_F = latent_scale(compared, canonical, fmt, notes)
    with new_folder(target) as temporary:
        fmt.write(canonical, temporary, metadata)
        reference = fmt.reference(ForeignFolder(temporary))
        check = compare(compared, canonical, reference, rows or synthetic_rows(canonical), scale_F, progress)
        require_passed(check, f"The export to {to}")
    return ExportResult(target, to, check, metadata, notes)


def export_folder(run: Path | None, to: str, out: str | os.PathLike[str] | None) -> Path:
    if out is not None:
        return disk_path(out)
    if run is None:
        raise UsageError("An SAE in memory has no run folder to export into: give out=, a new folder.")
    return run / "exports" / to


def fit_to_format(
    sae: SAE, fmt: Format, approximate: str | None, rows: SampleRows | None, notes: list[str]
) -> tuple[CanonicalSAE, dict[str, Any] | None]:
    """Convert an SAE to a form that the format can store. Also returns the record of the approximation, or None.

    Raises UsageError if the format cannot store the SAE; the message names the formats that can. `notes` receives the
    difference between the SAE and its approximation, or the fact that `approximate` was ignored.
    """
    if sae.layer_norm and not fmt.layer_norm:
        named = ", ".join(other.name for other in Format.registry.values() if other.layer_norm)
        try:
            to_canonical(sae)
            others = f"{named} can."
        except UsageError:  # no format can store it exactly
            others = f"No format can store it exactly; {named} can store the nearest topk, jumprelu or relu SAE "
            others += "(--approximate)."
        raise UsageError(
            f"{fmt.name} cannot store this SAE: it layer-normalizes each token (normalize=layer_norm), which cannot be "
            f"folded into the weights. {others}"
        )
    canonical: CanonicalSAE | None = None
    try:
        canonical = to_canonical(sae)
    except UsageError:
        if approximate is None:
            raise
    if canonical is not None:
        if exact := canonical.convert_to(fmt.activations):
            if approximate is not None:
                notes.append(f"{fmt.name} stores this {canonical.activation} SAE exactly; --approximate was ignored.")
            return exact.with_unit_rows(), None
        if approximate is None:
            able = [other.name for other in Format.registry.values() if canonical.convert_to(other.activations)]
            raise UsageError(
                f"{fmt.name} cannot store a {canonical.activation} SAE, only {' and '.join(fmt.activations)}; "
                f"{', '.join(able)} can. --approximate {fmt.activations[0]} writes the nearest SAE that {fmt.name} can "
                "store, and reports how much it differs from this one."
            )
    assert approximate is not None
    if rows is None:
        raise UsageError(
            "An approximation is fitted and measured on cached activations, but the cache of this SAE is missing. "
            "Give one with --cache."
        )
    nearest, record = approximate_sae(sae, approximate, rows.x_RD)
    if (fitting := nearest.convert_to(fmt.activations)) is None:
        raise UsageError(f"{fmt.name} cannot store a {approximate} SAE either, only {' and '.join(fmt.activations)}.")
    notes.append(describe_approximation(record))
    return fitting.with_unit_rows(), record


def latent_scale(sae: SAE, canonical: CanonicalSAE, fmt: Format, notes: list[str]) -> Tensor:
    """(d_sae): exported value / original value of each latent, which is not 1 if its decoder row was normalized."""
    if fmt.name == "saelens" and canonical.activation == "topk" and not canonical.has_unit_rows:
        notes.append(
            "The decoder rows do not have unit norm and were not normalized, because rescaling would change which "
            "latents are the k largest. SAELens' fold_W_dec_norm() will reject this SAE."
        )
    if canonical.layer_norm:
        notes.append(
            f"Latents in {fmt.name} are in units of the layer-normalized token. In this package they are in units of "
            "raw activations, and so larger by the token's standard deviation."
        )
    norm_F = sae.W_dec.detach().double().cpu().norm(dim=1)
    scale_F = torch.where(norm_F > 0, norm_F / canonical.W_dec.norm(dim=1), 1)
    if (scale_F - 1).abs().max() > UNIT_NORM_TOLERANCE:
        notes.append(
            f"Decoder rows had norms from {float(norm_F.min()):.3g} to {float(norm_F.max()):.3g} and were normalized; "
            "latents are larger by the same factors."
        )
    return scale_F


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `target` if the block succeeds and removed if it fails.

    Raises UsageError if `target` exists and is not an empty folder, even if another process created it in the meantime.
    If two processes write to `target`, the first one wins, and its folder is complete.
    """
    if target.is_file():
        raise UsageError(f"{target} is a file; nothing was written. Give a new folder with --out.")
    if target.is_dir() and any(target.iterdir()):
        raise UsageError(f"{target} is not empty; nothing was written. Give a new folder with --out.")
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}-{next(NUMBERS)}")
    try:
        make_folder(temporary)
    except OSError as error:
        raise os_error(error, target) from error
    try:
        yield temporary
        os.replace(temporary, target)  # replaces `target` even if it exists as an empty folder
        fsync_folder(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UsageError(
                f"{target} was meanwhile written by another process. It was not changed. Give a new folder with --out."
            ) from error
        raise os_error(error, target) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
