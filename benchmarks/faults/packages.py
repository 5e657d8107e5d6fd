"""Packages that are missing, cannot be imported, or are older than declared."""

import os
from pathlib import Path

from faults.command import HARVEST, OK, OUTSIDE, TRAIN, sae
from faults.table import Matrix


def shadowed(name: str, code: str, version: str = "") -> dict[str, str | None]:
    """The environment of a process in which `import name` runs this code instead of the installed module."""
    folder = Path("shadows", f"{name}-{version or 'none'}").absolute()
    folder.mkdir(parents=True)
    (folder / f"{name}.py").write_text(code)
    if version:
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


def packages(m: Matrix) -> None:
    m.head("Packages")
    unimportable = "raise ImportError(\"cannot import name 'HybridCache' from 'transformers'\")\n"
    adapter = [*HARVEST, "--adapter", "./lora", "--out", "with-adapter"]
    training = [*TRAIN, "--cache", "whole", "--steps", 2, "--out", "logged"]
    for what, words, name in (
        ("`--adapter`", adapter, "peft"),
        ("`--log wandb`", [*training, "--log", "wandb"], "wandb"),
        ("`--log trackio`", [*training, "--log", "trackio"], "trackio"),
        ("`compare --plots`", ["compare", "logged", "--plots", "plots"], "matplotlib"),
    ):
        out = sae(*words, new_process=True, env=shadowed(name, unimportable, "0.0.1"))
        begun = [Path(folder).exists() for folder in ("with-adapter", "logged", "plots")]
        named = f"needs {name}, but {name} 0.0.1 cannot be imported" in out.err
        m.row(
            f"{what}: the installed {name} is too old to import",
            out,
            OUTSIDE,
            "nothing is begun",
            named,
            not any(begun),
        )
    old = shadowed("transformers", "", "4.0.0")
    out = sae("cache", "info", "whole", new_process=True, env=old)
    m.row("an installed transformers is older than declared: `cache info`, which does not use it", out, OK,
          "a note before all else", out.err.startswith("note     transformers 4.0.0 is installed, and"))  # fmt: skip
    out = sae(*HARVEST, "--out", "by-old", new_process=True, env=old)
    m.row("... `harvest`, which needs what it lacks", out, OUTSIDE, "nothing is begun", not Path("by-old").exists())
