"""Damage to the files of a complete cache."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from faults.command import DAMAGED, HARVEST, OK, TRAIN, USAGE, sae
from faults.inputs import copy_folder, delete, flip, same_bytes, truncate
from faults.table import Matrix


def change(field: str) -> Callable[[Path], None]:
    """Change the first number in a field of a record, but leave the record's digest unchanged."""

    def hurt(path: Path) -> None:
        pattern = re.compile(rf'("{field}": \[?\s*)(\d)')
        path.write_text(pattern.sub(lambda found: f"{found[1]}{(int(found[2]) + 1) % 10}", path.read_text(), count=1))

    return hurt


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
        ("a statistic in manifest.json changed", "manifest.json", change("mean_square_norm"), "whole"),
        ("the rows in zarr.json changed", "zarr.json", change("rows"), "whole"),
        ("the seed in zarr.json's identity changed", "zarr.json", change("seed"), "whole"),
        ("the shape of a layer changed", "layer_00/zarr.json", change("shape"), "whole"),
        ("the window of a commit changed", "commits/000003.layer_00.json", change("window"), "whole"),
        ("the contexts in tokens/commit.json changed", "tokens/commit.json", change("contexts"), "whole"),
        ("the window in harvest.json changed", "harvest.json", change("window"), "whole"),
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


SHORT = [*TRAIN, "--steps", 5, "--device", "cpu"]


def side_arrays(m: Matrix) -> None:
    """Intact files that belong to another window or another cache."""
    m.head("Files of another window or another cache")
    outcome = sae(*HARVEST, "--seed", 1, "--out", "reseeded")
    assert outcome.code == OK, outcome
    outcome = sae(*SHORT, "--cache", "whole", "--out", "side-runs")
    assert outcome.code == OK, outcome
    (run,) = Path("side-runs").iterdir()
    evaluate = ["evaluate", run, "--suite", "core", "--tokens", 500, "--device", "cpu", "--cache"]

    def window(array: str) -> Callable[[Path], None]:
        return lambda folder: shutil.copyfile(folder / array.format(2), folder / array.format(3)) and None

    def other(file: str) -> Callable[[Path], None]:
        return lambda folder: shutil.copyfile(Path("reseeded") / file, folder / file) and None

    def tokens(folder: Path) -> None:
        shutil.copytree("reseeded/tokens", folder / "tokens", dirs_exist_ok=True)

    cases: list[tuple[str, Callable[[Path], None], list[object]]] = [
        ("moments of another window: `sae train`", window("layer_00.moments/c.{}.0.0"), [*SHORT, "--cache"]),
        ("norms of another window: `sae train`", window("layer_00.row_norm/c.{}"), [*SHORT, "--cache"]),
        ("activations of another window: `sae train --steps 100`", window("layer_00/c.{}.0"),
         [*TRAIN, "--steps", 100, "--device", "cpu", "--cache"]),
        ("tokens of another cache: `sae evaluate`", other("tokens/ids/c.0.0"), evaluate),
        ("held-out marks of another cache: `sae evaluate`", other("tokens/held_out/c.0"), evaluate),
        ("lengths of another cache: `sae evaluate`", other("tokens/length/c.0"), evaluate),
        ("all of tokens/ of another cache: `sae evaluate`", tokens, evaluate),
        ("all of tokens/ of another cache: `sae harvest`", tokens, [*HARVEST, "--out"]),
    ]  # fmt: skip
    for number, (name, hurt, words) in enumerate(cases):
        folder = copy_folder(f"side{number}")
        hurt(folder)
        more = ["--out", f"side-runs{number}"] if words[0] == "train" else []
        found = sae(*words, folder, *more)
        repaired = sae("cache", "repair", folder)
        named = str(folder) in found.err and "sae cache repair" in found.err
        mended = same_bytes(folder)
        m.row(name, found, DAMAGED, f"repair {repaired.code}, the same bytes", named, repaired.code == OK, mended)
