"""A harvest that nodes with GPUs write into a bucket, simulated window by window.

These rules are those of the program itself: the windows and the objects of each (cache/layout.py), the assignment of
windows to processes, the number of windows that a process has in memory, writing a window while the next one is
computed (harvest/windows.py), the number of requests (harvest/store_costs.py, cache/store_place.py) and of concurrent
requests (cache/mirror.py), counting a window once its commit exists, and the work that each process repeats after a
failure. All times are assumed, in constants.py. A process that fails loses the windows that it has in memory. Drafts
(harvest/window_draft.py) are not simulated: they save the rows of windows that take more than a minute to compute, and
no window here takes that long.
"""

import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from sae.cache.largest_rows import SHARE
from sae.cache.layout import Layout
from sae.cache.mirror import RECORD_THREADS, THREADS
from sae.cache.object_store import PART_BYTES
from sae.harvest.share import HarvestShare
from sae.harvest.store_costs import LARGEST_READS, SIDE_BYTES, list_requests, seal_requests
from sae.harvest.windows import WINDOWS_IN_MEMORY

from .constants import Constants
from .events import Clock, Link, Server

RANKS, SHARES = "ranks", "shares"
TOKEN_BYTES = 4  # of an id
TEXT_UPLOADS = 2  # concurrent parts of one object: cache/object_store.py, put
WIDTH = 2304  # of Gemma-2-2B


@dataclass(frozen=True)
class Harvest:
    """The settings of a harvest, and the machines that run it."""

    tokens: int = 10_000_000_000
    layers: Sequence[int] = (5, 12, 19)
    nodes: int = 64
    gpus: int = 8  # per node; each has a process
    window: int = Layout.window_rows
    way: str = RANKS  # ranks of one launcher, or SHARES: tasks of an array job with --share
    shares: int | None = None  # default: as many as there are GPUs
    prepared: bool = False  # whether the text is already cut
    constants: Constants = field(default_factory=Constants)

    @property
    def processes(self) -> int:
        return self.nodes * self.gpus

    @property
    def layout(self) -> Layout:
        return Layout(self.tokens, self.window)

    @property
    def widths(self) -> dict[str, int]:
        return {f"layer_{layer:02d}": WIDTH for layer in self.layers}

    @cached_property
    def objects(self) -> list[int]:
        """The bytes of each object of a window; the objects of its commits are not counted."""
        layout = self.layout
        return [array.chunk_bytes for array in layout.arrays(self.widths) for _ in layout.chunk_range(array, range(1))]

    @property
    def largest(self) -> list[int]:
        """The bytes of the objects that hold the largest rows of a window: one object per layer."""
        return [int(SHARE * self.window) * (4 + 2 * WIDTH)] * len(self.layers)

    @property
    def window_bytes(self) -> int:
        return sum(self.objects) + sum(self.largest)

    @property
    def writes(self) -> int:
        """Requests that write a window, commits included."""
        return sum(map(put_requests, [*self.objects, *self.largest])) + len(self.layers)

    @property
    def asks(self) -> int:
        """The requests with which the first rank, or each task that has a share, lists every commit when it starts."""
        return list_requests(self.layout, len(self.layers))

    @property
    def token_seconds(self) -> float:
        """How long a GPU computes for a token."""
        c = self.constants
        return (max(self.layers) + 1) * c.block_flops / (c.gpu_flops * c.gpu_share)

    @property
    def writer_seconds(self) -> float:
        """How long a process measures and checks a window, before it can be sent."""
        return self.window_bytes / self.constants.writer

    @property
    def cut_seconds(self) -> float:
        """How long one process turns the text into contexts and uploads them."""
        c = self.constants
        sending = TOKEN_BYTES * self.tokens / (TEXT_UPLOADS * c.connection)
        return self.tokens * (1 / (c.encode * c.encode_threads) + 1 / c.cut) + sending

    @property
    def text_seconds(self) -> float:
        """How long a node reads the ids of the text: they are one object, which one request reads."""
        return TOKEN_BYTES * self.tokens / self.constants.connection

    @property
    def asking_seconds(self) -> float:
        """How long one process takes to list all commits at its start, one page of the listing after the other."""
        return self.asks * self.constants.latency

    @property
    def commit_seconds(self) -> float:
        """How long it takes to look for the commits of a window, or to write them, one after the other."""
        return len(self.layers) * self.constants.latency

    @property
    def send_seconds(self) -> float:
        """How long the requests that write a window wait for their answers, without the time of the transfer."""
        return math.ceil((len(self.objects) + len(self.largest)) / THREADS) * self.constants.latency

    @property
    def seal_requests(self) -> int:
        """Requests that the sealing process sends, for the commits, side arrays and largest rows of each window."""
        return seal_requests(self.layout, len(self.layers))

    @property
    def seal_seconds(self) -> float:
        """How long it takes to complete the cache, which is done by the process that finds that every window is
        committed."""
        c, layout, arrays = self.constants, self.layout, len(self.layers)
        read = layout.n_windows * LARGEST_READS * sum(self.largest) + self.tokens * (SIDE_BYTES - 4 + 4 * arrays)
        answers = self.seal_requests * c.latency / RECORD_THREADS
        reading = max(answers, read / min(c.node_link, RECORD_THREADS * c.connection))
        files = layout.n_windows * len(self.objects)
        return reading + layout.n_windows * arrays * c.read_commit + files * c.merge_file

    @property
    def bounds(self) -> dict[str, float]:
        """Seconds that each resource needs for all windows if it does nothing else: lower bounds on the harvest's
        time."""
        c, windows = self.constants, self.layout.n_windows
        sent = windows * self.window_bytes
        per_node = min(c.node_link, self.gpus * THREADS * c.connection)
        return {
            "model": self.tokens * self.token_seconds / self.processes,
            "writers": windows * self.writer_seconds / self.processes,
            "links": sent / self.nodes / per_node,
            "writes": windows * self.writes / (c.put_rate * c.partitions),
            "asking": (1 if self.way == RANKS else self.processes) * self.asks / (c.get_rate * c.partitions),
        }


