"""Assign runs to several processes (ranks).

Runs that read the same batches (a stream) share a pass over the batches if the runs are on the same rank. All that a
shared pass saves is the time to read the batches again. So a stream is divided over several ranks if this makes the
slowest rank finish earlier. Three assignments are compared. The assignment that would be finished earliest is chosen;
among several that would be finished equally early, the one that reads the least:

- each stream as a whole, longest first, goes to the rank that would finish it first;
- all runs, in the order of their streams, are cut into as many pieces as there are ranks;
- each run separately, longest first, goes to the rank that would finish it first. If reading took no time, this would
  take at most a third longer than the best assignment (Graham 1969, "Bounds on multiprocessing timing anomalies": 4/3 -
  1/(3 ranks)).

All ranks are assumed to have the same speed and memory.
"""

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

from ..common.bisection import smallest_bound


class Work(NamedTuple):
    """What a rank trains together: one run, or several runs that read the same stream."""

    runs: tuple[int, ...]  # the numbers of the runs
    stream: Hashable  # the key of the batches that they read
    seconds: float  # time of all steps
    reading: float  # seconds to read the batches once
    part: float = 0.0  # the state of the runs between steps, as a fraction of the memory of a pass

    @property
    def alone(self) -> float:
        """Seconds on a rank that has no other work."""
        return self.seconds + self.reading * passes(self.part)


def passes(part: float) -> int:
    """The number of passes needed for runs that together need `part` times the memory that one pass has."""
    return max(1, math.ceil(part - 1e-9))


class RankShare:
    """The runs that are assigned to a rank."""

    def __init__(self, works: Iterable[Work] = ()) -> None:
        self.runs: list[int] = []
        self.seconds = 0.0  # for steps and for reading
        self.readings = 0  # how many times the batches of a stream are read
        self._streams: dict[Hashable, Work] = {}
        for work in works:
            self.add(work)

    def seconds_with(self, work: Work) -> float:
        """The seconds that this share would take if `work` were added."""
        before = self._streams.get(work.stream)
        if before is None:
            return self.seconds + work.alone
        return self.seconds + merge([before, work]).alone - before.alone

    def add(self, work: Work) -> None:
        before = self._streams.get(work.stream)
        merged = work if before is None else merge([before, work])
        self.seconds = self.seconds_with(work)
        self.readings += passes(merged.part) - (0 if before is None else passes(before.part))
        self._streams[work.stream] = merged
        self.runs += work.runs


def merge(works: Sequence[Work]) -> Work:
    """Combine runs of one stream into one piece of work."""
    return Work(
        tuple(number for work in works for number in work.runs),
        works[0].stream,
        sum(work.seconds for work in works),
        max(work.reading for work in works),
        sum(work.part for work in works),
    )


def deal(works: Sequence[Work], ranks: int) -> list[RankShare]:
    """Assign `works`, each of which is one run, to ranks. Returns a share for each rank, possibly empty."""
    streams = [merge(runs) for runs in by_stream(works)]
    in_order = [run for runs in by_stream(works) for run in longest_first(runs)]
    deals = [to_the_first_done(streams, ranks), cut(in_order, ranks), to_the_first_done(works, ranks)]
    return min(deals, key=lambda shares: (end_of(shares), sum(share.readings for share in shares)))


def end_of(shares: Iterable[RankShare]) -> float:
    """The time when the slowest rank finishes, in seconds from the start.

    Rounded to a microsecond, so that estimates which differ only by rounding errors count as equal.
    """
    return round(max(share.seconds for share in shares), 6)


def by_stream(works: Iterable[Work]) -> list[list[Work]]:
    """The work items grouped by stream, the longest stream first."""
    streams: dict[Hashable, list[Work]] = {}
    for work in works:
        streams.setdefault(work.stream, []).append(work)
    return sorted(streams.values(), key=lambda runs: -merge(runs).alone)


def longest_first(works: Iterable[Work]) -> list[Work]:
    return sorted(works, key=lambda work: -work.alone)


def to_the_first_done(works: Iterable[Work], ranks: int) -> list[RankShare]:
    """Assign each work item, longest first, to the rank that would finish it first."""
    shares = [RankShare() for _ in range(ranks)]
    for work in longest_first(works):
        min(shares, key=lambda share: share.seconds_with(work)).add(work)  # noqa: B023
    return shares


def cut(works: Sequence[Work], ranks: int) -> list[RankShare]:
    """Cut the list of work items, in the given order, so that the longest piece is as short as possible."""
    whole = sum(work.alone for work in works)
    seconds = smallest_bound(0.0, whole, lambda seconds: sum(1 for _ in pieces(works, seconds)) <= ranks)
    shares = list(pieces(works, seconds))
    return shares + [RankShare() for _ in range(ranks - len(shares))]


def pieces(works: Iterable[Work], seconds: float) -> Iterator[RankShare]:
    """Cut the list of work items, in the given order, into shares that each take at most `seconds` if possible."""
    share = RankShare()
    for work in works:
        if share.runs and share.seconds_with(work) > seconds:
            yield share
            share = RankShare()
        share.add(work)
    yield share
