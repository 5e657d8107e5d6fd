"""Find installed packages, outdated packages, and optional packages.

The required packages and their lowest versions are declared in pyproject.toml only, and read from the metadata of the
installation.
"""

import importlib
import re
from importlib import metadata
from types import ModuleType

from .errors import UnavailableError

PACKAGE = "sae-pipeline"
EXTRAS = {
    "plots": "matplotlib", "adapters": "peft", "tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio",
    "judge": "httpx2",
    "probes": "numba",
    "remote": "obstore",
    "kernels": "triton",
}  # fmt: skip
"""Extra of pyproject.toml -> the package that it installs, which is imported only when it is used."""

BOUND = re.compile(r"(?P<name>[\w.-]+)>=(?P<lowest>[\d.]+)(?:; extra == ['\"](?P<extra>[\w-]+)['\"])?")


def installed_version(name: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def outdated_packages() -> list[str]:
    """One sentence for each dependency whose installed version is below the lowest that this package supports.

    When pip installs this package, it also upgrades outdated dependencies. But if another package is installed later,
    pip may replace a dependency by a version that is too old, and only prints a warning.
    """
    try:
        declared = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:  # run from a folder, without an installation
        return []
    sentences = []
    for bound in filter(None, map(BOUND.fullmatch, declared)):
        name, lowest, extra = bound["name"], bound["lowest"], bound["extra"]
        if extra == "test":
            continue
        version = installed_version(name)
        if version is not None and numbers(version) < numbers(lowest):
            sentences.append(
                f"{name} {version} is installed, but {PACKAGE} needs {lowest} or newer: pip install '{name}>={lowest}'."
            )
    return sentences


def numbers(version: str) -> tuple[int, ...]:
    """The release part of a version, as a tuple to compare: "2.13.0+cpu", "2.13" and "2.13.0rc1" become (2, 13)."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    parts = [int(part) for part in release[0].split(".")] if release else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def import_extra(extra: str, what: str, module: str | None = None) -> ModuleType:
    """Import and return the package that the optional extra `extra` installs. If `module` is given, return this module,
    which needs the package, instead. `what` is the option that needs the package; the error names it.

    Raises UnavailableError, which names the extra, if the package is not installed or cannot be imported.
    """
    package = EXTRAS[extra]
    try:
        found = importlib.import_module(package)
        return importlib.import_module(module) if module else found
    except ImportError as error:
        if (version := installed_version(package)) is None:
            raise UnavailableError(
                f"{what} needs {package}, which is not installed: pip install '{PACKAGE}[{extra}]'."
            ) from None
        raise UnavailableError(
            f"{what} needs {package}, but {package} {version} cannot be imported ({error}). "
            f"Install another version: pip install -U {package}."
        ) from None
