"""The local folder for chunks pulled from stores: limited in size, filled ahead of reading, shared by processes.

The order in which chunks are needed is known in advance (chunk_schedule.py), so threads pull chunks ahead. If there is
no room, chunks that no process will read are removed first, then the chunk whose next use is farthest away. Names are
`<cache>/<file of the cache>`. Only chunks of activations are removed; records, tokens and other small files stay, and
count towards the size. shared_folder.py defines the protocol between processes; room.py decides what to pull and
remove. One waiting step is served at a time: otherwise two steps could each occupy the room that the other needs.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from ..common.errors import DamagedError, SaeError
from ..common.files import make_folder, os_error
from ..common.formatting import format_bytes, format_count
from .pulled_files import Arrivals, Contents, contents, default_place, default_size, part_name
from .reading import ChunkReading, ReadingClosed, StoredFile
from .reading_plan import ReadingPlan
from .room import Needs, Room, check_room
from .shared_folder import SharedFolder, Statement, kept_by

PULLS, PULLED_BYTES = 16, 512 << 20  # at the same time; the bytes are in memory until they are verified
TRY_AGAIN = 30.0  # seconds after which a failed pull ahead is tried again; a chunk that a step waits for has no delay
LOOK_AGAIN, LOOK_AGAIN_SOON = 1.0, 0.1  # seconds until the folder is checked again for changes by other processes
SAY_AFTER, SAY_EVERY = 10.0, 60.0  # seconds of waiting until the first message, and between messages

Files = Mapping[str, StoredFile]  # by their names


class LocalFolder:
    """A folder of at most `size` bytes, into which the chunks that readings need are pulled. Threads can share it.

    Do not construct it, but call `local_folder`: a process has only one `LocalFolder` for each folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.size = folder, default_size(folder)
        self.pulled_files = self.pulled_bytes = 0  # by this process
        self.say: Callable[[str], None] = lambda sentence: None  # called when a step has waited for long
        self._shared = SharedFolder(folder)
        self._lock = threading.Lock()
        self._arrived, self._to_decide = threading.Condition(self._lock), threading.Condition(self._lock)
        self._deciding = threading.Lock()  # one thread decides at a time; the others pull or wait
        self._plan = ReadingPlan()
        self._waiting: dict[tuple[ChunkReading, int], Files] = {}  # by (reading, step), in order of arrival
        self._being_read: dict[tuple[ChunkReading, int], Files] = {}
        self._kept: dict[str, StoredFile] = {}  # the files in this process's last statement
        self._ready: frozenset[str] = frozenset()  # kept and complete
        self._pulling: set[str] = set()
        self._verified: set[str] = set()  # of the kept files, by this process
        self._damaged: set[str] = set()  # found damaged by this process, which pulls them again
        self._replaced: set[str] = set()  # found damaged, and pulled again by another process
        self._failed: dict[str, tuple[float, Exception]] = {}  # name -> time and error of the last attempt
        self._free_after = -1  # the step whose end makes room for the next pull; NEVER: nothing to pull
        self._blocked = ""  # the reason why a step has no room, for a message
        self._arrivals = Arrivals()
        self._threads: list[threading.Thread] = []

    # --- what is read ------------------------------------------------------------------------------------------------

    def expect(self, readings: Sequence[ChunkReading]) -> None:
        """Announce the readings that will follow the open ones, in this order. The chunks of these readings are pulled
        ahead or kept, and room for them is reserved until no more readings are expected.
        """
        with self._lock:
            self._plan.expect(readings)
            self._decide_anew()
            self._leave_if_idle()

    def begin(self, reading: ChunkReading, expected_until: int | None = None) -> None:
        """Begin to pull a reading's chunks; drop the steps before `expected_until` from expected readings with its key.

        Raises UsageError if the folder cannot hold the chunks of one step of this reading and of each other process.
        """
        with self._lock:
            with self._shared.mutex():
                others = self._shared.others()
                self._agree_on_size(bool(others))
                least = max(self._plan.least, reading.least)
                reserved = sum(one.least for one in others.values())
                check_room(self.folder, self.size, self._look(others).other, least, reserved)
                self._shared.join(least)
            self._plan.begin(reading, expected_until)
            self._decide_anew()
            self._start_threads()

    def end(self, reading: ChunkReading) -> None:
        """Stop pulling for a reading. Files that are present stay until the room is needed."""
        with self._lock:
            reading.closed = True
            self._plan.end(reading)
            self._decide_anew()
            self._arrived.notify_all()
            self._leave_if_idle()

    def _decide_anew(self) -> None:
        self._free_after = -1
        self._to_decide.notify_all()

    def _leave_if_idle(self) -> None:
        """Unless this process reads, pulls or expects chunks, let other processes remove all those that it keeps."""
        busy = self._plan.readings or self._plan.expected or self._pulling or self._being_read
        if self._shared.owner and not busy:
            with self._shared.mutex():
                self._forget(list(self._kept))
                self._kept, self._ready = {}, frozenset()
                self._shared.leave()

    def wait(self, reading: ChunkReading, step: int, files: Files) -> None:
        """Wait until the files of a step are present and verified, and keep them until `done` is called.

        Raises the error if a pull fails during the wait. A pull that failed before the wait is tried again.
        """
        while True:
            self._wait_for_files(reading, step, files)
            try:
                damaged = {file.name for file in files.values() if not self._is_whole(file)}
            except BaseException:
                self._drop(reading, step)
                raise
            if not damaged:
                return
            with self._lock:
                self._damaged |= damaged - self._verified  # unless pulled again meanwhile
                self._ready -= self._damaged
            self._drop(reading, step)

    def _wait_for_files(self, reading: ChunkReading, step: int, files: Files) -> None:
        """Wait until the files of a step are present and the step counts as being read."""
        started, say_at, key = time.monotonic(), SAY_AFTER, (reading, step)
        with self._lock:
            self._waiting[key] = files
            self._let_read()
            if key in self._waiting:
                for name in files:
                    self._failed.pop(name, None)
                self._to_decide.notify_all()
            try:
                while not reading.closed and key in self._waiting:
                    if failed := next((self._failed.pop(name) for name in files if name in self._failed), None):
                        raise failed[1]
                    self._arrived.wait(LOOK_AGAIN)
                    waited = time.monotonic() - started
                    if waited > say_at:
                        say_at = waited + SAY_EVERY
                        self.say(self._describe_waiting(files.keys() - self._ready, step))
                if reading.closed:
                    raise ReadingClosed
            except BaseException:
                self._waiting.pop(key, None)
                self._being_read.pop(key, None)
                self._to_decide.notify()
                raise

    def _let_read(self) -> None:
        """Let waiting steps begin once all their files exist. Once a step has begun, its files are not removed."""
        for key in [key for key, files in self._waiting.items() if self._ready.issuperset(files)]:
            self._being_read[key] = self._waiting.pop(key)
            self._arrived.notify_all()

    def _is_whole(self, file: StoredFile) -> bool:
        """Whether a file that is being read matches its record. Files pulled by this process are already verified."""
        if file.name not in self._verified:
            try:
                file.source.verify_file(file.file)
            except DamagedError:
                return False
            self._verified.add(file.name)
        return True

    def _drop(self, reading: ChunkReading, step: int) -> None:
        """Stop reading a step."""
        with self._lock:
            del self._being_read[reading, step]
            self._to_decide.notify()
            self._leave_if_idle()

    def done(self, reading: ChunkReading, step: int) -> None:
        """Record that a step has been read, so that files that no later step needs may be removed."""
        with self._lock:
            del self._being_read[reading, step]
            reading.finish(step)
            if self._plan.goes_on(reading):
                self._plan.remake()
                self._decide_anew()
            elif self._blocked or self._plan.position > self._free_after:
                self._to_decide.notify()
            self._leave_if_idle()

    def holds(self, name: str) -> bool:
        """Whether a file is present and is kept because an open step reads it."""
        with self._lock:
            return any(name in names for names in self._being_read.values())

    def _describe_waiting(self, names: Collection[str], step: int) -> str:
        if self._blocked:
            return f"Waiting for room in {self.folder} for a chunk of step {step:,}: {self._blocked}."
        rate = format_bytes(self._arrivals.bytes_per_second())
        files = format_count(len(names), "chunk")
        return f"Waiting for the store: {files} of step {step:,} not yet received; receiving {rate} per second."

    def _needs(self) -> Needs:
        """What this process reads now."""
        now, plan = time.monotonic(), self._plan
        being_read = {name: file for files in self._being_read.values() for name, file in files.items()}
        failed = [name for name, (when, _) in self._failed.items() if now - when < TRY_AGAIN]
        return Needs(
            plan.schedule, plan.files, plan.number, plan.position, plan.least, being_read, *self._first_waiting(),
            self._pulling, self._damaged | self._replaced, failed,
        )  # fmt: skip

    def _first_waiting(self) -> tuple[Files, bool]:
        """The files of the earliest waiting step of the reading that has waited longest, and whether the schedule
        begins with a different reading.
        """
        if not self._waiting:
            return {}, False
        longest = next(iter(self._waiting))[0]
        step = min((key for key in self._waiting if key[0] is longest), key=lambda key: key[1])
        return self._waiting[step], self._plan.readings[:1] != [longest]

    # --- the size ----------------------------------------------------------------------------------------------------

    def _agree_on_size(self, shared: bool) -> None:
        """Processes that share the folder use the same size: the size set by the first process."""
        path = self.folder / ".size"
        with contextlib.suppress(OSError, ValueError):
            if shared:
                self.size = int(path.read_text())
            else:
                path.write_text(str(self.size))

    def check_size(self, readings: Sequence[ChunkReading], processes: int = 1) -> None:
        """Raise UsageError if the folder cannot hold one step of any of these readings for each of `processes`
        processes. Writes nothing.
        """
        least = max((one.least for one in readings), default=0)
        check_room(self.folder, self.size, contents(self.folder).other, least, least * (processes - 1))

    # --- pulling -----------------------------------------------------------------------------------------------------

    def _start_threads(self) -> None:
        largest = int(self._plan.schedule.sizes.max(initial=1))
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
                    except Exception as error:  # raised in waiting threads if the folder is not writable
                        file, patience = None, LOOK_AGAIN
                        self._fail_waiting(error)
                    if file is not None:
                        break
                    self._to_decide.wait(patience)
            self._pull(file)

    def _decide(self) -> tuple[StoredFile | None, float | None]:
        """Make room for the file to pull now: (file, None), or (None, seconds until the next try) if there is none."""
        if not self._plan.readings:
            return None, None
        with self._shared.mutex():
            others = self._shared.others()
            found = self._look(others)
            room = Room(self._needs(), found, others.values(), self.size)
            waiting = len(self._waiting)
            self._keep(room.kept(), found.whole)
            if len(self._waiting) < waiting:  # files of steps that have begun are not removed
                room = Room(self._needs(), found, others.values(), self.size)
            decision = room.next()
            self._free_after, self._blocked = decision.after, ""
            if decision.pull is not None:
                self._reserve(decision.pull, decision.remove)
                return decision.pull, None
            if decision.blocked:
                self._blocked = room.describe()
                if not (room.on_its_way or self._being_read):
                    check_room(self.folder, self.size, found.other, self._plan.least, room.reserved_elsewhere)
            return None, LOOK_AGAIN_SOON if decision.blocked or room.on_its_way - self._pulling else LOOK_AGAIN

    def _fail_waiting(self, error: Exception) -> None:
        self._failed |= {name: (time.monotonic(), error) for files in self._waiting.values() for name in files}
        self._arrived.notify_all()

    def _keep(self, kept: Mapping[str, StoredFile], whole: Collection[str]) -> None:
        """Record which files this process keeps and pulls, and release the steps whose files are all present."""
        self._forget(self._kept.keys() - kept.keys())
        self._ready &= kept.keys()
        self._state(kept)
        self._kept = dict(kept)
        self._ready = frozenset(name for name in kept if name in whole) - self._damaged - self._replaced
        self._let_read()

    def _state(self, kept: Collection[str]) -> None:
        self._shared.state(Statement(frozenset(kept), frozenset(self._pulling), self._plan.least))

    def _forget(self, names: Collection[str]) -> None:
        """Close the maps of chunks that are no longer kept: removing a mapped file frees no space."""
        for name in names:
            file = self._kept[name]
            file.source.forget_chunk(file.file)
            self._verified.discard(name)

    def _reserve(self, file: StoredFile, remove: Collection[str]) -> None:
        """Remove the files in `remove`, and reserve room for a file so that other processes count it as occupied."""
        path = self._part(file.name)
        self._pulling.add(file.name)
        try:
            kept = {name: one for name, one in self._kept.items() if name not in remove} | {file.name: file}
            self._keep(kept, self._ready)
            for name in remove:
                (self.folder / name).unlink(missing_ok=True)
            make_folder(path.parent)
            with path.open("wb") as part:
                part.truncate(file.size)
        except (OSError, SaeError) as error:
            self._pulling.discard(file.name)
            raise (error if isinstance(error, SaeError) else os_error(error, path)) from error

    def _part(self, name: str) -> Path:
        return self.folder / part_name(name, self._shared.owner)

    def _pull(self, file: StoredFile) -> None:
        """Pull a file into reserved room. It appears once complete; after a crash, others remove the partial file."""
        part, failure = self._part(file.name), None
        try:
            data = file.source.fetch_chunk(file.file)
            try:
                with part.open("r+b") as opened:
                    opened.write(data)
            except OSError as error:
                raise os_error(error, part) from error
        except Exception as error:  # raised by `wait`
            failure = error
        with self._lock:
            try:
                with self._shared.mutex():
                    try:
                        if failure is None:
                            part.replace(self.folder / file.name)
                    finally:
                        part.unlink(missing_ok=True)
                        self._pulling.discard(file.name)
                    self._state(self._kept)
            except (OSError, SaeError) as error:
                failure = failure or (os_error(error, part) if isinstance(error, OSError) else error)
            self._pulling.discard(file.name)
            if failure is None:
                self._damaged.discard(file.name)
                self._verified.add(file.name)
                self._ready |= {file.name}  # `_reserve` added the file to `_kept` before the pull
                self.pulled_files, self.pulled_bytes = self.pulled_files + 1, self.pulled_bytes + file.size
                self._arrivals.add(file.size)
                self._let_read()
            else:
                self._failed[file.name] = time.monotonic(), failure
                self._arrived.notify_all()
            self._to_decide.notify_all()
            self._leave_if_idle()

    # --- the folder --------------------------------------------------------------------------------------------------

    def _look(self, others: Mapping[str, Statement]) -> Contents:
        """The files in the folder. Removes part files that no process pulls and damaged files that no process reads."""
        found = contents(self.folder)
        for name, owner in list(found.parts):
            is_own = owner == self._shared.owner
            if name not in self._pulling if is_own else owner not in others:
                (self.folder / part_name(name, owner)).unlink(missing_ok=True)
                del found.parts[name, owner]
        pulled_elsewhere = frozenset().union(*(one.pulling for one in others.values()))
        self._replaced = {name for name in self._replaced | self._damaged if name in pulled_elsewhere}
        self._damaged -= self._replaced
        read = kept_by(others.values()).union(*self._being_read.values())
        for name in self._damaged & found.whole.keys() - read:
            (self.folder / name).unlink(missing_ok=True)
            del found.whole[name]
        return found


OPENED: dict[Path, LocalFolder] = {}


def local_folder(folder: Path | None = None, size: int | None = None) -> LocalFolder:
    """This process's `LocalFolder` at a path (None: the default path), of at most `size` bytes (None: unchanged)."""
    path = (folder or default_place()).resolve()
    if path not in OPENED:
        OPENED[path] = LocalFolder(path)
    if size is not None:
        OPENED[path].size = size
    return OPENED[path]
