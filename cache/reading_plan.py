"""What a process reads next from its local folder: the open readings, then the expected ones, as one schedule."""

from collections.abc import Sequence

from .reading import ChunkReading, schedule_of


class ReadingPlan:
    """The reading opened last comes first: the others wait for its end. Not thread-safe."""

    def __init__(self) -> None:
        self.readings: list[ChunkReading] = []
        self.expected: list[ChunkReading] = []
        self.remake()

    def remake(self) -> None:
        """Rebuild the schedule, starting at the current positions of the readings."""
        readings = [*self.readings, *self.expected]
        self.schedule, self.files = schedule_of(readings)
        self.number = {file.name: number for number, file in enumerate(self.files)}
        self._first_step = readings[0].position if readings else 0
        self._known_until = readings[0].known_steps().stop if readings else 0

    @property
    def position(self) -> int:
        """The next step of the schedule to be read."""
        return self.readings[0].position - self._first_step if self.readings else 0

    @property
    def least(self) -> int:
        """The largest number of bytes that one step needs."""
        return max((one.least for one in (*self.readings, *self.expected)), default=0)

    def expect(self, readings: Sequence[ChunkReading]) -> None:
        """Announce the readings that will follow the open ones, in this order."""
        self.expected = list(readings)
        self.remake()

    def begin(self, reading: ChunkReading, expected_until: int | None) -> None:
        """Open a reading, and drop the steps before `expected_until` from the expected readings with the same key."""
        for one in self.expected:
            if expected_until is not None and one.key == reading.key:
                one.position = max(one.position, expected_until)
        self.expected = [one for one in self.expected if one.position < one.steps.stop]
        self.readings.insert(0, reading)
        self.remake()

    def end(self, reading: ChunkReading) -> None:
        """Close a reading."""
        self.readings = [one for one in self.readings if one is not reading]
        self.remake()

    def goes_on(self, reading: ChunkReading) -> bool:
        """Whether a reading has advanced far enough that more of its steps should be added to the schedule."""
        first = bool(self.readings) and reading is self.readings[0]
        return first and reading.known_steps().stop > self._known_until
