"""Datasets from the Hub, each pinned to one commit.

The first commit that is read is recorded in activations/evaluation/datasets/<name>.json and used from then on, so that
results stay comparable and earlier results are recognized without a network. Remove the file to use the latest commit.
"""

import contextlib
import functools
import re
from pathlib import Path
from typing import Any

from ...common.errors import DamagedError, UnavailableError
from ...common.evaluation_schemas import DATASET_RECORD
from ...common.files import sae_home

TIMEOUT_SECONDS = 20  # per request


def pinned_commit(name: str) -> str:
    """The commit at which a dataset is read. Raises the HTTP client's error if the Hub does not report a commit."""
    record = sae_home() / "activations" / "evaluation" / "datasets" / f"{name.replace('/', '--')}.json"
    if record.exists():
        pinned = DATASET_RECORD.read(record)
        if pinned["dataset"] != name:
            raise DamagedError(f"{record} is about {pinned['dataset']}, not {name}. {DATASET_RECORD.remedy}")
        return pinned["commit"]
    commit = latest_commit(name)
    with contextlib.suppress(UnavailableError):  # if SAE_HOME is read-only, the Hub is queried every time
        DATASET_RECORD.write(record, {"dataset": name, "commit": commit})
    return commit


def latest_commit(name: str) -> str:
    """The latest commit on the Hub; offline, the commit of the copy that `datasets` would read."""
    import huggingface_hub

    if (error := connection_error()) is not None:
        if (cached := cached_commit(name)) is None:
            raise error
        return cached
    api = huggingface_hub.HfApi()
    info = api.dataset_info(name, timeout=TIMEOUT_SECONDS)
    if info.gated:
        api.auth_check(name, repo_type="dataset")
    return str(info.sha)


@functools.cache
def connection_error() -> Exception | None:
    """Why the Hub cannot be reached; None if it can. The result is cached, because on a network that drops packets each
    attempt takes a full timeout."""
    import huggingface_hub

    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=TIMEOUT_SECONDS)
    except Exception as error:  # the error's type depends on the HTTP client, and offline mode also raises an error
        return error
    return None


def cached_commit(name: str) -> str | None:
    """The commit of the copy that `datasets` uses offline, which is the copy written last."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    *owner, short_name = name.split("/")
    folder = Path(config.HF_DATASETS_CACHE).expanduser() / "___".join([*owner, camelcase_to_snakecase(short_name)])
    copies = [path for path in folder.glob("*/*/*") if is_commit(path.name) and path.is_dir()]
    return max(copies, key=lambda path: path.stat().st_mtime).name if copies else None


def is_commit(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{40}", text) is not None


def check_commit(name: str, wanted: str, dataset: Any) -> None:
    """Raise UnavailableError if `datasets` was offline and used a copy from a different commit."""
    for file in getattr(dataset, "cache_files", [])[:1]:
        commit = Path(file["filename"]).parent.name
        if is_commit(commit) and commit != wanted:
            raise UnavailableError(
                f"The dataset {name} is pinned to commit {wanted[:12]}, but the copy on this machine is of "
                f"commit {commit[:12]}. Connect to the Hub. Or, to use the copy on this machine, remove "
                f"activations/evaluation/datasets/{name.replace('/', '--')}.json, which records the pinned commit."
            )
