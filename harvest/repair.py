"""Mend a cache: what is missing or damaged is harvested again, window by window, and nothing else is written."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..cache.chunks import attributes_of, check_chunk, encode_chunk, read_array, write_chunk
from ..cache.layout import Hook, unnamed
from ..cache.writer import CacheWriter
from ..common.errors import DamagedError, SaeError, UsageError
from ..common.files import read_json, writer_lock
from .plan import HarvestConfig, HarvestPlan, plan_harvest
from .run import UNWATCHED, HarvestProgress, WindowComputer, cut_text, layout_of, load, refuse_ring, text_of
from .tokenize_checkpoint import discard


def repair(
    folder: Path,
    report: HarvestProgress = UNWATCHED,
    *,
    model: str | None = None,
    dataset: str | None = None,
    device: str = "auto",
) -> list[str]:
    """Check every byte and harvest again what is not as recorded. Returns a sentence for each file that was mended.

    `model` and `dataset` say where they are now. UsageError when the model or the text is not what it was, or when the
    cache is half written.
    """
    if not (folder / "commits").is_dir():
        raise UsageError(
            f"{folder} holds no harvest (no commits/). `sae cache repair` takes a folder under activations/."
        )
    if not (folder / "harvest.json").exists():
        raise DamagedError(
            f"{folder / 'harvest.json'} is missing, which says what was asked for. The same `sae harvest` writes it again."
        )
    refuse_ring(folder)
    with writer_lock(folder, "sae cache repair", report.say):
        refuse_half_written(folder)
        mended = list(drop_unreadable(folder))
        again = planned_again(folder, model=model, dataset=dataset, device=device)
        limits = max_norms(again)
        mended += list(mend_text(again))
        contexts = text_of(again)
        writer = CacheWriter(folder, again.identity, layout_of(again, contexts), again.widths)
        discard(folder)
        mended += list(mend_windows(again, writer, WindowComputer(again, contexts, writer.layout, report), report))
        for limit in {*limits.values()}:  # layers can have been marked differently
            arrays = {name: width for name, width in again.widths.items() if limits[name] == limit}
            part = CacheWriter(folder, again.identity, writer.layout, arrays)
            if mended or not part.finished(limit):
                part.finish(limit)
                mended = mended or [f"{folder} had lost its seal; manifest.json and zarr.json are made anew"]
    return mended


def refuse_half_written(folder: Path) -> None:
    """UsageError when a harvest has not come to its end; where that cannot be read, it is brought there."""
    with contextlib.suppress(DamagedError):
        if not attributes_of(folder)["complete"]:
            raise UsageError(f"{folder} is half written. Run the same `sae harvest` again: it finishes and mends it.")


def max_norms(again: HarvestPlan) -> dict[str, float | None]:
    """The --max-norm of each array: the manifest's where there is one, else that of the last harvest."""
    manifest = again.folder / "manifest.json"
    known = read_json(manifest, "statistics")["statistics"] if manifest.exists() else {}
    return {name: known[name]["max_norm"] if name in known else again.request.max_norm for name in again.widths}


def drop_unreadable(folder: Path) -> Iterator[str]:
    """Remove records that cannot be read: all but harvest.json follow from the rest."""
    records = [
        *folder.glob("*.json"),
        *(folder / "commits").glob("*.json"),
        *folder.glob("*/zarr.json"),
        *folder.glob("tokens/**/*.json"),
    ]
    for path in records:
        try:
            read_json(path)
        except DamagedError:
            if path.name == "harvest.json":
                raise
            path.unlink()
            yield f"{path} could not be read; it is made anew from the rest"
    if not (folder / "manifest.json").exists() and not list((folder / "commits").glob("*.json")):
        raise UsageError(f"{folder} is hardly begun. Run the same `sae harvest` again.")


