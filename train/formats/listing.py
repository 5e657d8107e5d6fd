"""List the SAEs in a release (`sae import --list`), which is a repository on the Hub or a local folder.

One request returns the names and sizes of all files. The paths contain most of the other information. If some
information is not in a path, it is read from the SAE's config, which is a small file. At most MAX_CONFIGS configs are
read. Weights are never downloaded.
"""

import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ...common.errors import SaeError, UsageError
from ...common.files import parse_json, read_file
from ...common.formatting import format_bytes
from .base import parse_width
from .hub import REPO_ID, HubAddress, list_repository, translate_hub_errors
from .release import PublishedSAE, find_published, list_local_files, natural_key
from .safe_read import MAX_HEADER_BYTES, ForeignFolder

MAX_CONFIGS = 40  # maximum number of configs read for one list
MAX_ROWS = 40  # maximum number of rows in a table; more SAEs are shown in groups

Progress = Callable[[int, int], None]  # (configs read, configs in all)
Row = tuple[str, ...]


@dataclass(frozen=True)
class ReleaseList:
    """The SAEs of a release that match the filters.

    `refused` maps each kind of refusal to the number of entries that have the file layout of an SAE but cannot be
    imported.
    """

    name: str  # as given: an address on the Hub or a local folder
    repository: str | None  # on the Hub; None for a local folder
    commit: str | None
    saes: list[PublishedSAE]
    refused: dict[str, int]

    def address(self, sae: PublishedSAE) -> str:
        """The address of an SAE for `sae import` and `sae evaluate`."""
        if self.repository is None:
            return str(Path(self.name) / sae.path)
        return f"hf://{self.repository}/{sae.path}".rstrip("/")

    def table(self) -> tuple[list[str], list[Row]]:
        """Column headings, and a row for each SAE, or for each group of SAEs if there are more than MAX_ROWS."""
        if len(self.saes) <= MAX_ROWS:
            heads = ["path", "format", "layer", "site", "latents", "L0", "size"]
            return heads, [describe_group(sae.path or ".", [sae], with_count=False) for sae in self.saes]
        groups: dict[tuple[str, str], list[PublishedSAE]] = defaultdict(list)
        for sae in self.saes:
            groups[sae.format.name, group_pattern(sae.path)].append(sae)
        heads = ["paths", "SAEs", "format", "layers", "site", "latents", "L0", "size"]
        return heads, [describe_group(pattern, saes, with_count=True) for (_, pattern), saes in groups.items()]

    def records(self) -> list[dict[str, Any]]:
        """The SAEs as JSON objects."""
        return [
            {
                "path": sae.path,
                "address": self.address(sae),
                "format": sae.format.name,
                "model": sae.description.model,
                "layer": sae.description.hook.layer if sae.description.hook else None,
                "site": sae.description.hook.site if sae.description.hook else None,
                "d_sae": sae.description.d_sae,
                "l0": sae.description.l0,
                "bytes": sae.size,
                "files": [file.name for file in sae.files],
            }
            for sae in self.saes
        ]


def list_release(
    text: str,
    *,
    layer: int | None = None,
    site: str | None = None,
    width: str | None = None,
    progress: Progress = lambda done, total: None,
) -> ReleaseList:
    """List the SAEs of a release.

    Args:
        text: owner/repo, hf://owner/repo[@revision][/folder], or a local folder.
        layer, site, width: keep only the SAEs whose path or config has these values. `width` is a number, or
            a label such as 16k.

    Raises:
        UsageError: the release or a filter is invalid, or the release has no files in a known format.
        UnavailableError: the Hub cannot be reached or denies access.
    """
    if width is not None and not re.fullmatch(r"[1-9]\d{0,8}[kKmM]?", width):
        raise UsageError(f"Invalid --width {width}: expected a number of latents, such as 16384 or 16k.")
    if (root := Path(text)).is_dir():
        found = find_published(list_local_files(root), "/".join(root.resolve().parts[-2:]))
        release = ReleaseList(text, None, None, found, {})
        read = local_config_reader(root)
    else:
        address = parse_release(text)
        snapshot = list_repository(address)
        folder = PurePosixPath(address.folder)
        found = [
            s for s in find_published(snapshot.files, address.repo) if PurePosixPath(s.path).is_relative_to(folder)
        ]
        release = ReleaseList(text, address.repo, snapshot.commit, found, {})
        read = hub_config_reader(address.repo, snapshot.commit)
    refused = Counter(sae.refusal for sae in found if sae.refusal)
    saes = [sae for sae in found if not sae.refusal]
    if not found:
        raise UsageError(f"{text} contains no SAE of a known format.")
    saes = [sae for sae in saes if may_fit(sae, layer, site, width)]
    saes = [sae for sae in add_configs(saes, read, progress) if fits(sae, layer, site, width)]
    return replace(release, saes=saes, refused=dict(refused))


def parse_release(text: str) -> HubAddress:
    """The address of a release on the Hub. Raises UsageError if the text is not an address."""
    if not text.startswith("hf://") and not REPO_ID.fullmatch(text.split("@")[0]):
        raise UsageError(
            f"There is no folder {text}. Give a folder, owner/repo, or hf://owner/repo[@revision][/folder]."
        )
    return HubAddress.parse(text)


