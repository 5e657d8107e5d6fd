"""Repair a cache: missing or damaged files are harvested again, window by window. No other file is written."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..cache.chunks import encode_chunk, read_attributes, write_chunk
from ..cache.hooks import Hook
from ..cache.layout import without_name
from ..cache.mirror import working_folder
from ..cache.models import find_folder, is_digest, recorded_folders
from ..cache.object_store import check_slashes, is_url, open_store
from ..cache.place import FolderPlace, chunk_error
from ..cache.record_files import add_digests, damaged_records
from ..cache.store_place import StorePlace
from ..cache.writer import CacheWriter, recorded_tokens
from ..common.cache_schemas import HARVEST_RECORD, MANIFEST_RECORD, TOKENS_RECORD
from ..common.errors import DamagedError, SaeError, UsageError, naming
from ..common.files import digest_of
from ..common.formatting import format_count
from ..common.locks import writer_lock
from ..common.special_tokens import BOS_OR_EOS
from . import mini
from .config import HarvestConfig
from .datasets import EMBEDDED_TEXT
from .files import ALL
from .plan import HarvestPlan, plan_harvest
from .progress import SILENT, HarvestProgress
from .stages import check_not_ring, load_model_for, start_cache, tokenize
from .windows import WindowComputer


def repair(
    folder: Path | str, progress: HarvestProgress = SILENT, *, model: str | None = None, dataset: str | None = None,
    device: str = "auto",
) -> list[str]:  # fmt: skip
    """Check every byte and harvest again every file that differs from its record. Returns a sentence for each repair.

    `folder` can be an address. `model` and `dataset` are the new locations of the model and the dataset, if they moved.

    Raises UsageError if the model or the text has changed, or if the harvest has not finished.
    """
    check_slashes(folder)
    if is_url(folder):
        store = open_store(folder)
        if not {"commits", "harvest.json"} & set(store.children()):
            raise UsageError(f"{store.url} holds no activation cache. Create one with `sae harvest --out {store.url}`.")
        place = StorePlace(store, working_folder(store.url))
        with naming(store.url, place.folder):
            repaired = repair_place(place, progress, model, dataset, device)
        return [sentence.replace(str(place.folder), store.url) for sentence in repaired]
    folder = Path(folder)
    if not (folder / "commits").is_dir():
        raise UsageError(f"{folder} is not a cache (it has no commits/). Give a folder under activations/.")
    return repair_place(FolderPlace(folder), progress, model, dataset, device)


def repair_place(
    place: FolderPlace, progress: HarvestProgress, model: str | None, dataset: str | None, device: str
) -> list[str]:
    """Repair the cache at `place` like `repair`. The folder of `place` contains the cache's records and tokens."""
    folder = place.folder
    check_not_ring(folder)
    with writer_lock(folder, "sae cache repair", progress.say):
        place.fetch_damaged()
        if not (folder / "harvest.json").exists():
            raise DamagedError(
                f"{folder / 'harvest.json'}, which records how the cache was harvested, is missing. "
                "Run the same `sae harvest` again to restore it."
            )
        check_complete(folder)
        repaired = list(remove_damaged_records(place))
        plan = plan_same_harvest(place, model=model, dataset=dataset, device=device)
        max_norms = recorded_max_norms(plan)
        repaired += list(repair_tokens(plan))
        writer, contexts = start_cache(plan)
        repaired += list(
            repair_windows(plan, writer, WindowComputer(plan, contexts, writer.layout, progress), progress)
        )
        for max_norm in {*max_norms.values()}:  # layers may have been harvested with different values
            widths = {name: width for name, width in plan.widths.items() if max_norms[name] == max_norm}
            part = CacheWriter(folder, plan.identity, writer.layout, widths, place)
            if repaired or not part.is_finished(max_norm):
                part.finish(max_norm, plan.token_text)
                repaired = repaired or [f"{folder}: manifest.json and zarr.json were missing or damaged; rewritten"]
        if count := add_digests(folder):
            progress.say(
                f"{format_count(count, 'record')} of an earlier version now contain a digest of their content."
            )
    return repaired


def check_complete(folder: Path) -> None:
    """Raise UsageError if the harvest has not finished. If zarr.json cannot be read, `repair` finishes the harvest."""
    with contextlib.suppress(DamagedError):
        if not read_attributes(folder)["complete"]:
            raise UsageError(f"{folder} is half written. Run the same `sae harvest` again to finish and repair it.")


