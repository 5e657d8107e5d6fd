"""`sae env`: what to paste into a bug report."""

import os
import sys
from pathlib import Path

import typer

from .console import cli_command


@cli_command
def env() -> None:
    """A report to paste into a bug report: versions, machine, folders. It never prints a token."""
    from ..common.device import best_device
    from ..common.environment import PACKAGE, environment_record
    from ..common.files import free_space, sae_home
    from ..common.formatting import format_bytes

    found = environment_record()
    versions, source = found["versions"], found["source"]
    changed = {True: ", changed since", False: "", None: ", unknown whether changed"}[source["changed"]]
    folder = sae_home()
    lines = {
        "sae": f"{versions.get(PACKAGE, 'not installed')}, source {source['sha256'][:12]}, commit {source['commit'] or 'none'}{changed}",
        "packages": ", ".join(f"{name} {version}" for name, version in versions.items() if name != PACKAGE),
        "python": f"{found['python']} of {sys.prefix}",
        "system": f"{found['platform']}, {found['cores']} cores of {found['cpu']}",
        "gpu": ", ".join(found["gpus"]) + f" with CUDA {found['cuda']}" if found["gpus"] else "none that torch sees",
        "device": f"{best_device('auto')} by default, float32 products at precision {found['matmul_precision']}",
        "folders": f"{folder.resolve()}{'' if 'SAE_HOME' in os.environ else ' (SAE_HOME is not set)'}, {format_bytes(free_space(folder.resolve()))} free",
        "variables": ", ".join(f"{name}={value}" for name, value in found["variables"].items()) or "none that count",
        "hub": f"{'logged in' if logged_in() else 'not logged in'}, files in {hub_folder()}",
    }
    for name, text in lines.items():
        typer.echo(f"{name:9s} {text}")


def logged_in() -> bool:
    """Whether there is a token for the Hub. What it is goes nowhere."""
    from huggingface_hub import get_token

    return get_token() is not None


def hub_folder() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)
