"""An SAE of ours as the files of another library, checked before they are called by their name."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...common.errors import UsageError
from ...common.files import fsync_folder, make_folder, os_error
from ..sae import SAE, load_sae
from .approximate import approximate_sae, describe_approximation
from .base import Format, find_format
from .canonical import UNIT_NORM_TOLERANCE, CanonicalSAE, from_canonical, to_canonical
from .metadata import export_metadata, run_hook
from .safe_read import ForeignFolder
from .verify import Check, Progress, SampleRows, compare, no_progress, require_passed, sample_run_rows, synthetic_rows


@dataclass
class ExportResult:
    """What was written, and how it was checked."""

    folder: Path
    format: str
    check: Check
    about: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


def export_sae(
    sae: SAE | Path | str,
    to: str,
    out: Path | str | None = None,
    *,
    approximate: str | None = None,
    cache: Path | str | None = None,
    progress: Progress = no_progress,
) -> ExportResult:
    """Write an SAE, or that of a run folder, as `to`: saelens, gemma-scope, dictionary-learning or sparsify.

    It takes raw activations, its decoder has unit rows, and what training divided by is folded in, in float64. The files
    are computed with by themselves and compared with the SAE on 4,096 rows of its cache, or where there is none on
    synthetic ones. `out`: an empty folder or none; by default exports/<to> in the run folder.

    Raises UsageError for what the format cannot hold, SaeError when the check fails; then nothing is left behind.
    """
    kind = find_format(to)
    folder = None if isinstance(sae, SAE) else Path(sae)
    loaded = sae if isinstance(sae, SAE) else load_sae(sae)
    if out is None and folder is None:
        raise UsageError("Say where to export to: export_sae(sae, to, out=...).")
    target = Path(out) if out is not None else Path(folder or "") / "exports" / to
    hook = run_hook(loaded)
    given = Path(cache) if cache is not None else None
    source, rows = sample_run_rows(loaded.origin, hook, given)
    about, notes = export_metadata(loaded, folder, source), []
    plain, compared = fit_to_format(loaded, kind, approximate, rows, about, notes), loaded
    if "approximation" in about:
        compared = from_canonical(plain)
    if kind.name == "saelens" and plain.kind == "topk" and not plain.unit_rows:
        notes.append("The decoder has no unit rows, and scaling them would change which latents are the k largest.")
    n_F = compared.W_dec.detach().double().cpu().norm(dim=1)
    size_F = torch.where(n_F > 0, n_F / plain.W_dec.norm(dim=1), 1)
    if (size_F - 1).abs().max() > UNIT_NORM_TOLERANCE:
        notes.append(
            f"Decoder rows had norms from {float(n_F.min()):.3g} to {float(n_F.max()):.3g}; latents are now as much larger."
        )
    with new_folder(target) as temporary:
        kind.write(plain, temporary, about)
        check = compare(
            compared, plain, kind.reference(ForeignFolder(temporary)), rows or synthetic_rows(plain), size_F, progress
        )
        require_passed(check, f"The export to {to}")
    return ExportResult(target, to, check, about, notes)


def fit_to_format(
    sae: SAE, kind: Format, approximate: str | None, rows: SampleRows | None, about: dict[str, Any], notes: list[str]
) -> CanonicalSAE:
    """The SAE as a kind that the format holds. UsageError names those that hold it; `about` gets an approximation's record."""
    try:
        plain = to_canonical(sae)
    except UsageError:
        if approximate is None:
            raise
        plain = None
    if plain is not None:
        if exact := plain.within(kind.holds):
            if approximate is not None:
                notes.append(f"{kind.name} holds this {plain.kind} as it is; --approximate was not needed.")
            return exact.unit()
        able = [f.name for f in Format.registry.values() if plain.within(f.holds)]
        if approximate is None:
            raise UsageError(
                f"{kind.name} holds {' and '.join(kind.holds)}, and this SAE is a {plain.kind}: {', '.join(able)} can hold it. "
                f"--approximate {kind.holds[0]} writes the nearest that {kind.name} holds, and says how far it is."
            )
    assert approximate is not None
    if rows is None:
        raise UsageError(
            "An approximation is fitted to and measured on cached rows, and this SAE's cache is not there. Give one with --cache."
        )
    nearest, record = approximate_sae(sae, approximate, rows.x_RD)
    if (fitting := nearest.within(kind.holds)) is None:
        raise UsageError(f"{kind.name} holds no {approximate} either, but {' and '.join(kind.holds)}.")
    about["approximation"] = record
    notes.append(describe_approximation(record))
    return fitting.unit()


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A new folder that becomes `target` when all went well, and goes away when not. UsageError when `target` holds anything."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UsageError(f"{target} is not empty; nothing was written. Give a new folder with --out.")
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        make_folder(temporary)
    except OSError as error:
        raise os_error(error, target) from error
    try:
        yield temporary
        if target.is_dir():
            target.rmdir()
        os.replace(temporary, target)
        fsync_folder(target.parent)
    except OSError as error:
        raise os_error(error, target) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
