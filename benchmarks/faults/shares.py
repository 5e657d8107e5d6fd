"""Tasks of an array job: `sae harvest --share`, without a launcher."""

import signal
from pathlib import Path

from faults.command import HARVEST, OK, USAGE, Command, Outcome, sae
from faults.inputs import count_commits, same_bytes, wait_until
from faults.table import Matrix


def shares(m: Matrix) -> None:
    m.head("Shares of a harvest (`--share`)")
    out = Path("shares")

    def share(number: int, *, of: int = 2) -> Outcome:
        return sae(*HARVEST, "--out", out, "--share", f"{number}/{of}")

    m.row("`--share 0/2`", share(0), USAGE, "nothing is begun", not out.exists())
    m.row("`--share 3/2`", share(3), USAGE, "nothing is begun", not out.exists())
    first = share(2)
    left = count_commits(out)
    m.row("one of two shares has run", first, OK, f"{left} of 48 commits, and no manifest", left == 24, not sealed(out))
    m.row("... `cache verify`", sae("cache", "verify", out), USAGE, "an unfinished cache is not reported as whole")
    killed = Command(*HARVEST, "--out", out, "--share", "1/2")
    wait_until(killed, lambda: count_commits(out) > left + 3)
    killed.send(signal.SIGKILL)
    outcome = killed.wait()
    safe = count_commits(out)
    m.row(
        "kill -9 of the task of the other share", Outcome(outcome.code, "", "nothing: the process is gone"), -9,
        f"{safe} of 48 commits", left < safe < 48, not sealed(out),
    )  # fmt: skip
    again = share(1)
    m.row(
        "... the same task again",
        again,
        OK,
        "it completes the cache, with the bytes that one process writes",
        sealed(out),
        same(out),
    )
    m.row("a share of a finished cache", share(1), OK, "unchanged", sealed(out), same(out))
    fewer = Path("fewer")
    begun = sae(*HARVEST, "--out", fewer, "--share", "1/3")
    rest = sae(*HARVEST, "--out", fewer)
    m.row(
        "one of three shares has run, then the command without `--share`", rest, OK,
        "it harvests the remaining windows, with the bytes that one process writes", begun.code == OK, same(fewer),
    )  # fmt: skip


def sealed(folder: Path) -> bool:
    return (folder / "manifest.json").exists()


def same(folder: Path) -> bool:
    return same_bytes(folder)