# --- configs ----------------------------------------------------------------------------------------------------------

ConfigReader = Callable[[PublishedSAE], dict[str, Any]]
"""The config of an SAE; raises SaeError if it cannot be read."""


def add_configs(saes: Sequence[PublishedSAE], read: ConfigReader, progress: Progress) -> list[PublishedSAE]:
    """Add the hook point and width from the configs of SAEs whose paths lack them. Reads at most MAX_CONFIGS."""
    silent = [sae for sae in saes if sae.config and (sae.description.hook is None or sae.description.d_sae is None)]
    silent = silent[:MAX_CONFIGS]
    described = {}
    for number, sae in enumerate(silent):
        progress(number, len(silent))
        with suppress(SaeError):  # a config that cannot be read is reported when the SAE is imported
            config = sae.format.describe_config(read(sae))
            described[sae.path] = replace(sae, description=sae.description.or_else(config))
    return [described.get(sae.path, sae) for sae in saes]


def local_config_reader(root: Path) -> ConfigReader:
    def read(sae: PublishedSAE) -> dict[str, Any]:
        assert sae.config is not None
        path = root / sae.config.name
        return ForeignFolder(path.parent).read_json(path.name)

    return read


def hub_config_reader(repo: str, commit: str) -> ConfigReader:
    def read(sae: PublishedSAE) -> dict[str, Any]:
        from huggingface_hub import hf_hub_download

        assert sae.config is not None
        if sae.config.size > MAX_HEADER_BYTES:
            return {}
        with tempfile.TemporaryDirectory() as temporary:
            with translate_hub_errors(repo):
                path = Path(hf_hub_download(repo, sae.config.name, revision=commit, local_dir=temporary))
            content = parse_json(read_file(path), path)
        return content if isinstance(content, dict) else {}

    return read


# --- filters and groups -----------------------------------------------------------------------------------------------


def may_fit(sae: PublishedSAE, layer: int | None, site: str | None, width: str | None) -> bool:
    """Whether an SAE can match the filters: True unless its description contradicts one of them."""
    hook, d_sae = sae.description.hook, sae.description.d_sae
    if hook is not None and (layer not in (None, hook.layer) or site not in (None, hook.site)):
        return False
    return width is None or d_sae is None or d_sae in widths(width)


def fits(sae: PublishedSAE, layer: int | None, site: str | None, width: str | None) -> bool:
    """Whether the description of an SAE matches all filters."""
    hook, d_sae = sae.description.hook, sae.description.d_sae
    if (hook is None and (layer is not None or site is not None)) or (d_sae is None and width is not None):
        return False
    return may_fit(sae, layer, site, width)


def widths(label: str) -> set[int]:
    """The numbers of latents that a width can mean: `16k` is 16,384 as well as 16,000."""
    if label.isdigit():
        return {int(label)}
    number, unit = int(label[:-1]), label[-1].lower()
    power = 1 if unit == "k" else 2
    return {parse_width(label.lower()), number * 1024**power, number * 1000**power}


def group_pattern(path: str) -> str:
    """A path with `*` for its layer, L0 and trainer number: `layer_*/width_16k/average_l0_*`."""
    path = re.sub(r"(?<![^\W_])(layers?|blocks)([._]?)\d+", r"\1\2*", path)
    return re.sub(r"(?<![^\W_])(l0|trainer)_\d+", r"\1_*", path)


def describe_group(path: str, saes: Sequence[PublishedSAE], *, with_count: bool) -> Row:
    hooks = [sae.description.hook for sae in saes]
    formats = unique(sae.format.name for sae in saes)
    return (
        path,
        *([f"{len(saes):,}"] if with_count else []),
        formats,
        span(hook.layer if hook else None for hook in hooks),
        unique(hook.site if hook else None for hook in hooks),
        span(sae.description.d_sae for sae in saes),
        span_of_labels(sae.description.l0 for sae in saes),
        format_bytes(sum(sae.size for sae in saes)),
    )


def unique(values: Iterable[str | None]) -> str:
    return ", ".join(dict.fromkeys(value or "-" for value in values))


def span(values: Iterable[int | None]) -> str:
    """Format values as `12`, as `0-25`, or as `5, 12, 19` if some in between are missing; `-` if no value is known."""
    known = sorted({value for value in values if value is not None})
    if not known:
        return "-"
    if len(known) > 2 and known[-1] - known[0] == len(known) - 1:
        return f"{known[0]:,}-{known[-1]:,}"
    if len(known) > 6:
        return f"{known[0]:,} ... {known[-1]:,}"
    return ", ".join(f"{value:,}" for value in known)


def span_of_labels(values: Iterable[str | None]) -> str:
    known = sorted({value for value in values if value is not None}, key=natural_key)
    if len(known) > 2 and all(label.isdigit() for label in known):
        return f"{known[0]}-{known[-1]}"
    return ", ".join(known) or "-"
