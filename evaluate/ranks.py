"""Evaluate with several ranks, started by a launcher. Each rank measures its share of the SAEs on its own device.

While they measure, ranks exchange data only through files. Results are written to the run folders. Values that do not
depend on an SAE are computed by the first rank that needs them, which writes them to the artifact cache. At the end,
each rank sends the other ranks the data that no file contains: errors and the names of reference rows. If a rank dies,
its SAEs stay unmeasured until the same command is run again.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from ..common.errors import SaeError, UnavailableError
from ..common.process_group import ProcessGroup
from .controls import control_rows
from .deal import REFERENCES, Share, Unit, deal_work
from .measure import ProgressFactory, loaded, measure_all, reference_rows_if_possible, use_precision
from .metrics.base import Metric, Progress
from .plan import EvaluatePlan, read_earlier_results
from .reference_saes import Identity
from .results import result_file
from .rows import EvalGroup, EvalRow

TICK_SECONDS = 2.0  # seconds between two counts of the results of all ranks


@dataclass
class Measured:
    """The values that a rank sends to the others.

    Attributes:
        errors: (run folder, metric) -> why there is no result.
        references: (number of the group, indices in it) -> a reference row, without its SAE and results.
        notes: sentences to show after the tables.
    """

    errors: dict[tuple[Path | None, str], SaeError] = field(default_factory=dict)
    references: dict[tuple[int, ...], EvalRow] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def measure_over_ranks(
    plan: EvaluatePlan, ranks: ProcessGroup, progress: ProgressFactory, all_rows: bool
) -> list[list[EvalRow]]:
    """Measure this rank's share of a plan and wait for the other ranks. Returns the rows of each group of the plan.

    If `all_rows` is false, rows that other ranks measured have no results.

    Raises SaeError if any rank raised one, and UnavailableError if a rank has ended.
    """
    shares = ranks.everywhere(lambda: deal_work(plan, ranks.count))
    # All ranks use the first rank's assignment, because another rank may have planned when more results existed.
    shares, controls = ranks.gather((shares, plan.config.controls) if ranks.is_first else None)[0]
    plan.config = replace(plan.config, controls=controls)
    view = RanksView(plan, progress) if ranks.is_first else NoView(progress)
    with view.shown():
        for group in plan.groups:
            group.ctx.artifacts.waiting = view.waiting
        outcome = attempt(plan, shares[ranks.rank], view.progress)
        with view.others():
            found = ranks.gather(ranks.everywhere(outcome))
    if ranks.is_first:
        plan.artifacts.remove_locks()
    return join(plan, found, all_rows)


def attempt(plan: EvaluatePlan, share: Share, progress: ProgressFactory) -> Callable[[], Measured]:
    """Measure a share. Returns a function that returns the results or raises the SaeError that ended the work."""
    try:
        measured = measure_share(plan, share, progress)
    except SaeError as error:
        return partial(raise_error, error)
    return lambda: measured


def raise_error(error: SaeError) -> NoReturn:
    raise error


def measure_share(plan: EvaluatePlan, share: Share, progress: ProgressFactory) -> Measured:
    """Measure what belongs to this rank's share of the work, group by group, with only the SAEs of one group in
    memory."""
    measured = Measured()
    known_notes = len(plan.notes)
    for number, group in enumerate(plan.groups):
        rows = {row.folder: row for row in group.rows}
        units = [unit for unit in share if unit.runs[0] in rows]
        outlines = {folder: row.target for folder, row in rows.items()}
        due = load_due(group, [unit for unit in units if not unit.beside], measured)
        references = share_of_references(plan, group, [unit for unit in units if unit.beside])
        measure_all(plan, group, due, list(references.values()), progress)
        for name, some in due.items():
            measured.errors |= {(row.folder, name): row.errors[name] for row in some if name in row.errors}
        for folder, row in rows.items():
            row.target = outlines[folder]
        for place, row in references.items():
            target = replace(row.target, sae=Identity())
            measured.references[number, *place] = replace(row, target=target, results={})
    measured.notes = plan.notes[known_notes:]
    return measured


def load_due(group: EvalGroup, units: Sequence[Unit], measured: Measured) -> dict[str, list[EvalRow]]:
    """The rows to measure for each metric, with their SAEs in memory.

    A damaged run gets an error. For a metric that reads all seeds together, all seeds of the damaged run's system get
    the error.
    """
    rows = {row.folder: row for row in group.rows}
    due: dict[str, list[EvalRow]] = {}
    for unit in units:
        members = [rows[folder] for folder in unit.runs if folder in rows]
        try:
            for row in members:
                row.target = loaded(row, group.ctx.device, group.ctx.precision)
        except SaeError as error:
            for row in members:
                for name in unit.metrics:
                    row.errors[name] = measured.errors[row.folder, name] = error
            continue
        for name in unit.metrics:
            due.setdefault(name, []).extend(members)
    return due


def share_of_references(plan: EvaluatePlan, group: EvalGroup, units: Sequence[Unit]) -> dict[tuple[int, ...], EvalRow]:
    """The reference rows of some units, keyed by their index among the reference rows of the group: row sets first,
    then controls."""
    if not units:
        return {}
    row_sets = {row.folder: row.target.row_set for row in group.rows}
    wanted = {(unit.beside, row_sets[unit.runs[0]]) for unit in units}
    found: dict[tuple[int, ...], EvalRow] = {}
    for number, row_set in enumerate(group.row_sets):
        if (REFERENCES, row_set) in wanted:
            for place, row in enumerate(reference_rows_if_possible(plan, group, [row_set])):
                found[0, number, place] = row
    for number, row in enumerate(control_rows(group, plan.config.controls, outlines=True)):
        if (str(row.sae_folder), row.target.row_set) in wanted:
            row.target = loaded(row, group.ctx.device, group.ctx.precision)
            found[1, number] = row
    use_precision([*found.values()], group.ctx.precision)
    return found


def join(plan: EvaluatePlan, found: Sequence[Measured], all_rows: bool) -> list[list[EvalRow]]:
    """The rows of each group with the measurements of all ranks: results from files, the rest from `found`."""
    errors = {key: error for one in found for key, error in one.errors.items()}
    told = {place: row for one in found for place, row in one.references.items()}
    plan.notes += [note for one in found for note in one.notes]
    plan.notes[:] = dict.fromkeys(plan.notes)
    by_group = []
    for number, group in enumerate(plan.groups):
        references = [told[place] for place in sorted(told) if place[0] == number]
        for metric in plan.metrics:
            for row in group.rows:
                if (row.folder, metric.name) in errors:
                    row.errors[metric.name] = errors[row.folder, metric.name]
            if metric.name in group.settings and all_rows:
                read_earlier_results(metric, group, group.pending(metric.name, [*group.rows, *references]), force=False)
                for row in group.pending(metric.name):
                    row.errors[metric.name] = unseen(row, metric)
        by_group.append([*group.rows, *references])
    return by_group


def unseen(row: EvalRow, metric: Metric) -> SaeError:
    assert row.folder is not None
    return UnavailableError(
        f"{result_file(row.folder, metric)} was written by another process but cannot be found here. All "
        "processes must see the same run folders. Put the folders on a shared file system."
    )


class NoView:
    """A view that shows nothing, for all ranks but the first."""

    def __init__(self, progress: ProgressFactory) -> None:
        self.progress = progress

    def waiting(self, what: str) -> None:
        pass

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        yield

    def others(self) -> AbstractContextManager[None]:
        return self.shown()


class RanksView(NoView):
    """The progress of the first rank's metrics, with the number of result files from all ranks.

    A thread counts the files and shows their number, even while the rank waits.
    """

    def __init__(self, plan: EvaluatePlan, progress: ProgressFactory) -> None:
        super().__init__(self.beside_others)
        self.bar = progress
        self.before = {
            path: stamp(path)
            for group in plan.groups
            for metric in plan.metrics
            if metric.name in group.settings
            for row in group.pending(metric.name)
            if row.folder
            for path in [result_file(row.folder, metric)]
        }
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.report: Progress | None = None
        self.latest = (0, 1, "")
        self.awaited, self.count = "", 0

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        thread = threading.Thread(target=self.tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.ended.set()
            thread.join()

    @contextlib.contextmanager
    def beside_others(self, title: str) -> Iterator[Progress]:
        with self.bar(title) as report:
            self.report, self.latest = report, (0, 1, "")
            try:
                yield self.update
            finally:
                with self.lock:
                    self.report = None

    @contextlib.contextmanager
    def others(self) -> Iterator[None]:
        """The view while this rank waits for the others."""
        with self.beside_others("on the other ranks"):
            self.latest = (self.count, max(len(self.before), 1), "waiting for the other ranks")
            yield

    def update(self, done: int, total: int, note: str = "") -> None:
        self.latest = (done, total, note)
        self.show()

    def waiting(self, what: str) -> None:
        """Show that this rank waits until another rank has computed an artifact. With "", show that it no longer
        waits."""
        self.awaited = f"waiting for another rank, which computes {what}" if what else ""
        self.show()

    def tick(self) -> None:
        while not self.ended.wait(TICK_SECONDS):
            self.count = sum(stamp(path) != before for path, before in self.before.items())
            self.show()

    def show(self) -> None:
        with self.lock:
            if self.report is None:
                return
            done, total, note = self.latest
            of_all = f"{self.count:,} of {len(self.before):,} results of all ranks"
            self.report(done, total, "; ".join(filter(None, [self.awaited or note, of_all])))


def stamp(path: Path) -> tuple[int, int] | None:
    """A value that changes whenever a file is rewritten; None if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns
