"""Datasets of the Hub, each at one commit.

A home goes on reading the commit that it read first, so that its numbers compare, and a result that is kept is known as
such without the network. It stands in activations/evaluation/datasets/<name>.json; who removes that takes the newest.
"""

import contextlib
import functools
import re
from pathlib import Path
from typing import Any

from ...common.errors import UnavailableError
from ...common.files import read_json, sae_home, write_json

TIMEOUT_SECONDS = 20  # for one answer


def pinned_commit(name: str) -> str:
    """The commit of a dataset. Raises whatever says that the Hub cannot be reached, or does not give it."""
    record = sae_home() / "activations" / "evaluation" / "datasets" / f"{name.replace('/', '--')}.json"
    if record.exists():
        return read_json(record, "commit")["commit"]
    found = latest_commit(name)
    with contextlib.suppress(UnavailableError):  # where nothing can be written, it is asked for again
        write_json(record, {"dataset": name, "commit": found})
    return found


def latest_commit(name: str) -> str:
    """The Hub's; without the Hub, that of the copy which `datasets` would read."""
    import huggingface_hub

    if (error := connection_error()) is not None:
        if (copy := cached_commit(name)) is None:
            raise error
        return copy
    api = huggingface_hub.HfApi()
    info = api.dataset_info(name, timeout=TIMEOUT_SECONDS)
    if info.gated:
        api.auth_check(name, repo_type="dataset")
    return str(info.sha)


@functools.cache
def connection_error() -> Exception | None:
    """Why the Hub cannot be reached; found once, since a network that swallows everything answers nobody for long."""
    import huggingface_hub

    try:
        huggingface_hub.utils.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=TIMEOUT_SECONDS)
    except Exception as error:  # of whatever HTTP client it has; or that it was told to be offline
        return error
    return None


def cached_commit(name: str) -> str | None:
    """The commit of the copy that `datasets` takes when it is offline: the one written last."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    *owner, own = name.split("/")
    folder = Path(config.HF_DATASETS_CACHE).expanduser() / "___".join([*owner, camelcase_to_snakecase(own)])
    copies = [path for path in folder.glob("*/*/*") if is_commit(path.name) and path.is_dir()]
    return max(copies, key=lambda path: path.stat().st_mtime).name if copies else None


def is_commit(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{40}", text) is not None


def check_commit(name: str, wanted: str, dataset: Any) -> None:
    """OutsideError when `datasets`, offline, took another copy than that of the commit."""
    for file in getattr(dataset, "cache_files", [])[:1]:
        found = Path(file["filename"]).parent.name
        if is_commit(found) and found != wanted:
            raise UnavailableError(
                f"Of the dataset {name} this home reads commit {wanted[:12]}, and the copy on this machine is {found[:12]}. "
                f"Reach the Hub, or remove activations/evaluation/datasets/{name.replace('/', '--')}.json to take the copy."
            )