def put_requests(size: int) -> int:
    """Requests that write an object: one, or one for each part plus two to begin and complete the upload."""
    return 1 if size <= PART_BYTES else math.ceil(size / PART_BYTES) + 2


@dataclass
class HarvestResult:
    """The outcome of a harvest. Times are in seconds."""

    harvest: Harvest
    windows_seconds: float  # from the start of the first process to the last commit
    failures: int
    computed_again: int  # windows that were in memory when their process failed
    idle: float  # share of the processes' time in which the model does not compute
    waited: float  # the part of `idle` in which both windows in memory wait to be written or sent
    events: int

    @property
    def seconds(self) -> float:
        cut = 0.0 if self.harvest.prepared else self.harvest.cut_seconds
        return cut + self.windows_seconds + self.harvest.seal_seconds


class Process:
    """One process on a GPU: computes a window while it writes and sends the previous one."""

    def __init__(self, run: "HarvestRun", node: "Node") -> None:
        self.run, self.node = run, node
        self.life = self.held = 0
        self.share: Sequence[int] = ()
        self.todo: deque[int] = deque()
        self.busy = self.blocked = 0.0
        self.stop()

    def stop(self) -> int:
        """Lose the windows in memory; returns their number."""
        held = self.held
        self.life += 1
        self.held, self.computing, self.writing = 0, False, False
        self.computed: deque[int] = deque()
        self.blocked_since: float | None = None
        return held

    def begin(self, windows: Sequence[int]) -> None:
        """Start with these windows: import the package, list the commits, read the text."""
        self.share, self.todo = windows, deque(windows)
        if windows:
            harvest = self.run.harvest
            self.run.clock.after(harvest.constants.start + harvest.text_seconds, self._ask, self.life)

    def _ask(self, life: int) -> None:
        if life == self.life:
            harvest = self.run.harvest
            if harvest.way == SHARES:
                served = self.run.reads.serve(harvest.asks)
            else:  # the first rank lists the commits, and sends the list to the others
                served = harvest.asks / self.run.reads.rate
            self.run.clock.after(max(served, harvest.asking_seconds), self._compute, life)

    def _compute(self, life: int) -> None:
        if life != self.life or self.computing or not self.todo:
            return
        if self.held == WINDOWS_IN_MEMORY:
            self.blocked_since = self.run.clock.now
            return
        if self.blocked_since is not None:
            self.blocked += self.run.clock.now - self.blocked_since
            self.blocked_since = None
        window = self.todo.popleft()
        self.computing, self.held = True, self.held + 1
        rows = len(self.run.layout.row_range(window))
        seconds = rows * self.run.harvest.token_seconds / self.node.speed
        self.run.clock.after(self.run.harvest.commit_seconds + seconds, self._has_computed, life, window, seconds)

    def _has_computed(self, life: int, window: int, seconds: float) -> None:
        if life != self.life:
            return
        self.busy += seconds
        self.computing = False
        self.computed.append(window)
        self._write(life)
        self._compute(life)

    def _write(self, life: int) -> None:
        if life == self.life and not self.writing and self.computed:
            self.writing = True
            seconds = self.run.harvest.writer_seconds / self.node.speed
            self.run.clock.after(self.run.harvest.commit_seconds + seconds, self._send, life, self.computed.popleft())

    def _send(self, life: int, window: int) -> None:
        if life == self.life:
            served = self.run.clock.now + self.run.writes.serve(self.run.harvest.writes)
            self.node.link.send(self.run.harvest.window_bytes, self._sent, life, window, served)

    def _sent(self, life: int, window: int, served: float) -> None:
        """Called when the bytes have arrived. The store then serves the requests, and the commits follow."""
        clock, harvest = self.run.clock, self.run.harvest
        wait = max(harvest.send_seconds, served - clock.now) + harvest.commit_seconds
        clock.after(wait, self._committed, life, window)

    def _committed(self, life: int, window: int) -> None:
        if life == self.life:
            self.writing, self.held = False, self.held - 1
            self.run.commit(window, self)
            self._write(life)
            self._compute(life)


