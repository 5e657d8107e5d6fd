# The README's commands, by name. `just` itself: pip install rust-just.

# Install, and walk through all three stages on the embedded model.
demo:
    python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e . && .venv/bin/sae demo

# Install with the tests, and run them.
test:
    python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[test]' && .venv/bin/pytest

# What a commit has to pass besides the tests.
check:
    .venv/bin/pip install -q ruff && .venv/bin/ruff check . && .venv/bin/ruff format --check .

# Every benchmark, one after the other; each prints its table.
bench:
    for script in benchmarks/bench_*.py; do .venv/bin/python $script; done
