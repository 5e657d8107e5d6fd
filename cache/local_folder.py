"""The local folder for chunks of caches in stores: of bounded size, filled ahead of who reads, shared by processes.

Which chunks are needed when is known beforehand (chunk_schedule.py), so threads pull them ahead, and where there is no
room the chunk whose next need is farthest is removed. What no process reads any more goes first. Names are
`<cache>/<file of the cache>`; files that are being pulled end in ".part". Only the chunks of activations come and go:
records, tokens and other small files stay, and count.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..common.errors import DamagedError, SaeError, UsageError
from ..common.files import make_folder, os_error
from ..common.formatting import format_bytes, format_count
from .chunk_schedule import NEVER, ChunkSchedule
from .pulled_files import PART, Arrivals, Contents, contents, default_place, default_size
from .reading import ChunkReading, ReadingClosed, StoredFile, schedule_of
from .shared_folder import SharedFolder, Statement, union

PULLS, PULLED_BYTES = 16, 512 << 20  # at the same time; the bytes are in memory until they are verified
TRY_AGAIN = 30.0  # seconds after which what could not be pulled ahead is tried again; what is needed, at once
LOOK_AGAIN, LOOK_AGAIN_SOON = 1.0, 0.1  # seconds until the folder is looked at again, for what other processes did
SAY_AFTER, SAY_EVERY = 10.0, 60.0  # seconds of waiting


class LocalFolder:
    """Pulls the chunks that readings need into a folder of at most `size` bytes. Threads can share it.

    Get it from `local_folder`: a process has one object for each folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.size = folder, default_size(folder)
        self.pulled_files = self.pulled_bytes = 0  # by this process
        self.say: Callable[[str], None] = lambda sentence: None  # called when a step has to wait for long
        self._shared = SharedFolder(folder)
        self._lock = threading.Lock()
        self._arrived, self._to_decide = threading.Condition(self._lock), threading.Condition(self._lock)
        self._deciding = threading.Lock()  # one thread decides at a time; the others pull, or wait for their turn
        self._readings: list[ChunkReading] = []  # the one opened last comes first: the others wait for its end
        self._expected: list[ChunkReading] = []
        self._schedule, self._files = (
            ChunkSchedule(np.empty((0, 3), np.int64), np.empty(0, np.int64)),
            list[StoredFile](),
        )
        self._number: dict[str, int] = {}  # name -> its number in the schedule
        self._first_step = 0  # of the first reading, where the schedule begins
        self._pinned: dict[str, StoredFile] = {}
        self._ready: frozenset[str] = frozenset()  # pinned and whole
        self._pulling: set[str] = set()
        self._in_use: dict[tuple[ChunkReading, int], Mapping[str, StoredFile]] = {}  # (reading, step) -> files
        self._verified: set[str] = set()  # of the pinned files, by this process
        self._failed: dict[str, tuple[float, Exception]] = {}  # name -> when and how pulling it ended
        self._free_after = -1  # the step whose end makes room for the next pull; NEVER: nothing is to be pulled
        self._arrivals = Arrivals()
        self._known_until = 0  # the step of the first reading up to which the schedule goes
        self._threads: list[threading.Thread] = []

    # --- what is read ------------------------------------------------------------------------------------------------

    def expect(self, readings: Sequence[ChunkReading]) -> None:
        """Name what will be read after the open readings, in this order: it is pulled ahead, or kept."""
        with self._lock:
            self._expected = list(readings)
            self._plan()

    def begin(self, reading: ChunkReading, expected_until: int | None = None) -> None:
        """Begin to pull for a reading. Of the expected readings with its key, the steps up to a number are then done.

        Raises UsageError if the folder is too small for one of its steps.
        """
        with self._lock:
            with self._shared.mutex():
                self._shared.join()
                others = self._shared.others()
                self._agree_on_size(bool(others))
                small = self._look(union(others)).other
            try:
                self._check_size([reading], small, 1 + len(others))
            except UsageError:
                self._leave()
                raise
            for one in self._expected:
                if expected_until is not None and one.key == reading.key:
                    one.position = max(one.position, expected_until)
            self._expected = [one for one in self._expected if one.position < one.steps.stop]
            self._readings.insert(0, reading)
            self._plan()
            self._start_threads()

    def end(self, reading: ChunkReading) -> None:
        """Pull no further for a reading. What is there stays until the room is needed."""
        with self._lock:
            reading.closed = True
            self._readings = [one for one in self._readings if one is not reading]
            self._plan()
            self._arrived.notify_all()
            self._leave()

    def _leave(self) -> None:
        """Let the others remove everything, unless something is being read."""
        if not self._readings:
            with self._shared.mutex():
                self._set_pins({}, ())
                self._shared.leave()

    def wait(self, reading: ChunkReading, step: int, files: Mapping[str, StoredFile]) -> None:
        """Wait until the files of a step are there and verified, and keep them until `done`.

        Raises what pulling one of them raised. An earlier failure to pull one does not count: it is tried again.
        """
        with self._lock:
            self._in_use[reading, step] = files
        try:
            self._wait_for(reading, step, files.keys())
            while damaged := [file.name for file in files.values() if not self._is_whole(file)]:
                with self._lock, self._shared.mutex():
                    self._remove(damaged)
                self._wait_for(reading, step, files.keys())
        except BaseException:
            with self._lock:
                del self._in_use[reading, step]
            raise

    def _wait_for(self, reading: ChunkReading, step: int, names: Collection[str]) -> None:
        started, say_at = time.monotonic(), SAY_AFTER
        with self._lock:
            if not self._ready.issuperset(names):
                for name in names:
                    self._failed.pop(name, None)
                self._to_decide.notify_all()
            while not reading.closed and not self._ready.issuperset(names):
                if failed := next((self._failed.pop(name) for name in names if name in self._failed), None):
                    raise failed[1]
                self._arrived.wait(LOOK_AGAIN)
                waited = time.monotonic() - started
                if waited > say_at:
                    say_at = waited + SAY_EVERY
                    self.say(self._describe_waiting(set(names) - self._ready, step))
            if reading.closed:
                raise ReadingClosed

    def _is_whole(self, file: StoredFile) -> bool:
        """Whether a file that is in use is the one that its cache lists. What this process pulled is."""
        if file.name not in self._verified:
            try:
                file.source.verify_file(file.file)
            except DamagedError:
                return False
            self._verified.add(file.name)
        return True

    def done(self, reading: ChunkReading, step: int) -> None:
        """Note that a step is read: what no later step needs may be removed."""
        with self._lock:
            del self._in_use[reading, step]
            reading.finish(step)
            if self._readings and reading is self._readings[0]:
                known = reading.known_steps()
                if known.stop > self._known_until:
                    self._plan()
                elif self._position > self._free_after:
                    self._to_decide.notify()

    def holds(self, name: str) -> bool:
        """Whether a file is there and in use by a step that is open."""
        with self._lock:
            return name in self._ready and any(name in names for names in self._in_use.values())

    def _describe_waiting(self, names: Collection[str], step: int) -> str:
        rate = format_bytes(self._arrivals.bytes_per_second())
        files = format_count(len(names), "chunk")
        return f"Waiting for the store: {files} of step {step:,} are still to come; {rate} arrive per second."

    # --- the plan ----------------------------------------------------------------------------------------------------

    @property
    def _position(self) -> int:
        """The step of the schedule that is read next."""
        return self._readings[0].position - self._first_step if self._readings else 0

    def _plan(self) -> None:
        """Make the schedule anew: the open readings, then what is expected."""
        readings = [*self._readings, *self._expected]
        self._schedule, self._files = schedule_of(readings)
        self._number = {file.name: number for number, file in enumerate(self._files)}
        self._first_step = readings[0].position if readings else 0
        self._known_until = readings[0].known_steps().stop if readings else 0
        self._free_after = -1
        self._to_decide.notify_all()

    def _agree_on_size(self, shared: bool) -> None:
        """The processes that share the folder have one size: that of the first."""
        path = self.folder / ".size"
        with contextlib.suppress(OSError, ValueError):
            if shared:
                self.size = int(path.read_text())
            else:
                path.write_text(str(self.size))

    def check_size(self, readings: Sequence[ChunkReading]) -> None:
        """Raise UsageError if the folder is too small for a step of one of the readings. Writes nothing."""
        self._check_size(readings, contents(self.folder).other, 1)

    def _check_size(self, readings: Sequence[ChunkReading], small: int, processes: int) -> None:
        least = max((schedule_of([reading])[0].most_at_once() for reading in readings), default=0)
        if (self.size - small) // processes < least:
            shared = f", {processes} processes share the folder" if processes > 1 else ""
            needed = format_bytes(1.005 * (least * processes + small) + 1e5)  # so that it is enough when rounded
            raise UsageError(
                f"--local-cache {format_bytes(self.size)} is too small: one step reads chunks of {format_bytes(least)}"
                f"{shared}, and {format_bytes(small)} of {self.folder} are other files. Give --local-cache {needed} or "
                "more; what is more is read ahead."
            )

    # --- pulling -----------------------------------------------------------------------------------------------------

    def _start_threads(self) -> None:
        largest = int(self._schedule.sizes.max(initial=1))
        count = min(PULLS, max(1, PULLED_BYTES // largest))
        for _ in range(count - len(self._threads)):
            self._threads.append(threading.Thread(target=self._work, daemon=True))
            self._threads[-1].start()

    def _work(self) -> None:
        while True:
            with self._deciding, self._lock:
                while True:
                    try:
                        file, patience = self._decide()
                    except Exception as error:  # the folder cannot be written: whoever waits is told
                        file, patience = None, LOOK_AGAIN
                        self._failed |= {n: (time.monotonic(), error) for names in self._in_use.values() for n in names}
                        self._arrived.notify_all()
                    if file is not None:
                        break
                    self._to_decide.wait(patience)
            self._pull(file)

    def _decide(self) -> tuple[StoredFile | None, float | None]:
        """The file to pull now, for which room has been made; or None and how long to wait before looking again."""
        if not self._readings:
            return None, None
        with self._shared.mutex():
            others = self._shared.others()
            read_elsewhere = union(others)
            found = self._look(read_elsewhere)
            self._keep(found, 1 + len(others))
            present = np.zeros(len(self._files), bool)
            for name in (*found.whole, *found.parts):
                if name in self._number:
                    present[self._number[name]] = True
            kept, unneeded = np.zeros_like(present), 0
            for name in found.whole:
                if name not in self._number:
                    unneeded += 0 if name in read_elsewhere.pinned else found.whole[name]
                elif name in read_elsewhere.pinned or name in self._pulling:
                    kept[self._number[name]] = True
            for name in found.parts:
                if name in self._number:
                    kept[self._number[name]] = True
            free = self.size - found.other - sum(found.whole.values()) - sum(found.parts.values())
            for name, (when, _) in self._failed.items():
                if name in self._number and time.monotonic() - when < TRY_AGAIN:
                    present[self._number[name]] = True
            pull = self._schedule.next_pull(self._position, present, kept, free + unneeded)
            is_pulled_elsewhere = bool(found.parts.keys() - self._pulling)
            patience = LOOK_AGAIN_SOON if is_pulled_elsewhere else LOOK_AGAIN
            if pull is None or not self._fits(pull.file, pull.needed, present, found.other, 1 + len(others)):
                needs = self._schedule.next_use(np.flatnonzero(~present), self._position)
                self._free_after = self._position if (needs < NEVER).any() else NEVER
                return None, patience
            if pull.after >= self._position:
                self._free_after = pull.after
                return None, patience
            file = self._files[pull.file]
            self._remove([self._files[number].name for number in pull.evict])
            free += sum(self._files[number].size for number in pull.evict)
            self._make_room(file.size - free, found, read_elsewhere)
            self._reserve(file)
            return file, None

    def _fits(self, file: int, needed: int, present: np.ndarray, other: int, processes: int) -> bool:
        """Whether this process may hold a file with all that it needs before: each process has an equal share."""
        before = present & (self._schedule.next_use(np.arange(len(present)), self._position) <= needed)
        share = (self.size - other) // processes
        return int(self._schedule.sizes[before].sum() + self._schedule.sizes[file]) <= share or needed <= self._position

    def _keep(self, found: Contents, processes: int) -> None:
        """Pin what is there and needed, the earliest need first, as far as this process's share goes."""
        there = np.array([n for name in (*found.whole, *found.parts) if (n := self._number.get(name)) is not None], int)
        needs = self._schedule.next_use(there, self._position)
        there = there[np.argsort(needs, kind="stable")][: int((needs < NEVER).sum())]
        share = (self.size - found.other) // processes
        kept = there[np.cumsum(self._schedule.sizes[there]) <= share]
        pinned = {self._files[number].name: self._files[number] for number in kept.tolist()}
        for files in self._in_use.values():
            pinned |= {name: file for name, file in files.items() if name in found.whole}
        self._set_pins(pinned, found.whole)

    def _set_pins(self, pinned: dict[str, StoredFile], whole: Collection[str]) -> None:
        for name in self._pinned.keys() - pinned.keys():  # from now on it can be removed, and pulled by others
            file = self._pinned[name]
            file.source.forget_chunk(file.file)  # as long as it is mapped, removing it frees no space
            self._verified.discard(name)
        self._pinned = pinned
        self._shared.state(Statement(frozenset(pinned), frozenset(self._pulling)))
        ready = frozenset(name for name in pinned if name in whole)
        if ready != self._ready:
            self._ready = ready
            self._arrived.notify_all()

    def _remove(self, names: Collection[str]) -> None:
        pinned = {name: file for name, file in self._pinned.items() if name not in names}
        self._set_pins(pinned, self._ready)
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).unlink()

    def _make_room(self, missing: int, found: Contents, read_elsewhere: Statement) -> None:
        """Remove chunks that no process needs, of other arrays and caches, until `missing` bytes are free."""
        names = [name for name in found.whole if name not in self._number and name not in read_elsewhere.pinned]
        for name in names:
            if missing <= 0:
                break
            missing -= found.whole[name]
            (self.folder / name).unlink(missing_ok=True)

    def _reserve(self, file: StoredFile) -> None:
        """Take the room for a file, for the others to see."""
        path = self._part(file.name)
        self._pulling.add(file.name)
        try:
            make_folder(path.parent)
            with path.open("wb") as part:
                part.truncate(file.size)
            self._shared.state(Statement(frozenset(self._pinned), frozenset(self._pulling)))
        except (OSError, SaeError) as error:
            self._pulling.discard(file.name)
            raise (error if isinstance(error, SaeError) else os_error(error, path)) from error

    def _part(self, name: str) -> Path:
        return self.folder / f"{name}{PART}"

    def _pull(self, file: StoredFile) -> None:
        """Pull a file for which there is room. It appears whole; a kill leaves a part, which others remove."""
        part, failure = self._part(file.name), None
        try:
            data = file.source.fetch_chunk(file.file)
            try:
                with part.open("r+b") as opened:
                    opened.write(data)
                with self._lock, self._shared.mutex():  # or whoever looks might see neither name
                    part.replace(self.folder / file.name)
            except OSError as error:
                raise os_error(error, self.folder / file.name) from error
        except Exception as error:  # raised by `wait`
            failure = error
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        with self._lock:
            self._pulling.discard(file.name)
            if failure is None:
                self._verified.add(file.name)
                self.pulled_files, self.pulled_bytes = self.pulled_files + 1, self.pulled_bytes + file.size
                self._arrivals.add(file.size)
            else:
                self._failed[file.name] = time.monotonic(), failure
                self._arrived.notify_all()
            self._to_decide.notify_all()

    # --- the folder --------------------------------------------------------------------------------------------------

    def _look(self, read_elsewhere: Statement) -> Contents:
        """What the folder holds now. Removes the parts that nobody is pulling any more."""
        found = contents(self.folder)
        for name in found.parts.keys() - self._pulling - read_elsewhere.pulling:
            self._part(name).unlink(missing_ok=True)
            del found.parts[name]
        return found


OPENED: dict[Path, LocalFolder] = {}


def local_folder(folder: Path | None = None, size: int | None = None) -> LocalFolder:
    """The local folder of this process at a path, of at most `size` bytes. None: the default, or what it was before."""
    path = (folder or default_place()).resolve()
    if path not in OPENED:
        OPENED[path] = LocalFolder(path)
    if size is not None:
        OPENED[path].size = size
    return OPENED[path]
