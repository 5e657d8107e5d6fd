"""The runs in the same folder as a run: its other seeds, and SAEs that were measured with the same settings."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..cache.hooks import Hook
from ..common.errors import SaeError, warn_left_out
from ..common.escaping import quote
from ..common.precision import recorded_precision
from ..train.sae import read_run_record
from .compare import sae_location
from .compared_pairs import options_of_earlier_pairs
from .compared_runs import ComparedRun, read_references, read_run, without_weights
from .control_shares import is_control_of
from .tables import digest_without_seed

MORE_SEEDS = 2  # seeds that a command trains


@dataclass(frozen=True)
class RunsBeside:
    """The references and runs that a run is compared with.

    Attributes:
        references: the references measured on its text and hook, including its controls.
        seeds: runs that differ from it only in their seed, with core measured in the same way.
        unmeasured: the folders of runs that differ only in their seed, with core measured differently or not at all.
        controls: its controls, one of each recipe, with the results that were measured with the same settings.
        others: the other runs of its model, layer and site, except controls, with core measured in the same way.
    """

    run: ComparedRun
    references: list[ComparedRun] = field(default_factory=list)
    seeds: list[ComparedRun] = field(default_factory=list)
    unmeasured: list[Path] = field(default_factory=list)
    controls: list[ComparedRun] = field(default_factory=list)
    others: list[ComparedRun] = field(default_factory=list)

    @property
    def seed_folders(self) -> list[Path]:
        """The folders of the run and of all its other seeds."""
        return [self.run.folder, *(one.folder for one in self.seeds), *self.unmeasured]


def find_neighbours(run: ComparedRun) -> RunsBeside:
    """Read the references of a run and the other runs in the same folder. A warning names the runs that cannot be
    read."""
    found = RunsBeside(run, read_references([run]))
    controls: dict[str, list[ComparedRun]] = {}
    for folder in sorted(run.folder.resolve().parent.iterdir()):
        if folder == run.folder.resolve() or not (folder / "sae.json").exists():
            continue
        try:
            # Only the results of core are read. All runs are compared by this metric, and reading more would take too
            # long: a folder can have many runs and is read often.
            is_seed = digest_of_system(read_run_record(folder)) == digest_of_system(run.record) != ""
            other = read_run(folder, metrics=("core",))
        except SaeError as error:
            warn_left_out(folder, error)
            continue
        alike = sae_location(other) == sae_location(run) and measured_alike(run, other)
        if is_seed:
            if other.record["seed"] == run.record["seed"]:
                continue  # the same seed trained twice is not an independent sample
            if alike:
                found.seeds.append(other)
            else:
                found.unmeasured.append(folder)
        elif alike and not other.is_control:
            found.others.append(other)
        elif alike and is_control_of(other, run):
            controls.setdefault(digest_of_system(other.record) or str(folder), []).append(other)
    found.controls.extend(read_control(nearest_seed(run, some), run) for some in controls.values())
    return found


def nearest_seed(run: ComparedRun, others: Sequence[ComparedRun]) -> ComparedRun:
    """The control with the run's seed, or else the first one. A run is compared with one control, not with the best of
    several."""
    return next((one for one in others if one.record.get("seed") == run.record.get("seed")), others[0])


def read_control(control: ComparedRun, run: ComparedRun) -> ComparedRun:
    """The control, with only those results that were measured with the same settings as the run's results."""
    every = read_run(control.folder)
    return replace(
        every, results={name: one for name, one in every.results.items() if measured_alike(run, every, name)}
    )


def digest_of_system(record: Mapping[str, Any] | None) -> str:
    """Equal for runs that differ only by seed; "" for a run without a seed."""
    return digest_without_seed(record) if record and "seed" in record else ""


def measured_alike(run: ComparedRun, other: ComparedRun, metric: str = "core") -> bool:
    """Whether a metric was measured for both runs, with the same settings. Norm limits are ignored, because those of
    two caches differ a little."""
    settings = [without_weights(one.settings.get(metric, {})) for one in (run, other)]
    ours, theirs = ({name: v for name, v in one.items() if name != "norm_limit"} for one in settings)
    return metric in run.results and metric in other.results and ours == theirs


def more_seeds_command(run: ComparedRun) -> str:
    """The command that trains a run with other seeds; "" if the run's record is not sufficient for it."""
    record = run.record
    is_usual = len(record.get("cache_folders", ())) == 1 and "ring" not in record
    if not digest_of_system(record) or not is_usual or record.get("asked", {}).get("modules"):
        return ""
    seeds = [seed for seed in range(MORE_SEEDS + 1) if seed != record["seed"]][:MORE_SEEDS]
    options = options_of_earlier_pairs(record) | record["options"]
    precision = recorded_precision(record)
    is_default = precision == "float32" and record.get("device", "cpu") == "cpu"
    words = [
        f"sae train --variant {quote(record['variant'])} {Hook.from_record(record).cli_flags}",
        *(f"--seed {seed}" for seed in seeds),
        f"--width {record['d_sae']} --steps {record['steps']} --batch-size {record['batch_size']}",
        f"--l0 {record['l0']:g}" if record.get("l0") is not None else "",
        "--paper-exact" if record.get("literal") else "",
        *(f"--set {quote(f'{name}={describe_option(value)}')}" for name, value in options.items()),
        f"--shuffle-seed {record['order_seed']}" if record.get("order_seed") else "",
        "--compile" if record.get("compiled") else "",
        "" if is_default else f"--precision {precision}",
        f"--cache {quote(record['cache_folders'][0])} --out {quote(run.folder.parent)}",
    ]
    return " ".join(filter(None, words))


def describe_option(value: Any) -> str:
    """The value of an option in the form that `--set` accepts."""
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)
