"""A record of the environment: package versions, the machine, and the revision of this package's source.

Only the environment variables listed here are recorded, so no access token can end up in a record. The source revision
comes from the package's own folder, never from the working directory, which may be the user's own repository.
"""

import base64
import hashlib
import os
import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from .files import free_space, sae_home
from .formatting import format_bytes
from .packages import PACKAGE, installed_version, outdated_packages

ROOT = Path(__file__).parents[1]
FOLDERS = ("cache", "cli", "common", "evaluate", "harvest", "train", "workflows")
# Packages whose version can affect computed numbers or bytes on disk.
PACKAGES = (
    PACKAGE, "torch", "transformers", "tokenizers", "datasets", "numpy", "safetensors", "zarr", "numcodecs",
    "scikit-learn", "accelerate", "triton",
)  # fmt: skip
VARIABLES = (
    "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG",
    "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "WORLD_SIZE",
)  # fmt: skip


def environment_record() -> dict[str, Any]:
    """Versions, source revision, machine and settings, ready for JSON."""
    import torch

    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return {
        "versions": {name: version for name in PACKAGES if (version := installed_version(name))},
        "source": source_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def describe_environment() -> list[str]:
    """The environment as lines for a bug report: versions, machine, folders, and whether there is a Hub token."""
    from huggingface_hub import constants, get_token

    from .device import resolve_device  # imports torch

    record = environment_record()
    versions, source, home = record["versions"], record["source"], sae_home()
    changed = {True: ", changed since", False: "", None: ", unknown whether changed since"}[source["changed"]]
    home_note = "" if "SAE_HOME" in os.environ else " (SAE_HOME is not set)"
    precision = record["matmul_precision"]
    lines = {
        "sae": f"{versions.get(PACKAGE, 'not installed')}, source {source['sha256'][:12]}, "
        f"commit {source['commit'] or 'unknown'}{changed}",
        "packages": ", ".join(f"{name} {version}" for name, version in versions.items() if name != PACKAGE),
        "python": f"{record['python']} in {sys.prefix}",
        "system": f"{record['platform']}, {record['cores']} cores of {record['cpu']}",
        "gpu": f"{', '.join(record['gpus'])} with CUDA {record['cuda']}" if record["gpus"] else "torch sees no GPU",
        "device": f"{resolve_device('auto')} by default, precision of float32 matrix products: {precision}",
        "folders": f"{home.resolve()}{home_note}, {format_bytes(free_space(home.resolve()))} free",
        "variables": ", ".join(f"{name}={value}" for name, value in record["variables"].items())
        or "none that affect results",
        "hub": f"{'logged in' if get_token() else 'not logged in'}, files in {constants.HF_HUB_CACHE}",
    }
    outdated = [f"{'outdated':9s} {sentence}" for sentence in outdated_packages()]
    return [f"{name:9s} {text}" for name, text in lines.items()] + outdated


@cache
def source_revision() -> dict[str, Any]:
    """The running source: `sha256` of its files, the git `commit` (None outside a checkout), and whether it `changed`.

    `changed` compares a checkout with its commit and an installed package with the checksums of its wheel; None if
    neither is possible.
    """
    # Other folders are left out, since tests, benchmarks or a virtual environment may lie beside the package's own.
    files = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes())
    record: dict[str, Any] = {"sha256": digest.hexdigest(), "commit": None, "changed": None}
    if (ROOT / ".git").exists():
        record["commit"] = run_git("rev-parse", "HEAD")
        changes = run_git(
            "status", "--porcelain", "--", ":(glob)*.py", *(f":(glob){folder}/**/*.py" for folder in FOLDERS)
        )
        record["changed"] = None if changes is None else bool(changes)
    else:
        record["changed"] = differs_from_wheel(files)
    return record


def run_git(*arguments: str) -> str | None:
    """The output of git in the package's folder; None if git is missing or fails."""
    try:
        result = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def differs_from_wheel(files: list[Path]) -> bool | None:
    """Whether any file differs from the installed wheel; None if the package was not installed from a wheel."""
    try:
        recorded = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    checksums = {Path(str(f.locate())).resolve(): f.hash.value for f in recorded if f.hash and f.suffix == ".py"}
    if ROOT / "__init__.py" not in checksums:
        return None

    def checksum(path: Path) -> str:
        return base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).decode().rstrip("=")

    return any(checksums.get(path.resolve()) != checksum(path) for path in files)


def cpu_model() -> str:
    """The CPU's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
