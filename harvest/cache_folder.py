"""Choose the folder of a harvest: the one where it was begun before, or a new one."""

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
    """The folder under activations/ where this harvest was begun before, or a new one.

    The model or the text may have had another name when the harvest began.
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
    """Whether an earlier version began a harvest with this identity. Such a harvest is continued in the same way.

    A folder whose name contains the identity's digest is such a harvest; any other folder must record its fingerprint.
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
                    f"{other.folder} was harvested from this model by an earlier version, which did not count all of "
                    "its files. It can be trained on and evaluated; a new cache is begun, since weights may have "
                    "changed."
                )
                continue
            flags = f" --revision {revision}" if source.on_hub else ""
            if "split" in identity["data"]:  # a dataset of the Hub
                flags += f" --dataset-revision {other.identity['data']['revision']}"
            instead = f" To continue that one instead, add{flags}" if flags else ""
            say(f"{other.folder} is the same harvest at another revision.{instead}")
