"""Which chunks the passes will read from stores: lines of the plan, and a notice to the `LocalFolder` object."""

from collections.abc import Callable, Sequence
from typing import Protocol

from ..cache.batch_order import BatchOrder
from ..cache.concat import ConcatCache
from ..cache.hooks import Hook
from ..cache.object_store import is_url
from ..cache.pull_plan import plan_pulls
from ..cache.reader import Cache
from ..cache.reading import ChunkReading, batch_reading
from ..cache.room import OTHER_DISK, room_for
from ..common.errors import UnavailableError
from ..common.files import free_space
from ..common.formatting import format_bytes, format_count
from ..common.process_group import processes_on_this_machine
from .sources import AnyCache, places_of
from .variant import RunConfig

CALIBRATION_BATCHES = 32  # number of batches that a run reads after its last step if a mechanism has to be calibrated


class ReadingRun(Protocol):
    """A run that reads batches. `plan.Run` implements this."""

    @property
    def cache(self) -> AnyCache: ...
    @property
    def hook(self) -> Hook: ...
    @property
    def shuffle_seed(self) -> int: ...
    @property
    def config(self) -> RunConfig: ...


def expected_readings(passes: Sequence[Sequence[ReadingRun]]) -> list[ChunkReading]:
    """What each pass reads from stores, from its first step on, in the order of the passes."""
    readings = []
    for runs in passes:
        cache, config = runs[0].cache, runs[0].config
        if isinstance(cache, Cache | ConcatCache):
            order = BatchOrder(cache.chunk_rows, config.batch_size, runs[0].shuffle_seed)
            steps = range(max(run.config.steps for run in runs) + CALIBRATION_BATCHES)
            readings.append(batch_reading(cache, runs[0].hook.array, order, steps))
    return [reading for reading in readings if reading is not None]


def prepare_local_folder(passes: Sequence[Sequence[ReadingRun]], size: int | None) -> None:
    """Set the size of the local folder if the passes need a local folder.

    Raises UsageError if the size is too small for one batch per process on this machine, and UnavailableError if it
    does not fit on the disk.
    """
    if readings := expected_readings(passes):
        local = readings[0].folder
        local.size = size or local.size
        processes = min(processes_on_this_machine(), sum(map(len, passes)))
        local.check_size(readings, processes)
        pulls, free = plan_pulls(local.folder, local.size, readings), free_space(local.folder)
        if (grows := min(pulls.bytes_missing, local.size - pulls.held)) > free:
            least = room_for(processes * max(one.least for one in readings))
            smaller = f"give --local-cache {format_bytes(least)} or more, within the free space, or {OTHER_DISK}"
            raise UnavailableError(
                f"{local.folder} will grow by {format_bytes(grows)}, but its disk has only {format_bytes(free)} free: "
                + (smaller if least <= free else OTHER_DISK)
            )


def describe_pulling(passes: Sequence[Sequence[ReadingRun]]) -> list[str]:
    """The plan's lines about the chunks that are pulled from stores; an empty list if none are pulled."""
    if not (readings := expected_readings(passes)):
        return []
    local = readings[0].folder
    pulls = plan_pulls(local.folder, local.size, readings)
    places = dict.fromkeys(place for runs in passes for place in places_of(runs[0].cache) if is_url(place))
    again = f"; {format_count(pulls.pulled_again, 'chunk')} of them more than once" if pulls.pulled_again > 0 else ""
    return [
        f"store    {format_bytes(pulls.bytes_to_pull)} to pull from {', '.join(places)} in "
        f"{format_count(int(pulls.counts.sum()), 'request')}{again}; "
        f"{format_bytes(pulls.bytes_present)} are already on the disk",
        f"local    {local.folder} keeps at most {format_bytes(local.size)} (--local-cache)",
    ]


def expect(passes: Sequence[Sequence[ReadingRun]], say: Callable[[str], None]) -> None:
    """Tell the `LocalFolder` object what these passes will read from stores.

    It calls `say` when a step has waited for its chunks for a long time.
    """
    if readings := expected_readings(passes):
        readings[0].folder.say = say
        readings[0].folder.expect(readings)


def expect_nothing(passes: Sequence[Sequence[ReadingRun]]) -> None:
    """Tell the local folder, if there is one, that the passes are done, so that other processes can use its space."""
    if readings := expected_readings(passes):
        readings[0].folder.expect([])