def recorded_max_norms(plan: HarvestPlan) -> dict[str, float | None]:
    """Array name -> its --max-norm, from the manifest; for arrays not in the manifest, from the last harvest."""
    manifest = plan.folder / "manifest.json"
    known = MANIFEST_RECORD.read(manifest)["statistics"] if manifest.exists() else {}
    return {name: known[name]["max_norm"] if name in known else plan.config.max_norm for name in plan.widths}


def remove_damaged_records(place: FolderPlace) -> Iterator[str]:
    """Remove damaged records. All records except harvest.json can be rebuilt from the other files."""
    folder = place.folder
    for path, error in list(damaged_records(folder)):
        if path.name == "harvest.json":
            raise error
        place.remove_records([path.relative_to(folder).as_posix()])
        yield f"{path} was damaged; rewritten"
    if not (folder / "manifest.json").exists() and not list((folder / "commits").glob("*.json")):
        raise UsageError(f"{folder} holds no finished window. Run the same `sae harvest` again.")


def plan_same_harvest(place: FolderPlace, *, model: str | None, dataset: str | None, device: str) -> HarvestPlan:
    """The plan of the harvest that wrote a cache. Raises UsageError unless the plan would produce the same bytes."""
    folder = place.folder
    record: dict[str, Any] = dict(HARVEST_RECORD.read(folder / "harvest.json"))
    known = {field.name for field in fields(HarvestConfig)} - {"modules"}  # in the record: the names of the hooks
    options = {name: value for name, value in record.items() if name in known}
    arrays = {path.name.split(".", 1)[1].removesuffix(".json") for path in (folder / "commits").glob("*.json")}
    hooks = sorted(map(Hook.from_array, arrays))
    if model is None and (moved := recorded_model(folder)):
        options["model"] = moved
    elif model is None and Path(options["model"]).is_absolute() and not Path(options["model"]).is_dir():
        raise UsageError(
            f"{folder} was harvested from the model in {options['model']}, which no longer exists. Give the new "
            "location of the model with --model FOLDER."
        )
    options |= {"layers": [hook.layer for hook in hooks], "device": device, "out": folder}
    options.setdefault("bos", BOS_OR_EOS)  # older caches record no choice
    options |= {name: value for name, value in (("model", model), ("dataset", dataset)) if value is not None}
    plan = replace(plan_text_of(folder, options, hooks), store=place.store)
    if not (folder / "zarr.json").exists():
        return plan
    identity = read_attributes(folder)["identity"]
    if changed := changed_inputs(identity, plan):
        raise UsageError(
            f"{folder} was harvested with other inputs than now (changed: {', '.join(changed)}), so its bytes cannot "
            "be reproduced. Give the original inputs with --model or --dataset, or harvest into a new folder."
        )
    return replace(plan, identity=identity)


def plan_text_of(folder: Path, options: dict[str, Any], hooks: list[Hook]) -> HarvestPlan:
    """The plan with these options. Earlier versions read every file of a local text, regardless of its split."""

    def plan_with(options: dict[str, Any]) -> HarvestPlan:
        return replace(plan_harvest(HarvestConfig(**options)), hooks=hooks)

    dataset = options.get("dataset")
    is_here = (dataset or options["model"]) in (EMBEDDED_TEXT, mini.NAME) or (dataset and Path(dataset).exists())
    if not is_here:
        return plan_with(options)
    try:
        plan = plan_with(options)
    except UsageError:  # perhaps the split has no files
        return plan_with(options | {"split": ALL})
    if (folder / "zarr.json").exists():
        identity = read_attributes(folder)["identity"]
        if changed_inputs(identity, plan) == ["data"]:
            with contextlib.suppress(UsageError):
                whole = plan_with(options | {"split": ALL})
                return plan if changed_inputs(identity, whole) else whole
    return plan


def changed_inputs(identity: dict[str, Any], plan: HarvestPlan) -> list[str]:
    """The keys whose values in a cache's identity differ from those in a plan's identity, apart from names."""
    return [key for key in identity if without_name(identity[key]) != without_name(plan.identity.get(key))]


