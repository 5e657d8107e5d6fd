"""CUDA streams and events as queues of jobs. Jobs run as late as possible: when something waits for them.

On a GPU a job runs at some time between being queued and being waited for. A missing wait shows only where the job runs
late, so here it always does. An eager stream, such as the default stream of the simulated GPU, does the opposite: its
operations compute when they are called. `hurries` decides for each job whether it and those before it run at once.
"""

import threading
from collections.abc import Callable
from types import TracebackType

Job = Callable[[], object]
_lock = threading.RLock()  # a thread of the loader drains a stream while the caller queues on it
captured: "list[Stream]" = []  # the streams of the graph that is being captured; see graphs.py


class Stream:
    def __init__(self, device: object = None, *, eager: bool = False, **_: object) -> None:
        self.device = device
        self.hurries: Callable[[], bool] = lambda: eager
        self.jobs: list[Job] = []
        self.done = 0

    def push(self, job: Job) -> None:
        with _lock:
            self.jobs.append(job)
            if self.hurries():
                self.drain(len(self.jobs))

    def drain(self, until: int) -> None:
        """Run the jobs before number `until`."""
        with _lock:
            while self.done < until:
                job, self.jobs[self.done] = self.jobs[self.done], lambda: None  # the list no longer holds its tensors
                self.done += 1
                job()

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        if event.stream in captured and self not in captured:
            captured.append(self)
        self.push(event.synchronize)

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self.drain(len(self.jobs))

    def query(self) -> bool:
        return self.done == len(self.jobs)

    def is_capturing(self) -> bool:
        return self in captured


class Event:
    def __init__(self, *_: object, **__: object) -> None:
        self.stream: Stream | None = None
        self.until = 0

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or current_stream()
        self.until = len(self.stream.jobs)

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.drain(self.until)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def query(self) -> bool:
        return self.stream is None or self.stream.done >= self.until

    def elapsed_time(self, _: "Event") -> float:
        raise NotImplementedError("the simulated GPU measures nothing")


class use_stream:  # noqa: N801  (in the place of torch.cuda.stream)
    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        if self.stream is not None:
            _of_thread.used = [*used_streams(), self.stream]

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self.stream is not None:
            _of_thread.used = used_streams()[:-1]


DEFAULT = Stream(eager=True)
_of_thread = threading.local()


def used_streams() -> list[Stream]:
    return getattr(_of_thread, "used", [DEFAULT])


def current_stream(device: object = None) -> Stream:
    return used_streams()[-1]
