"""The rows of the table of faults, and the faults that broke a rule."""

import os
import re

from faults.command import BROKEN_PIPE, OK, Outcome


class Matrix:
    """The rows of the table, and the faults that broke a rule."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str, str]] = []
        self.broken: list[str] = []

    def head(self, title: str) -> None:
        self.rows.append((title, "", "", ""))

    def row(self, fault: str, outcome: Outcome, code: int | tuple[int, ...], after: str, *holds: bool) -> None:
        """Add a row: fault, outcome, expected exit code, what is left or what to do, and conditions that must hold."""
        codes = (code,) if isinstance(code, int) else code
        problems = []
        if outcome.code not in codes:
            problems.append(f"exit code {outcome.code}, expected {code}")
        if "Traceback" in outcome.out + outcome.err or "Exception ignored" in outcome.err:
            problems.append("a traceback")
        if outcome.code not in (OK, BROKEN_PIPE) and len(outcome.last) < 20:
            problems.append(f"no message: {outcome.last!r}")
        if not all(holds):
            problems.append("the bytes or the folder are not as they should be")
        if problems:
            self.broken.append(f"{fault}: {', '.join(problems)}\n{outcome.err[-3000:] or outcome.out[-3000:]}")
        self.rows.append(
            (fault, normalized(outcome.last), str(outcome.code), after + (" **BROKEN**" if problems else ""))
        )
        state = "BROKEN" if problems else "ok"
        print(f"{state:7s}{outcome.code:4d}  {fault}: {normalized(outcome.last)[:160]} | {after}", flush=True)


def normalized(text: str) -> str:
    """A message without the parts that depend on the machine or the time."""
    text = text.replace(f"{os.getcwd()}/", "").replace(os.getcwd(), ".")
    text = re.sub(r"process \d+ on \S+", "process N on HOST", text)
    text = re.sub(r"since [\d-]+ [\d:]+", "since TIME", text)
    text = re.sub(r"in \d+ s;", "in N s;", text)
    return text.replace("|", "\\|").replace("<", "&lt;")