class Node:
    """A node: its processes share its link and its failures."""

    def __init__(self, run: "HarvestRun", speed: float) -> None:
        c = run.harvest.constants
        self.speed, self.life = speed, 0
        self.link = Link(run.clock, c.node_link, THREADS * c.connection)
        self.processes = [Process(run, self) for _ in range(run.harvest.gpus)]


class HarvestRun:
    """Runs a harvest, starting when its text has been cut."""

    def __init__(self, harvest: Harvest, seed: int = 0, fail_after: float | None = None) -> None:
        """`fail_after`: seconds after which a node fails, in addition to random failures."""
        c = harvest.constants
        self.fail_after = fail_after
        self.harvest, self.layout, self.clock = harvest, harvest.layout, Clock()
        self.rng = random.Random(seed)
        self.writes, self.reads = (Server(self.clock, rate * c.partitions) for rate in (c.put_rate, c.get_rate))
        self.nodes = [Node(self, max(0.1, self.rng.gauss(1, c.speed_spread))) for _ in range(harvest.nodes)]
        self.processes = [process for node in self.nodes for process in node.processes]
        self.missing = set(range(self.layout.n_windows))
        self.shares = self._shares()
        self.failures = self.computed_again = 0

    def _shares(self) -> deque[Sequence[int]]:
        """The windows of each task of an array job."""
        if self.harvest.way == RANKS:
            return deque()
        count = self.harvest.shares or self.harvest.processes
        return deque(HarvestShare(number, count).windows(self.layout.n_windows) for number in range(1, count + 1))

    def run(self) -> HarvestResult:
        self._begin_all()
        for node in self.nodes:
            self._plan_failure(node)
        if self.fail_after is not None:
            self.clock.after(self.fail_after, self._fail, self.rng.choice(self.nodes))
        self.clock.run(done=lambda: not self.missing)
        seconds = self.clock.now
        spent = seconds * len(self.processes)
        busy = sum(process.busy for process in self.processes)
        blocked = sum(process.blocked for process in self.processes)
        return HarvestResult(
            self.harvest, seconds, self.failures, self.computed_again, 1 - busy / spent, blocked / spent,
            self.clock.events,
        )  # fmt: skip

    def commit(self, window: int, process: Process) -> None:
        self.missing.discard(window)
        if not process.todo and not process.held and self.shares:  # its task is done: begin the next task
            process.stop()
            process.begin(self.shares.popleft())

    def _begin_all(self) -> None:
        left = sorted(self.missing)
        for number, process in enumerate(self.processes):
            if self.harvest.way == RANKS:
                process.begin(left[number :: len(self.processes)])  # as in harvest/run.py, harvest_ranks
            elif self.shares:
                process.begin(self.shares.popleft())

    def _plan_failure(self, node: Node) -> None:
        if rate := self.harvest.constants.node_failures / 3600:
            self.clock.after(self.rng.expovariate(rate), self._fail, node)

    def _fail(self, node: Node) -> None:
        """If a rank is lost, all ranks of its launcher end; if a task of an array job is lost, the others continue."""
        self.failures += 1
        self._plan_failure(node)
        for one in self.nodes if self.harvest.way == RANKS else [node]:
            one.life += 1
            one.link.drop_all()
            for process in one.processes:
                self.computed_again += process.stop()
            if self.harvest.way == SHARES:
                self.clock.after(self.harvest.constants.restart, self._begin_node, one, one.life)
        if self.harvest.way == RANKS:
            self.clock.after(self.harvest.constants.restart, self._begin_ranks, self.nodes[0].life)

    def _begin_node(self, node: Node, life: int) -> None:
        if life == node.life:
            for process in node.processes:
                process.begin([window for window in process.share if window in self.missing])

    def _begin_ranks(self, life: int) -> None:
        if life == self.nodes[0].life:
            self._begin_all()
