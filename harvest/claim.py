"""Claims decide which of several tasks cuts the text of a harvest into contexts. The other tasks wait for the contexts.

A claim is a record in tokens/. A task creates a claim if there is none, and renews the claim while working. A claim
that has not changed for EXPIRY seconds has expired; the task that creates the claim with the next number continues with
the text. Each task measures this time with its own clock, excluding time during which the task itself was suspended. A
task that was slow but not dead notices the later claim at its next step.
"""

import contextlib
import os
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ..cache.place import FolderPlace, claim_file
from ..common.errors import DamagedError, UnavailableError
from ..common.heartbeat import Silence

RENEW = 10.0  # seconds
EXPIRY = 90.0


class ClaimLost(Exception):  # noqa: N818  (not an error: another task does the work)
    """Another task has claimed the text, because this task seemed to be dead."""


class TextClaim:
    """The claim that this task makes or waits for."""

    def __init__(self, place: FolderPlace, command: str) -> None:
        self.place = place
        self.owner = f"process {os.getpid()} on {socket.gethostname()} ({command})"
        self.task = secrets.token_hex(8)  # distinguishes processes with the same id in two containers
        self.silence = Silence()  # how long the task with the claim has been silent
        self.holder = ""  # the task whose claim this task waits for

    def take(self) -> str | None:
        """Make a claim if there is none or the last one has expired. Returns the file of the new claim, or None while
        another task holds a claim.
        """
        claims = self.place.claim_files()
        number = int(re.findall(r"\d+", claims[-1])[0]) if claims else 0
        if claims:
            record = self.place.read_claim(claims[-1])
            self.holder = str(record["owner"]) if record else ""
            if self.silence.after((claims[-1], record["beat"] if record else -1)) < EXPIRY:
                return None
        file = claim_file(number + 1)
        return file if self.place.create_claim(file, self._record(0)) else None

    def _record(self, beat: int) -> dict[str, Any]:
        return {"owner": self.owner, "task": self.task, "beat": beat}

    @contextlib.contextmanager
    def held(self, file: str) -> Iterator[Callable[[], None]]:
        """Renew the claim during the `with` block; then remove it and all earlier claims, unless the claim was lost.

        Yields a function to call before each step; it raises ClaimLost once another task has claimed the text.
        """
        over = threading.Event()

        def check() -> None:
            if self.place.claim_files()[-1:] != [file]:
                raise ClaimLost

        def renew() -> None:
            beat = 0
            while not over.wait(RENEW):
                with contextlib.suppress(UnavailableError, DamagedError, ClaimLost):  # the disk may be full
                    check()
                    beat += 1
                    self.place.renew_claim(file, self._record(beat))

        thread = threading.Thread(target=renew, daemon=True)
        thread.start()
        try:
            yield check
        finally:
            over.set()
            thread.join()
            claims = self.place.claim_files()
            if claims[-1:] == [file]:
                self.place.remove_claims(reversed(claims))
