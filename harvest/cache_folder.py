"""Choose the folder of a harvest: the folder in which it was begun earlier, or a new one."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..cache.catalog import open_caches
from ..cache.layout import fingerprint_of
from ..cache.models import name_without_digest
from ..cache.writer import read_fingerprint
from ..common.errors import SaeError
from ..common.files import sae_home
from .documents import TextSource
from .model import ModelSource


def default_folder(identity: dict[str, Any], text: TextSource, suffix: str = "") -> Path:
    """The folder in activations/ in which this harvest was begun earlier, or a new one.

    The search is by digest, because the model or the text may have had another name when the harvest began.
    """
    digest, root = fingerprint_of(identity), sae_home() / "activations"
    folder = root / f"{name_without_digest(identity['model']).split('/')[-1]}--{text.name}--{digest[:8]}{suffix}"
    if not folder.exists():
        for other in sorted(root.glob(f"*--{digest[:8]}{suffix}")):
            with contextlib.suppress(SaeError):
                if read_fingerprint(other) in (None, digest):
                    return other
    return folder


def is_begun(folder: Path, identity: dict[str, Any], *, has_own_name: bool) -> bool:
    """Whether a harvest has been begun in the folder. `identity` has the form that an earlier version recorded.

    With `has_own_name`, the folder's name contains the identity's digest, so it is enough that the folder exists.
    Otherwise the fingerprint recorded in the folder must be that of the identity.
    """
    if has_own_name or not folder.is_dir():
        return folder.is_dir()
    try:
        return read_fingerprint(folder) == fingerprint_of(identity)
    except SaeError:
        return False


def mention_other_revisions(
    folder: Path, identity: dict[str, Any], source: ModelSource, say: Callable[[str], None]
) -> None:
    """Point out a cache that differs only in the revision of the model or the dataset."""

    def unpinned(one: dict[str, Any]) -> dict[str, Any]:
        return one | {"model": name_without_digest(one["model"]), "data": one["data"]["name"]}

    for other in open_caches(folder.parent):
        if unpinned(other.identity) == unpinned(identity):
            revision = other.identity["model"]["revision"]
            if revision in source.older_digests:
                say(
                    f"{other.folder} was harvested from this model by an earlier version, whose digest did not include "
                    "all files of the model. That cache can still be used for training and evaluation. A new cache is "
                    "begun, since the weights may have changed."
                )
                continue
            flags = f" --revision {revision}" if source.on_hub else ""
            if "split" in identity["data"]:  # a dataset of the Hub
                flags += f" --dataset-revision {other.identity['data']['revision']}"
            instead = f" To continue that one instead, add{flags}" if flags else ""
            say(f"{other.folder} is the same harvest at another revision.{instead}")
