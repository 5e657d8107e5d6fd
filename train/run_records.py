"""The records in a run folder: run.json, which determines the result of a run, and sae.json."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from ..cache.hooks import Hook
from ..common.errors import DamagedError, UsageError
from ..common.evaluation_schemas import RESULT_RECORD, ResultFile
from ..common.files import digest_of
from ..common.schemas import RUN_RECORD, SAE_RECORD, RunRecord, SavedSAE

FORMAT, FORMAT_LAYER_NORM = 1, 2  # formats of sae.json; versions that know only the first one do not apply a layer norm
# The entries of run.json that determine the result of a run. An automatic folder name ends in the digest of
# these entries.
IDENTITY = (
    "variant", "options", "layer", "site", "seed", "order_seed", "d_in", "d_sae", "steps", "batch_size", "l0",
    "literal", "cache", "compiled", "accumulate", "precision",
)  # fmt: skip
OPTIONAL = ("l0", "literal", "compiled", "accumulate", "precision")  # recorded only where they differ from the default
AUTOMATIC_NAME = re.compile(r".*-s\d+-([0-9a-f]{6})")


def read_sae_record(folder: Path) -> SavedSAE:
    """Read sae.json. Checks that values recorded twice in sae.json, or in both sae.json and run.json, are equal.

    Raises:
        UsageError: the folder contains no trained SAE, or an SAE that needs a newer version.
        DamagedError: a record was damaged or edited, or the records contradict each other.
    """
    path = folder / "sae.json"
    if not path.exists():
        begun = (folder / "run.json").exists()
        advice = f"Finish this run with `sae train --resume {folder}`." if begun else "Train one with `sae train`."
        raise UsageError(f"{folder} contains no trained SAE (no sae.json). {advice}")
    record = SAE_RECORD.read(path)
    if record["format"] not in (FORMAT, FORMAT_LAYER_NORM):
        raise UsageError(
            f"{path} has format {record['format']}, but this version reads {FORMAT} and {FORMAT_LAYER_NORM}. Upgrade."
        )
    if record.get("layer_norm", False) != (record["format"] == FORMAT_LAYER_NORM):
        raise DamagedError(
            f"{path} contradicts itself: SAEs with a layer norm have format {FORMAT_LAYER_NORM}, all others {FORMAT}. "
            f"{SAE_RECORD.remedy}"
        )
    origin: dict[str, Any] = {**record.get("origin", {})}
    if "layer" in origin and origin.get("hook_name", name := Hook.from_record(origin).name) != name:
        raise DamagedError(
            f"{path} contradicts itself: hook_name is {origin['hook_name']}, but layer and site give {name}. "
            f"{SAE_RECORD.remedy}"
        )
    run = read_run_record(folder)
    if run is not None:
        stated = {**run, "training_tokens": run.get("steps", 0) * run.get("batch_size", 0)}
        repeated = {"d_in": record["d_in"], "d_sae": record["d_sae"]}
        repeated |= {
            key: origin[key] for key in ("layer", "site", "variant", "seed", "training_tokens") if key in origin
        }
        for key, value in repeated.items():
            if key in stated and stated[key] != value:
                raise DamagedError(
                    f"{folder}: {key} is {value} in sae.json and {stated[key]} in run.json. One of them was damaged "
                    "or edited, or belongs to another run. If it is run.json, restore run.json from a copy. If it is "
                    f"sae.json: {SAE_RECORD.remedy}"
                )
        if record.get("run", digest := run_digest(stated)) != digest:
            raise DamagedError(
                f"{path} and the run.json beside it belong to different runs: their options differ. If run.json is the "
                f"right one: {SAE_RECORD.remedy} If not: restore run.json from a copy."
            )
    return record


def run_digest(record: Mapping[str, Any]) -> str:
    """The digest of everything in a run.json that determines the result."""
    return digest_of({key: record[key] for key in IDENTITY if key in record})


def read_run_record(folder: Path) -> RunRecord | None:
    """Read run.json, or return None if there is none.

    If the folder has an automatic name, checks the digest in the name. Raises DamagedError if the record was damaged or
    edited, or belongs to another run.
    """
    path = folder / "run.json"
    if not path.exists():
        return None
    record = RUN_RECORD.read(path)
    content = cast("dict[str, Any]", record)
    if "imported_from" in content:
        return record
    for key in (*IDENTITY, "cache_folders", "resolved"):
        if key not in content and key not in OPTIONAL:
            raise DamagedError(f"{path} has no {key!r}: it was damaged or edited. {RUN_RECORD.remedy}")
    automatic = AUTOMATIC_NAME.fullmatch(folder.resolve().name)
    if automatic and automatic[1] != (digest := run_digest(content)[:6]):
        raise DamagedError(
            f"{path} does not belong to this folder: the folder's name ends with {automatic[1]}, but the digest of the "
            f"options in run.json is {digest}. If you renamed the folder, choose a name that does not end in "
            f"six hexadecimal digits. If not: {RUN_RECORD.remedy}"
        )
    return record


def require_result_of(sae: Mapping[str, Any], result: ResultFile, path: Path) -> None:
    """Raise DamagedError if a result was not measured on the SAE and at the hook that this sae.json describes."""
    measured = described_sae(result["sae_cfg_dict"])
    for key, value in described_sae(sae).items():
        if key in measured and measured[key] != value:
            raise DamagedError(
                f"{path} is a result of another SAE: its {key} is {short_text(measured[key])}, but sae.json has "
                f"{short_text(value)}. {RESULT_RECORD.remedy}"
            )


def described_sae(record: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of sae.json, or of a reference's description, that identify the SAE and the activations it reads."""
    origin = record.get("origin")
    where = origin if isinstance(origin, dict) else record
    return {
        **{
            key: record[key]
            for key in ("reference", "sha256", "d_in", "d_sae", "pre_bias", "layer_norm", "activation")
            if key in record
        },
        **{key: where[key] for key in ("layer", "site") if key in where},
    }


def short_text(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
