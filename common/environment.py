"""What something was made with: versions, machine, and the revision of this package's own source.

Of the environment only what is listed here is recorded, so that no token can be. The revision is that of the folder this
file lies in, never of the working directory, which is the user's.
"""

import base64
import hashlib
import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = "sae-pipeline"
ROOT = Path(__file__).parents[1]
FOLDERS = ("cache", "cli", "common", "evaluate", "harvest", "train", "workflows")
# Packages whose version can change a number or a byte.
PACKAGES = (
    PACKAGE, "torch", "transformers", "tokenizers", "datasets", "numpy", "safetensors", "zarr", "numcodecs", "scikit-learn", "accelerate",
)  # fmt: skip
VARIABLES = (
    "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF",
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "WORLD_SIZE",
)  # fmt: skip


def environment_record() -> dict[str, Any]:
    """Versions, machine, source and settings, as JSON can hold them."""
    import torch

    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return {
        "versions": {name: version for name in PACKAGES if (version := installed_version(name))},
        "source": source_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
        "matmul_precision": torch.get_float32_matmul_precision(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def installed_version(name: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@cache
def source_revision() -> dict[str, Any]:
    """Which source runs: `sha256` of its files; the `commit` of its checkout, if it is one; whether it was `changed`.

    Of an installed package `changed` compares with the checksums that were installed; None where nothing can tell.
    """
    # Not an environment, a test or a benchmark that lies in the same folder.
    files = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes())
    record: dict[str, Any] = {"sha256": digest.hexdigest(), "commit": None, "changed": None}
    if (ROOT / ".git").exists():
        record["commit"] = git("rev-parse", "HEAD")
        changes = git("status", "--porcelain", "--", ":(glob)*.py", *(f":(glob){folder}/**/*.py" for folder in FOLDERS))
        record["changed"] = None if changes is None else bool(changes)
    else:
        record["changed"] = differs_from_installed(files)
    return record


def git(*words: str) -> str | None:
    """What git says about the source; None where there is no git, or it refuses."""
    try:
        done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def differs_from_installed(files: list[Path]) -> bool | None:
    """Whether a file is another than was installed; None where the package was not installed from a wheel."""
    try:
        recorded = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    known = {Path(str(f.locate())).resolve(): f.hash.value for f in recorded if f.hash and f.suffix == ".py"}
    if ROOT / "__init__.py" not in known:
        return None

    def found(path: Path) -> str:
        return base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).decode().rstrip("=")

    return any(known.get(path.resolve()) != found(path) for path in files)


def cpu_name() -> str:
    """The name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
