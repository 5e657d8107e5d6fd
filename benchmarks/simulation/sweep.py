"""Training many runs that are distributed over ranks and read a bucket, with a bounded local cache on each node.

These are taken from the program itself: the assignment of runs to ranks (train/deal.py), bytes of a run's state
(train/memory.py), which file a process pulls next and which file is removed to make room (cache/chunk_schedule.py), and
the interval of checkpoints. Files here are coarser than chunks: a layer has GROUPS files, and consecutive steps read
the same file. The processes of a node share its local cache: while a file is in the local cache, no other process of
the node pulls it again.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from sae.cache.chunk_schedule import NEVER, ChunkSchedule
from sae.cache.layout import CHUNK_ROWS
from sae.cache.local_folder import PULLED_BYTES, PULLS
from sae.train import variants  # noqa: F401  (registers the recipes)
from sae.train.config import TrainConfig
from sae.train.deal import Work, deal
from sae.train.memory import state_bytes
from sae.train.recipe import RECIPES, find_recipe
from sae.train.variant import RunConfig

from .constants import Constants
from .events import Clock, Link
from .harvest import WIDTH

STEP_TABLE = Path(__file__).parents[1] / "results" / "2026-11-29-step-budget.md"
LATENTS, BATCH = 18432, 4096
PULLS_AT_A_TIME = min(PULLS, PULLED_BYTES // (2 * WIDTH * CHUNK_ROWS))
GROUPS = 64  # files of a layer


def step_seconds() -> dict[str, float]:
    """Seconds of a step of each recipe at this size, read from the table."""
    rows = re.findall(rf"^\| `([\w-]+)` \| {LATENTS} \| {BATCH} \|.*\| ([\d.]+) \| [\d.]+ \| [\d.]+ \|$",
                      STEP_TABLE.read_text(), re.M)  # fmt: skip
    return {name: float(milliseconds) / 1e3 for name, milliseconds in rows if name in RECIPES}


@dataclass(frozen=True)
class Sweep:
    """The runs, the machines, and the local cache of each node in bytes."""

    gpus: int = 8
    local_cache: float = 1e12
    tokens: int = 100_000_000
    recipes: Sequence[str] = tuple(list(step_seconds())[:40])
    seeds: int = 5
    layers: Sequence[int] = (5, 12, 19)
    gpus_per_node: int = 8
    constants: Constants = field(default_factory=Constants)

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.gpus_per_node)

    @property
    def steps(self) -> int:
        return self.tokens // BATCH

    @property
    def layer_bytes(self) -> float:
        return 2.0 * WIDTH * self.tokens

    @property
    def group_bytes(self) -> int:
        return int(self.layer_bytes / GROUPS)

    @cached_property
    def works(self) -> list[Work]:
        """The runs, each with the seconds for its steps, the seconds for reading its batches, and its part of a GPU's
        memory."""
        c, seconds, names = self.constants, step_seconds(), self.recipes
        room = c.gpu_memory_share * c.gpu_memory - c.step_memory
        parts = {name: state_of(name, self.steps) / room for name in names}
        runs = [(layer, name) for layer in self.layers for name in names for _ in range(self.seeds)]
        reading = self.layer_bytes / min(c.disk / self.gpus_per_node, PULLS_AT_A_TIME * c.connection)
        return [
            Work((number,), layer, self.steps * seconds[name] / c.step_share, reading, parts[name])
            for number, (layer, name) in enumerate(runs)
        ]

    @property
    def bounds(self) -> dict[str, float]:
        """The least seconds that each resource needs: for all steps on all GPUs, and for the bytes that each node
        pulls.

        A node pulls, at least once, each layer that its ranks train.
        """
        c, works = self.constants, self.works
        shares = [share for share in deal(works, self.gpus) if share.runs]
        steps = max(sum(works[number].seconds for number in share.runs) for share in shares)
        layers = [
            {works[number].stream for share in shares[first : first + self.gpus_per_node] for number in share.runs}
            for first in range(0, len(shares), self.gpus_per_node)
        ]
        return {"steps": steps, "links": max(map(len, layers)) * self.layer_bytes / c.node_link}


def state_of(recipe: str, steps: int) -> int:
    """Bytes of the training state of a run."""
    found = find_recipe(recipe)
    options = {"memory_gb": 1000.0} if "memory_gb" in found.options else {}
    with torch.device("meta"):
        return state_bytes(found.make(RunConfig(WIDTH, LATENTS, steps, BATCH, variance=1.0), options))


@dataclass
class SweepResult:
    """The outcome of a sweep. Times are in seconds, summed over all ranks if there are several."""

    sweep: Sweep
    seconds: float  # until the last run is done
    steps_seconds: float  # of all ranks
    waited: float  # for files
    pulled: float  # bytes, of all nodes
    failures: int
    events: int

    @property
    def efficiency(self) -> float:
        """Share of the time of all GPUs that is spent in steps."""
        return self.steps_seconds / (self.seconds * self.sweep.gpus)


@dataclass
class Pass:
    """Runs of a layer that share each batch."""

    layer: int  # index of the layer in the sweep
    seconds: float  # that the steps on one group take


class Rank:
    """A process: reads groups in order, and pulls those that its node lacks."""

    def __init__(self, run: "SweepRun", node: "Node", passes: Sequence[Pass]) -> None:
        self.run, self.node, self.passes = run, node, passes
        self.files = np.array([one.layer * GROUPS + group for one in passes for group in range(GROUPS)], np.int64)
        positions = np.arange(len(self.files))
        self.schedule = ChunkSchedule(np.stack([self.files, positions, positions], 1), run.sizes)
        self.pinned = np.zeros(len(run.sizes), bool)
        self.position = self.life = 0
        self.spent = self.waited = 0.0
        self.stop()

    def stop(self) -> None:
        self.life += 1
        self.reading, self.pulling, self.ready, self.after = False, False, 0.0, -1

    def begin(self) -> None:
        self.run.clock.after(self.run.sweep.constants.start, self._begin, self.life)

    def _begin(self, life: int) -> None:
        if life == self.life:
            self.ready = self.run.clock.now
            self.pull()
            self.read()

    @property
    def is_done(self) -> bool:
        return self.position == len(self.files)

    def pin(self) -> None:
        """Keep the files that are present and needed, those needed earliest first, as far as this process's share
        allows."""
        there = np.flatnonzero(self.node.present | self.node.coming)
        needs = self.schedule.next_use(there, self.position)
        there = there[np.argsort(needs, kind="stable")][: int((needs < NEVER).sum())]
        self.pinned[:] = False
        self.pinned[there[: max(1, self.node.share)]] = True

    def fits(self, needed: int) -> bool:
        """Whether one more file fits into the share of this process, together with all files that it needs earlier."""
        there = np.flatnonzero(self.node.present | self.node.coming)
        before = int((self.schedule.next_use(there, self.position) <= needed).sum())
        return before < self.node.share or needed <= self.position

    def read(self) -> None:
        """Take the steps of the next group if its file is present."""
        if not self.reading and not self.is_done and self.ready and self.node.present[self.files[self.position]]:
            self.waited += self.run.clock.now - self.ready
            self.reading = True
            seconds = self.passes[self.position // GROUPS].seconds
            self.run.clock.after(seconds, self._has_read, self.life, seconds)

    def _has_read(self, life: int, seconds: float) -> None:
        if life == self.life:
            self.spent += seconds
            self.reading, self.ready = False, self.run.clock.now
            self.position += 1
            self.run.left -= 1
            self.pin()
            self.node.changed(self)

    def pull(self) -> None:
        """Pull the next file that is missing, once there is room for it."""
        node = self.node
        if self.pulling or self.is_done or not self.ready:
            return
        there = node.present | node.coming
        if self.position <= self.after and there[self.files[self.position]]:
            return
        kept = node.coming.copy()
        for other in node.ranks:
            if other is not self and not other.is_done:
                kept |= other.pinned
        pull = self.schedule.next_pull(self.position, there, kept, node.free)
        if pull is None:
            self.after = -1  # other processes still need the files that could be removed; try again when they continue
        elif not self.fits(pull.needed):
            self.after = self.position
        elif pull.after >= self.position:
            self.after = pull.after
        else:
            node.present[pull.evict] = False
            node.coming[pull.file] = self.pulling = True
            self.run.clock.after(self.run.sweep.constants.latency, node.send, self, pull.file, self.life)

    def roll_back(self) -> None:
        """Go back to the last checkpoint of the pass."""
        first = self.position // GROUPS * GROUPS
        if not self.is_done:
            steps = (self.position - first) * self.run.sweep.steps // GROUPS
            saved = steps // TrainConfig.checkpoint_every * TrainConfig.checkpoint_every
            back = first + saved * GROUPS // self.run.sweep.steps
            self.run.left += self.position - back
            self.position = back


class Node:
    """The processes of a node, and the local cache that they share."""

    def __init__(self, run: "SweepRun", shares: Sequence[Sequence[Pass]]) -> None:
        c = run.sweep.constants
        self.run, self.life = run, 0
        self.present, self.coming = (np.zeros(len(run.sizes), bool) for _ in range(2))
        self.link = Link(run.clock, c.node_link, PULLS_AT_A_TIME * c.connection)
        self.ranks = [Rank(run, self, passes) for passes in shares]

    @property
    def share(self) -> int:
        """How many files each process may keep."""
        processes = sum(not rank.is_done for rank in self.ranks)
        return int(self.run.sweep.local_cache / self.run.sweep.group_bytes / max(1, processes))

    @property
    def free(self) -> int:
        return int(self.run.sweep.local_cache) - int((self.present | self.coming).sum()) * self.run.sweep.group_bytes

    def send(self, rank: Rank, file: int, life: int) -> None:
        if life == rank.life:
            self.link.send(self.run.sweep.group_bytes, self.arrived, rank, file, life)

    def arrived(self, rank: Rank, file: int, life: int) -> None:
        if life == rank.life:
            self.coming[file], self.present[file] = False, True
            rank.pulling = False
            rank.pin()
            self.changed(rank)

    def changed(self, rank: Rank) -> None:
        """Called when a file was read or has arrived: the processes that waited for it continue."""
        for one in (rank, *(other for other in self.ranks if other is not rank)):
            one.read()
            one.pull()


class SweepRun:
    """Runs a sweep."""

    def __init__(self, sweep: Sweep, seed: int = 0) -> None:
        self.sweep, self.clock, self.rng = sweep, Clock(), random.Random(seed)
        self.sizes = np.full(len(sweep.layers) * GROUPS, sweep.group_bytes, np.int64)
        works = sweep.works
        passes = [self._passes([works[number] for number in share.runs]) for share in deal(works, sweep.gpus)]
        size = sweep.gpus_per_node
        self.nodes = [Node(self, passes[first : first + size]) for first in range(0, sweep.gpus, size)]
        self.ranks = [rank for node in self.nodes for rank in node.ranks]
        self.left = sum(len(rank.files) for rank in self.ranks)
        self.failures = 0
        if max(len(node.ranks) for node in self.nodes) * 2 * sweep.group_bytes > sweep.local_cache:
            raise ValueError(f"a local cache of {sweep.local_cache:g} bytes cannot hold two groups for each process")

    def _passes(self, works: Sequence[Work]) -> list[Pass]:
        """The passes of a rank. Each pass has runs of one layer, and each run joins the first pass that has room for
        it."""
        c, found = self.sweep.constants, []
        for layer in dict.fromkeys(work.stream for work in works):
            room: list[list[Work]] = []
            for work in (one for one in works if one.stream == layer):
                fitting = next((one for one in room if sum(w.part for w in one) + work.part <= 1), None)
                room.append([work]) if fitting is None else fitting.append(work)
            for one in room:
                seconds = sum(work.seconds for work in one)
                interval = seconds * TrainConfig.checkpoint_every / self.sweep.steps
                state = sum(work.part for work in one) * (c.gpu_memory_share * c.gpu_memory - c.step_memory)
                longer = max(1.0, state / min(c.checkpoint, c.disk / self.sweep.gpus_per_node) / interval)
                found.append(Pass(self.sweep.layers.index(layer), seconds * longer / GROUPS))
        return found

    def run(self) -> SweepResult:
        for rank in self.ranks:
            rank.begin()
        for node in self.nodes:
            self._plan_failure(node)
        self.clock.run(done=lambda: not self.left)
        return SweepResult(
            self.sweep, self.clock.now, sum(work.seconds for work in self.sweep.works),
            sum(rank.waited for rank in self.ranks), sum(node.link.bytes for node in self.nodes), self.failures,
            self.clock.events,
        )  # fmt: skip

    def _plan_failure(self, node: Node) -> None:
        if rate := self.sweep.constants.node_failures / 3600:
            self.clock.after(self.rng.expovariate(rate), self._fail, node)

    def _fail(self, lost: Node) -> None:
        """The launcher ends all ranks. They start again from checkpoints. A new node has an empty cache."""
        self.failures += 1
        self._plan_failure(lost)
        lost.present[:] = False
        for node in self.nodes:
            node.life += 1
            node.link.drop_all()
            node.coming[:] = False
            for rank in node.ranks:
                rank.stop()
                rank.roll_back()
        self.clock.after(self.sweep.constants.restart, self._begin_again, lost.life)

    def _begin_again(self, life: int) -> None:
        if life == self.nodes[0].life:
            for rank in self.ranks:
                rank.begin()
