"""benchmarks/record_fuzz.py, shortened: random damage to a record is never read as valid, and causes no traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "record_fuzz.py"


@pytest.mark.slow
def test_random_damage_to_any_record_is_noticed() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
