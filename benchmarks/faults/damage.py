"""Damage to the files of a complete cache."""

from collections.abc import Callable
from pathlib import Path

from faults.command import DAMAGED, HARVEST, OK, TRAIN, USAGE, sae
from faults.inputs import copy_folder, delete, flip, same_bytes, truncate
from faults.table import Matrix


def damage(m: Matrix) -> None:
    m.head("Damage to the files of a whole cache")
    cases: list[tuple[str, str, Callable[[Path], None], str]] = [
        ("chunk deleted", "layer_00/c.7.0", delete, "whole"),
        ("chunk truncated", "layer_00/c.7.0", truncate, "whole"),
        ("one bit of a chunk flipped", "layer_00/c.7.0", flip, "whole"),
        ("one bit of a compressed chunk flipped", "layer_00/c.7.0", flip, "packed"),
        ("compressed chunk truncated", "layer_00/c.7.0", truncate, "packed"),
        ("one bit of the norms flipped", "layer_00.row_norm/c.3", flip, "whole"),
        ("one bit of the moments flipped", "layer_00.moments/c.3.0.0", flip, "whole"),
        ("tokens truncated", "tokens/ids/c.0.0", truncate, "whole"),
        ("one bit of the tokens flipped", "tokens/ids/c.0.0", flip, "whole"),
        ("manifest.json truncated", "manifest.json", truncate, "whole"),
        ("manifest.json deleted", "manifest.json", delete, "whole"),
        ("a commit truncated", "commits/000003.layer_00.json", truncate, "whole"),
        ("a commit deleted", "commits/000003.layer_00.json", delete, "whole"),
        ("zarr.json truncated", "zarr.json", truncate, "whole"),
        ("zarr.json deleted", "zarr.json", delete, "whole"),
        ("zarr.json of a layer truncated", "layer_00/zarr.json", truncate, "whole"),
        ("tokens/commit.json truncated", "tokens/commit.json", truncate, "whole"),
        ("harvest.json truncated", "harvest.json", truncate, "whole"),
        ("harvest.json lost", "harvest.json", delete, "whole"),
    ]
    for number, (name, file, hurt, kind) in enumerate(cases):
        folder = copy_folder(f"hurt{number}", kind)
        hurt(folder / file)
        found = {
            "verify": sae("cache", "verify", folder),
            "info": sae("cache", "info", folder),
            "train": sae(*TRAIN, "--cache", folder, "--out", f"runs{number}"),
        }
        again = copy_folder(f"again{number}", str(folder))
        packed = ["--compress"] if kind == "packed" else []
        found["harvest"] = sae(*HARVEST, *packed, "--out", again)
        same_again = same_bytes(again, kind)
        repaired = sae("cache", "repair", folder)
        mended = same_bytes(folder, kind)
        codes = ", ".join(f"{command} {outcome.code}" for command, outcome in found.items())
        after = (
            f"{codes}{' (mended)' if same_again else ''}; repair {repaired.code}{', the same bytes' if mended else ''}"
        )
        seen = next((outcome for outcome in found.values() if outcome.code), found["verify"])
        bad = [t for t in found.values() if "Traceback" in t.err or t.code not in (OK, USAGE, DAMAGED)]
        recovers = mended or (same_again and repaired.code in (USAGE, DAMAGED))
        m.row(name, bad[0] if bad else seen, (DAMAGED, USAGE, OK), after, recovers, "Traceback" not in repaired.err)
