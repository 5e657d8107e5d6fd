"""Damage the JSON records of a small cache and its runs at random, and read them: `python benchmarks/record_fuzz.py`.

In 10,000 trials one bit of a record is flipped, and in 2,000 trials its structure is changed: a key is deleted or
doubled; a value gets another type, is nested 20,000 deep, or becomes a number of 5,000 digits or NaN; two values are
exchanged; or the file is emptied. The readers of the record are then called in this process. Each time they must

- return what they return for the intact record,
- raise an error with a message (SaeError),
- or differ in one of the ways that HARMLESS lists;

any other exception is a bug, and a difference that is not listed means that damaged data was accepted. In both cases
the script fails. Half of the structural changes are made to a record without its digest, as earlier versions wrote it.
In such a record a changed value is not noticed, so only exceptions count. Writes
benchmarks/results/<date>-record-fuzz.md.
"""

import argparse
import collections
import copy
import datetime
import hashlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from faults.inputs import make_model, make_text

from sae.cache.reader import Cache
from sae.common.errors import SaeError
from sae.evaluate.compared_runs import read_run
from sae.evaluate.metrics.core import Core
from sae.evaluate.plan import EvaluateConfig
from sae.evaluate.results import read_result
from sae.evaluate.run import evaluate
from sae.harvest.plan import HarvestConfig, plan_harvest
from sae.harvest.run import run_harvest
from sae.train.checkpoint import read_checkpoint
from sae.train.formats.export import export_sae
from sae.train.formats.import_ import import_sae
from sae.train.plan import TrainConfig, plan_training
from sae.train.run import run_training
from sae.train.sae import load_sae

ROOT = Path(__file__).parents[1]
FLIPS, STRUCTURAL = 10_000, 2_000
DIGEST = "content_digest"
SAME, SENTENCE, DIFFERENT, EXCEPTION = "as intact", "an error message", "different", "another exception"
HARMLESS: dict[str, str] = {}  # name of a file -> why a difference in its content does no harm
DEEP, HUGE, TWICE = "@deep@", "@huge@", "@twice@"  # placeholders for values that json.dumps cannot write

Read = Callable[[], Any]
Change = Callable[[Any, random.Random], str]


@dataclass
class Counts:
    """How often each outcome occurred for each kind of record and damage, and the outcomes that must not occur."""

    seen: collections.Counter[tuple[str, str, str]] = field(default_factory=collections.Counter)
    bad: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="200 trials of each kind, and no page")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {"SAE_HOME": home, "HF_HUB_OFFLINE": "1"}
        os.chdir(home)
        records = build(Path(home))
        print(f"{len(records)} records, built in {time.monotonic() - started:.0f} s", flush=True)
        flips, structural = (200, 200) if args.quick else (FLIPS, STRUCTURAL)
        counts = fuzz(records, flips, structural, args.seed)
        os.chdir(ROOT)
    lines = list(table(counts))
    print("\n".join(lines))
    if not args.quick:
        write_page(lines, counts, args.seed, len(records), time.monotonic() - started)
    if counts.bad:
        sys.exit("\n\n".join(counts.bad[:20]) + f"\n\n{len(counts.bad)} times")


# --- what is damaged, and what reads it -------------------------------------------------------------------------------


def build(home: Path) -> dict[Path, Read]:
    """A cache of two layers, a run that was evaluated with two settings, and an imported run: file -> its reader."""
    make_model("tiny", 0)
    make_text()
    cache = home / "activations" / "cache"
    run_harvest(
        plan_harvest(
            HarvestConfig(
                model="./tiny", dataset="sentences.jsonl", layers=(0, 1), tokens=2000, context=32, window=1024,
                held_out=0.1, device="cpu", out=cache,
            )
        )
    )  # fmt: skip
    plan = plan_training(
        TrainConfig(
            ["batchtopk"], layers=[0], caches=[cache], steps=6, batch_size=64, width="32", device="cpu",
            checkpoint_every=4, options=["k=4"],
        )
    )  # fmt: skip
    run_training(plan)
    run = plan.runs[0].folder
    for tokens in (60, 90):
        evaluate(EvaluateConfig([run], suite="core", tokens=tokens, device="cpu", references=False))
    imported = import_sae(export_sae(run, "saelens", home / "exported", cache=cache).folder, cache=cache).folder
    records: dict[Path, Read] = {path: lambda: read_cache(cache) for path in sorted(cache.rglob("*.json"))}
    for folder in (run, imported):
        records |= {folder / name: reader_of_run(folder) for name in ("sae.json", "run.json")}
    for path in sorted(run.rglob("state.json")):
        records[path] = reader_of_checkpoint(path.parent)
    records[run / "evaluations" / "core.json"] = lambda: comparable(read_run(run))
    (earlier,) = (run / "evaluations" / "earlier").glob("*.json")
    settings = json.loads(earlier.read_text())["eval_config"]
    records[earlier] = lambda: read_archived(run, earlier, settings)
    return records


