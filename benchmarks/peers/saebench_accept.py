"""`saebench_reference.py --accept`: run the tests against SAEBench's fixtures, and print a table of what each test
compared.

A test records its headline number on both sides, the largest relative difference of all its numbers, and what must be
equal (`record_comparison` in tests/evaluate/conftest.py). Tests record before they assert, so the table also has the
differences of failing tests.
"""

from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2] / "tests" / "evaluate" / "metrics"


class Table:
    """A pytest plugin that prints what the tests recorded."""

    def __init__(self) -> None:
        print("| metric | what | SAEBench | ours | largest relative difference | equal | test |")
        print("|---|---|---|---|---|---|---|")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            lines = [line for name, line in report.user_properties if name == "saebench"]
            for line in lines or ([report.nodeid.split("::")[-1], "", "", "", "", ""] if report.failed else []):
                print(f"| {' | '.join(line)} | {report.outcome} |")


def accept() -> int:
    """Run the tests; returns pytest's exit status."""
    files = sorted(map(str, TESTS.glob("test_saebench_*.py")))
    return int(
        pytest.main(["-o", "addopts=", "-p", "no:terminal", "-p", "no:cacheprovider", *files], plugins=[Table()])
    )