def recorded_model(folder: Path) -> str | None:
    """The current folder of the cache's model; None if the model is not from a folder, or the folder is not found."""
    with contextlib.suppress(SaeError):
        record = read_attributes(folder)["identity"]["model"]
        if is_digest(record["revision"]) and record["name"] != mini.NAME:
            return str(find_folder(record, recorded_folders(folder)))
    return None


def repair_tokens(plan: HarvestPlan) -> Iterator[str]:
    """Tokenize the text again if one of its files is damaged or belongs to another cache.

    The new tokens must match the record.
    """
    record = plan.folder / "tokens" / "commit.json"
    files: dict[str, Any] = dict(TOKENS_RECORD.read(record)["files"]) if record.exists() else {}
    digest = recorded_tokens(plan.folder) or (digest_of(files) if files else None)
    foreign = ["tokens/commit.json"] if files and digest_of(files) != digest else []
    damaged = foreign or [file for file in files if chunk_error(plan.folder, file, files[file])]
    if files and not damaged:
        return
    contexts = tokenize(plan)
    if digest not in (None, digest_of(contexts.file_records())):
        raise SaeError(
            f"Tokenizing the text of {plan.folder} gives different tokens than before, probably because the version of "
            "tokenizers has changed, so the damaged files cannot be reproduced. Harvest into a new folder with --out."
        )
    contexts.write(plan.folder)
    plan.place.publish_tokens()
    yield from (f"{file} was missing or damaged; tokenized again" for file in damaged or ["tokens"])


def repair_windows(
    plan: HarvestPlan, writer: CacheWriter, computer: WindowComputer, progress: HarvestProgress
) -> Iterator[str]:
    """Recompute the windows with damaged files, and rewrite those files. The windows' other files are not changed."""
    commits = {(c["window"], c["array"]): c for c in writer.commits(check_files=False)}
    records = {file: record for commit in commits.values() for file, record in commit["files"].items()}
    damaged = find_damaged(plan.place, records, progress)
    missing: dict[int, list[str]] = defaultdict(list)
    for window in range(writer.layout.n_windows):
        for array in plan.widths:
            commit = commits.get((window, array))
            if commit is None or damaged & commit["files"].keys():
                missing[window].append(array)
    if not missing:
        return
    computer.set_model(load_model_for(plan, missing, plan.device))
    for (window, batch_contexts), arrays in group_by_batch(missing, commits, plan.config.batch_contexts).items():
        computer.batch_contexts = batch_contexts
        rows = computer.compute(window, computer.memory(arrays))()
        files_of_array = dict(writer.chunks_to_write(window, rows))
        for array in arrays:
            files = {
                a.chunk_file(chunk): (a, chunk, block) for a, chunk, block in files_of_array[""] + files_of_array[array]
            }
            old = commits[window, array]["files"] if (window, array) in commits else {}
            if all(encode_chunk(a, block)[1] == old.get(file) for file, (a, _, block) in files.items()):
                for file in sorted(damaged & files.keys()):
                    write_chunk(plan.folder, *files[file])
                    plan.place.publish([file])
                    damaged.remove(file)  # row_ctx and row_pos belong to every array of a window, and are written once
                    yield f"{file} was missing or damaged; harvested again, with the same bytes"
            else:
                only = replace(rows, bits={array: rows.bits[array]})
                writer.write_window(window, only, computer.made_with(), replace=True)
                yield f"window {window} of {array} was harvested again as a whole" + (
                    ", with different bytes, because other versions or another device had computed it" if old else ""
                )


def find_damaged(place: FolderPlace, records: dict[str, Any], progress: HarvestProgress) -> set[str]:
    """The chunk files that are missing or differ from their records."""
    damaged = set()
    for number, (file, error) in enumerate(place.chunk_errors(records), 1):
        if error:
            progress.say(error.split(". ")[0] + ".")
            damaged.add(file)
        progress.rows(number, len(records))
    return damaged


def group_by_batch(
    missing: dict[int, list[str]], commits: dict[tuple[int, str], dict[str, Any]], default: int
) -> dict[tuple[int, int], list[str]]:
    """Group arrays by window and by the number of contexts per pass.

    The commits of the arrays record this number, which can affect the last bits of the activations.
    """
    groups: dict[tuple[int, int], list[str]] = defaultdict(list)
    for window, arrays in missing.items():
        for array in arrays:
            commit = commits.get((window, array))
            groups[window, commit["made_with"].get("batch_contexts", default) if commit else default].append(array)
    return groups