def read_cache(folder: Path) -> list[Any]:
    """Reads what training and `sae cache verify` read."""
    cache = Cache(folder)
    read: list[Any] = [cache.describe(), cache.identity, cache.rows, cache.layers, len(list(cache.verify()))]
    for name in ("layer_00", "layer_01"):
        read += [cache.array(name).shape, cache.array_digest(name), cache.statistics(name), digest(cache.mean(name))]
        read += [digest(cache.read_chunk(name, 0))]
    for held_out in (False, True):
        contexts = cache.contexts(held_out=held_out)
        read += [digest(contexts.ids), digest(contexts.length)]
    return read


def reader_of_run(folder: Path) -> Read:
    """A function that reads the SAE of a run, and then reads the run as `sae compare` and `sae train --resume`
    do."""

    def read() -> list[Any]:
        sae = load_sae(folder)
        tensors = {name: digest(tensor.numpy()) for name, tensor in sae.state_dict().items()}
        compared = comparable(read_run(folder))
        try:
            resumed: Any = plan_training(TrainConfig(resume=[folder])).runs[0].identity()
        except SaeError as error:
            if "was imported" not in str(error):
                raise
            resumed = str(error)
        return [tensors, sae.origin, str(sae.activation), sae.pre_bias, compared, resumed]

    return read


def reader_of_checkpoint(folder: Path) -> Read:
    def read() -> Any:
        saved = read_checkpoint(folder)
        tensors = {name: digest(tensor.numpy()) for name, tensor in sorted(saved.tensors.items())}  # in a fixed order
        return saved.step, saved.step_version, tensors

    return read


def read_archived(run: Path, path: Path, settings: Any) -> Any:
    """Read an archived result, and put the files back that reading moves."""
    kept = {file: file.read_bytes() for file in (path, run / "evaluations" / "core.json")}
    try:
        return read_result(run, Core(), settings)
    finally:
        for file in (run / "evaluations").rglob("*.json"):
            if file not in kept:
                file.unlink()
        for file, data in kept.items():
            file.write_bytes(data)


def comparable(run: Any) -> list[Any]:
    return [run.origin, run.record, run.results, run.settings]


def digest(array: Any) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


# --- damage -----------------------------------------------------------------------------------------------------------


def fuzz(records: dict[Path, Read], flips: int, structural: int, seed: int) -> Counts:
    """Damage random records and read them. The files are restored afterwards."""
    rng, counts, paths = random.Random(seed), Counts(), list(records)
    whole = {path: path.read_bytes() for path in paths}
    clean = {path: repr(records[path]()) for path in paths}
    for number in range(flips + structural):
        path = rng.choice(paths)
        flipped = number < flips
        if flipped:
            name, data = "one bit", flip(whole[path], rng)
        else:
            name, data = change_structure(whole[path], rng, without_digest=bool(rng.randrange(2)))
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome, what = outcome_of(records[path], clean[path])
        path.write_bytes(whole[path])
        counts.seen[kind_of(path), name, outcome] += 1
        unnoticed = outcome == DIFFERENT and "without a digest" not in name and kind_of(path) not in HARMLESS
        if outcome == EXCEPTION or unnoticed:
            counts.bad.append(f"{path}, {name}: {outcome}\n{difference(whole[path], data)}\n{what}")
        if number % 1000 == 999:
            print(f"  {number + 1:,} of {flips + structural:,}, {len(counts.bad)} bad", flush=True)
    return counts


def outcome_of(read: Read, clean: str) -> tuple[str, str]:
    try:
        found = repr(read())
    except SaeError as error:
        return (SENTENCE, "") if len(str(error)) > 20 else (EXCEPTION, f"no message: {error!r}")
    except Exception:
        return EXCEPTION, traceback.format_exc()[-1500:]
    return (SAME, "") if found == clean else (DIFFERENT, "")


def flip(data: bytes, rng: random.Random) -> bytes:
    bit, flipped = rng.randrange(8 * len(data)), bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def change_structure(data: bytes, rng: random.Random, *, without_digest: bool) -> tuple[str, bytes]:
    """The name of a random change to `data`, and the changed text."""
    name = rng.choice(list(CHANGES))
    tree = json.loads(data)
    if without_digest:
        remove_digests(tree)
        name += ", without a digest"
    text = CHANGES[name.removesuffix(", without a digest")](tree, rng)
    for mark, written in ((DEEP, '{"a":' * 20_000 + "1" + "}" * 20_000), (HUGE, "9" * 5000)):
        text = text.replace(f'"{mark}"', written)
    return name, text.replace(TWICE, "").encode()


