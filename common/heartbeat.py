"""Watch which of the launched processes still run, so that none waits forever for a dead one.

Each process raises a counter in torch's key-value store every few seconds. The store is in the launcher (torchrun) or
in rank 0 (srun, mpirun). When a process dies, the launcher usually ends the others. This module is for launchers that
do not, and for machines that vanish without closing their connections. For a process on the same machine, the operating
system shows at once whether it runs.
"""

import math
import os
import socket
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from .errors import UnavailableError

BEAT = 5.0  # seconds between two beats
PATIENCE = 120.0  # seconds without a beat after which a process counts as dead
START = 600.0  # seconds that a process may take to start
FAREWELL = 1.0  # seconds that rank 0 stays alive so that the others, which check five times a second, see a death too
GAP = 5.0  # upper limit of the seconds counted between two checks; a suspended process receives no heartbeats
AGAIN = "Everything committed is safe; run the same command again, with any number of processes."


class Silence:
    """Measures for how long another process has given no new sign of life.

    Time in which this process or its machine was suspended is not counted, because the other process may have been
    suspended too.
    """

    def __init__(self) -> None:
        self.last: object = None
        self.seconds, self.looked = 0.0, -math.inf

    def after(self, sign: object) -> float:
        """The seconds since the sign of life last changed. Call this method at least every GAP seconds."""
        now = time.monotonic()
        if sign != self.last:
            self.last, self.seconds, self.looked = sign, 0.0, now
        self.seconds += min(now - self.looked, GAP)
        self.looked = now
        return self.seconds


class Heartbeat:
    """Sends the heartbeats of this process, number `rank` of `count`, and watches the heartbeats of the others."""

    def __init__(self, store: Any, rank: int, count: int) -> None:
        self.store, self.rank, self.count = store, rank, count
        self.started, self.steps = time.monotonic(), 0
        self.silences: dict[int, Silence] = defaultdict(Silence)  # of the other ranks
        self.machine = pid_namespace()
        store.set(f"sae/machine/{rank}", f"{self.machine} {os.getpid()}")
        store.set(f"sae/name/{rank}", f"process {os.getpid()} on {socket.gethostname()}")
        threading.Thread(target=self._beat, args=(store.clone(),), daemon=True).start()

    def _beat(self, store: Any) -> None:
        while True:
            try:
                store.add(f"sae/beat/{self.rank}", 1)
            except RuntimeError:  # the store is gone, which `meet` reports
                return
            time.sleep(BEAT)

    def meet(self) -> None:
        """Wait until every process has called this method as often as this process has. Ctrl-C ends the wait.

        Raises UnavailableError, naming the processes, if some have ended or have not started.
        """
        self.steps += 1
        dead: dict[int, str] = {}  # rank -> a sentence
        try:
            self.store.set(f"sae/met/{self.steps}/{self.rank}", "")
            pause = 0.001
            while away := [r for r in range(self.count) if not self.store.check([f"sae/met/{self.steps}/{r}"])]:
                dead |= {rank: sentence for rank in away if (sentence := self._find_dead(rank))}
                # The store may vanish when rank 0 ends. So rank 0 waits until every missing process is dead, and then
                # for FAREWELL seconds, in which the other ranks find this out too.
                if dead and (self.rank or dead.keys() >= set(away)):
                    time.sleep(0 if self.rank else FAREWELL)
                    raise UnavailableError(f"{dead[min(dead)]} {AGAIN}")
                time.sleep(pause)
                pause = min(2 * pause, 0.2)
        except RuntimeError as error:
            raise UnavailableError(
                f"Rank 0 of {self.count}, or the launcher on its machine "
                f"({os.environ.get('MASTER_ADDR', 'MASTER_ADDR')}), no longer answers. {AGAIN}"
            ) from error

    def _find_dead(self, rank: int) -> str:
        """Check on process `rank`, which `meet` waits for. Returns "" if it may still arrive, or a sentence that says
        that it did not start in time, has ended or was silent for too long.
        """
        now, name = time.monotonic(), f"sae/name/{rank}"
        if not self.store.check([name]):
            late = now - self.started > START
            return f"Rank {rank} of {self.count} has not started in {START:g} s." if late else ""
        who = f"Rank {rank} of {self.count} ({self.store.get(name).decode()})"
        machine, process = self.store.get(f"sae/machine/{rank}").decode().rsplit(" ", 1)
        if machine and machine == self.machine and has_ended(int(process)):
            # The process may have arrived, and ended normally, between the two checks.
            return "" if self.store.check([f"sae/met/{self.steps}/{rank}"]) else f"{who} has ended."
        if self.silences[rank].after(self.store.add(f"sae/beat/{rank}", 0)) > PATIENCE:
            return f"{who} no longer runs: it has been silent for {PATIENCE:g} s."
        return ""


def pid_namespace() -> str:
    """An identifier of the machine or container that assigns the process ids; "" if it is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def has_ended(process: int) -> bool:
    """Whether a process on this machine has ended, even if its parent has not noticed yet."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return not Path(f"/proc/{process}").exists()
    return state in "ZX"