def planned_again(folder: Path, *, model: str | None, dataset: str | None, device: str) -> HarvestPlan:
    """The plan that made a cache, made again; UsageError unless it would give the same bytes."""
    record = read_json(folder / "harvest.json")
    known = {field.name for field in fields(HarvestConfig)}
    given = {name: value for name, value in record.items() if name in known}
    arrays = {path.name.split(".", 1)[1].removesuffix(".json") for path in (folder / "commits").glob("*.json")}
    hooks = sorted(map(Hook.of, arrays))
    given |= {"layers": [hook.layer for hook in hooks], "device": device, "out": folder}
    given |= {name: value for name, value in (("model", model), ("dataset", dataset)) if value is not None}
    again = replace(plan_harvest(HarvestConfig(**given)), hooks=hooks)
    if not (folder / "zarr.json").exists():
        return again
    identity = attributes_of(folder)["identity"]
    changed = [key for key in identity if unnamed(identity[key]) != unnamed(again.identity.get(key))]
    if changed:
        raise UsageError(
            f"{folder} was harvested with another {', '.join(changed)} than is found now, so its bytes cannot be made again. "
            "Give --model or --dataset where they are now, or harvest anew."
        )
    return replace(again, identity=identity)


def mend_text(again: HarvestPlan) -> Iterator[str]:
    """Cut the text again when a file of it is damaged; it has to come out the same."""
    record = again.folder / "tokens" / "commit.json"
    files = read_json(record, "files")["files"] if record.exists() else {}
    damaged = [f for f in files if problem(again.folder, f, files[f])]
    if files and not damaged:
        return
    contexts = cut_text(again)
    if files and contexts.records() != files:
        raise SaeError(
            f"The text of {again.folder} comes out otherwise than it did, probably with another version of tokenizers, "
            "so the damaged files cannot be made again. Harvest into a new folder with --out."
        )
    contexts.write(again.folder)
    yield from (f"{file} was missing or damaged; cut again" for file in damaged or ["tokens"])


def problem(folder: Path, file: str, record: dict[str, Any]) -> str | None:
    """What is wrong with a file, or None."""
    name, chunk = file.rsplit("/", 1)
    try:
        check_chunk(folder, read_array(folder, name), int(chunk.split(".")[1]), record)
    except DamagedError as error:
        return str(error)
    return None


def mend_windows(
    again: HarvestPlan, writer: CacheWriter, computing: WindowComputer, report: HarvestProgress
) -> Iterator[str]:
    """Compute the windows of damaged files again, and write those files; the others of the window stay."""
    commits = {(c["window"], c["array"]): c for c in writer.commits(whole=False)}
    records = {file: record for commit in commits.values() for file, record in commit["files"].items()}
    damaged = set()
    for number, (file, record) in enumerate(records.items(), 1):
        if found := problem(again.folder, file, record):
            report.say(found.split(". ")[0] + ".")
            damaged.add(file)
        report.rows(number, len(records))
    wanted: dict[int, list[str]] = defaultdict(list)
    for window in range(writer.layout.windows):
        for array in again.widths:
            commit = commits.get((window, array))
            if commit is None or damaged & commit["files"].keys():
                wanted[window].append(array)
    if not wanted:
        return
    computing.load(load(again, wanted, again.device))
    for (window, at_once), arrays in by_passes(wanted, commits, again.request.batch_contexts).items():
        computing.at_once = at_once
        rows = computing.window(window, computing.buffers(arrays))
        jobs = dict(writer.files_of(window, rows))
        for array in arrays:
            files = {a.file(chunk): (a, chunk, block) for a, chunk, block in jobs[""] + jobs[array]}
            old = commits[window, array]["files"] if (window, array) in commits else {}
            if all(encode_chunk(a, block)[1] == old.get(file) for file, (a, _, block) in files.items()):
                for file in sorted(damaged & files.keys()):
                    write_chunk(again.folder, *files[file])
                    damaged.remove(file)  # where rows came from is of every array of the window, and mended once
                    yield f"{file} was missing or damaged; harvested again, to the same bytes"
            else:
                writer.write_window(window, replace(rows, bits={array: rows.bits[array]}), computing.made_with())
                yield f"window {window} of {array} was harvested again as a whole" + (
                    ", to other bytes: made with other versions or on another device" if old else ""
                )


def by_passes(
    wanted: dict[int, list[str]], commits: dict[tuple[int, str], dict[str, Any]], asked: int
) -> dict[tuple[int, int], list[str]]:
    """Arrays by their window and by how many contexts were in a pass when they were made, which can decide bits."""
    groups: dict[tuple[int, int], list[str]] = defaultdict(list)
    for window, arrays in wanted.items():
        for array in arrays:
            commit = commits.get((window, array))
            groups[window, commit["made_with"]["batch_contexts"] if commit else asked].append(array)
    return groups