def remove_digests(tree: Any) -> None:
    if isinstance(tree, dict):
        tree.pop(DIGEST, None)
        for branch in tree.values():
            remove_digests(branch)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value in a tree of dictionaries and lists."""
    for key, branch in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(branch, (dict, list)):
            yield from places(branch)


def replacing(new: Callable[[Any, random.Random], Any]) -> Change:
    """A change of one value at a random place."""

    def change(tree: Any, rng: random.Random) -> str:
        holder, key = rng.choice(list(places(tree)))
        holder[key] = new(holder[key], rng)
        return json.dumps(tree)

    return change


def another_type(value: Any, rng: random.Random) -> Any:
    others = [None, True, 7, -3, 0.5, "x", "", [], ["x"], {}, {"x": 1}, [value], 1e308]
    return rng.choice([one for one in others if type(one) is not type(value)])


def delete_key(tree: Any, rng: random.Random) -> str:
    holder, key = rng.choice(list(places(tree)))
    del holder[key]
    return json.dumps(tree)


def swap_values(tree: Any, rng: random.Random) -> str:
    (one, key), (other, other_key) = rng.sample(list(places(tree)), 2)
    first, second = copy.deepcopy(one[key]), copy.deepcopy(other[other_key])
    one[key] = second
    other[other_key] = first  # if one place is inside the other, one value is lost
    return json.dumps(tree)


def double_key(tree: Any, rng: random.Random) -> str:
    """A second value for a key; JSON leaves open which one counts, and Python takes the last."""
    holder, key = rng.choice([place for place in places(tree) if isinstance(place[0], dict)])
    holder[f"{key}{TWICE}"] = another_type(holder[key], rng)
    return json.dumps(tree)


CHANGES: dict[str, Change] = {
    "a key deleted": delete_key,
    "a value of another type": replacing(another_type),
    "two values swapped": swap_values,
    "a value nested 20,000 deep": replacing(lambda value, rng: DEEP),
    "a number of 5,000 digits": replacing(lambda value, rng: HUGE),
    "NaN or infinity": replacing(lambda value, rng: rng.choice([float("nan"), float("inf"), -float("inf")])),
    "a key twice": double_key,
    "an empty file": lambda tree, rng: rng.choice(["", "{}", "[]", "null", '""', "0"]),
}


def difference(whole: bytes, damaged: bytes) -> str:
    """Where two texts begin to differ."""
    at = next((n for n, (a, b) in enumerate(zip(whole, damaged, strict=False)) if a != b), 0)
    return f"{whole[max(at - 60, 0) : at + 60]!r}\n{damaged[max(at - 60, 0) : at + 60]!r}"


# --- the page ---------------------------------------------------------------------------------------------------------


def kind_of(path: Path) -> str:
    parent = path.parent.name
    if parent in ("commits", "earlier"):
        return f"{parent}/*.json"
    if parent.startswith("step-"):
        return "checkpoints/*/state.json"
    if path.name == "zarr.json":
        return "zarr.json" if parent == "cache" else "<array>/zarr.json"
    return f"{parent}/{path.name}" if parent in ("tokens", "evaluations") else path.name


def table(counts: Counts) -> Iterator[str]:
    outcomes = (SAME, SENTENCE, DIFFERENT, EXCEPTION)
    for title, place in (("record", 0), ("damage", 1)):
        yield f"| {title} | times | {' | '.join(outcomes)} |"
        yield f"|---|{'---:|' * (len(outcomes) + 1)}"
        for name in sorted({key[place] for key in counts.seen}):
            numbers = [
                sum(n for key, n in counts.seen.items() if (key[place], key[2]) == (name, one)) for one in outcomes
            ]
            yield f"| {name} | {sum(numbers):,} | {' | '.join(f'{number:,}' for number in numbers)} |"
        yield ""


def write_page(lines: list[str], counts: Counts, seed: int, records: int, seconds: float) -> None:
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    today = datetime.date.today()
    harmless = "".join(f", and for {name} ({why})" for name, why in HARMLESS.items())
    page = f"""# Random damage to every record of a cache and its runs

Made by `python benchmarks/record_fuzz.py --seed {seed}` on {today} at commit {commit.strip()} with Python
{platform.python_version()} on {os.cpu_count()} cores in {seconds:.0f} s. {records} records were damaged
{counts.seen.total():,} times and read in one process. A read may give other values than those of the undamaged record
("different") only if the record has no digest, like those that earlier versions wrote{harmless}. Exceptions other than
an error with a message are never allowed. Outcomes that must not occur: {len(counts.bad)}.

"""
    (ROOT / "benchmarks" / "results" / f"{today}-record-fuzz.md").write_text(page + "\n".join(lines))


if __name__ == "__main__":
    main()
