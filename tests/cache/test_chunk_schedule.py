"""The schedule of reading from a store: as few pulls as the local folder allows, never more bytes than it holds."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.cache.batch_order import BatchOrder
from sae.cache.chunk_schedule import NEVER, ChunkSchedule


def schedule_of(steps: list[set[int]], sizes: list[int]) -> ChunkSchedule:
    """Build the schedule of steps that each need a set of files."""
    uses = [(file, step, step) for step, files in enumerate(steps) for file in files]
    return ChunkSchedule(np.array(uses, np.int64).reshape(-1, 3), np.array(sizes))


def fewest_pulls(steps: list[set[int]], capacity: int) -> int:
    """Find the smallest number of pulls of files of equal size by trying every choice of files to keep."""
    states = {frozenset(): 0}  # files that are held -> fewest pulls so far
    for needed in steps:
        following: dict[frozenset[int], int] = {}
        for held, pulls in states.items():
            others = sorted(held - needed)
            for count in range(min(len(others), capacity - len(needed)) + 1):
                for kept in itertools.combinations(others, count):
                    state = frozenset(needed | set(kept))
                    cost = pulls + len(needed - held)
                    following[state] = min(following.get(state, cost), cost)
        states = following
    return min(states.values())


def read_all(schedule: ChunkSchedule, capacity: int, steps: int, in_flight: int = 2) -> np.ndarray:
    """Read all steps, pulling ahead as far as the schedule allows, and return how often each file was pulled.

    Asserts that the files never exceed the capacity, and that each step finds the files that it needs.
    """
    present, pulls = np.zeros(len(schedule.sizes), bool), np.zeros(len(schedule.sizes), np.int64)
    kept, arriving = np.zeros_like(present), []
    for position in range(steps):
        while True:
            pull = None
            if len(arriving) < in_flight:
                pull = schedule.next_pull(position, present, kept, capacity - int(schedule.sizes[present].sum()))
            if pull is not None and pull.after < position:
                assert not set(pull.evict) & set(schedule.needed_at(position).tolist())
                present[pull.evict] = False
                present[pull.file] = True
                pulls[pull.file] += 1
                arriving = [file for file in arriving if file not in pull.evict] + [pull.file]
                assert schedule.sizes[present].sum() <= capacity
            elif arriving:
                arriving.pop(0)
            else:
                break
        assert present[schedule.needed_at(position)].all()
    return pulls


step_lists = st.lists(st.sets(st.integers(0, 4), max_size=3), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(step_lists, st.integers(3, 5), st.integers(1, 3))
def test_no_other_choice_pulls_fewer_files(steps: list[set[int]], capacity: int, in_flight: int) -> None:
    schedule = schedule_of(steps, [1] * 5)
    fewest = fewest_pulls(steps, capacity)
    assert read_all(schedule, capacity, len(steps), in_flight).sum() == fewest
    assert schedule.pulled(np.zeros(5, bool), capacity).sum() == fewest


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=10), st.integers(1, 40), st.integers(0, 99), st.integers(0, 30),
    st.integers(1, 60), st.floats(0, 1), st.booleans(),
)  # fmt: skip
def test_every_batch_finds_its_chunks_within_the_size(
    chunks: list[int], batch_size: int, seed: int, start: int, count: int, share: float, equal: bool
) -> None:
    batch_size = min(batch_size, sum(chunks))
    order = BatchOrder(chunks, batch_size, seed)
    sizes = np.full(len(chunks), 7) if equal else np.array(chunks)
    uses = order.uses(range(start, start + count))
    schedule = ChunkSchedule(uses - [0, start, start], sizes)
    for step in range(count):
        assert set(schedule.needed_at(step).tolist()) == {span.chunk for span in order.spans(start + step)}
    least = schedule.most_at_once()
    assert least == max(sizes[schedule.needed_at(step)].sum() for step in range(count))
    capacity = least + int(share * (sizes.sum() - least))
    pulls = read_all(schedule, capacity, count)
    if equal:
        assert pulls.sum() == schedule.pulled(np.zeros(len(chunks), bool), capacity).sum()
    if capacity == sizes.sum():
        assert pulls.max() <= 1


def test_a_file_that_is_there_is_not_pulled_and_what_another_process_reads_is_kept() -> None:
    schedule = schedule_of([{0}, {1}, {2}, {0}], [1] * 3)
    assert schedule.pulled(np.array([True, False, False]), 2).tolist() == [0, 1, 1]
    present, kept = np.array([True, True, False]), np.array([False, True, False])
    pull = schedule.next_pull(2, present, np.zeros(3, bool), 0)
    assert pull is not None and (pull.file, pull.needed, pull.evict, pull.after) == (2, 2, [1], -1)
    pull = schedule.next_pull(2, present, kept, 0)
    assert pull is not None and pull.evict == [0]
    assert schedule.next_pull(2, present, present, 0) is None
    assert schedule.next_pull(2, np.array([True, True, True]), kept, 0) is None


def test_room_is_made_when_the_file_that_makes_it_has_been_read() -> None:
    schedule = schedule_of([{0}, {1}, {2}, {1}], [1] * 3)
    pull = schedule.next_pull(0, np.array([True, True, False]), np.zeros(3, bool), 0)
    assert pull is not None and (pull.evict, pull.after) == ([0], 0)  # file 1 is needed again, file 0 is not


@pytest.mark.parametrize("step", [0, 1, 2, 5, 7])
def test_next_and_last_use(step: int) -> None:
    steps = [{0, 1}, {1}, {0}, set(), {2}, {1, 2}]
    schedule = schedule_of(steps, [1] * 4)
    for file in range(4):
        used = [n for n, files in enumerate(steps) if file in files]
        assert schedule.next_use(np.array([file]), step) == min([n for n in used if n >= step], default=NEVER)
        assert schedule.last_use(np.array([file]), step) == max([n for n in used if n < step], default=-1)


def test_nothing_is_needed_of_an_empty_schedule() -> None:
    schedule = schedule_of([set()], [1, 1])
    assert schedule.next_pull(0, np.zeros(2, bool), np.zeros(2, bool), 0) is None
    assert schedule.most_at_once() == 0 and schedule.pulled(np.zeros(2, bool), 0).sum() == 0
    assert (schedule.next_use(np.arange(2), 0) == NEVER).all() and (schedule.last_use(np.arange(2), 1) == -1).all()
