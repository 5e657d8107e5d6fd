"""Run the quick tests with the lowest versions that pyproject.toml declares, and with the newest available ones:

    pip install uv
    python benchmarks/version_bounds.py FOLDER > page.md
    python benchmarks/version_bounds.py FOLDER --pin torch==2.13.0+cpu --find-links WHEELS > page.md

Each of the two ends, `lowest` and `newest`, gets a virtual environment in FOLDER with this checkout and all its extras.
The environment `lowest` is installed with uv's `--resolution lowest-direct`, which chooses the lowest allowed version
of the packages declared here and the newest version of their own dependencies. The folders of tests/ are run one after
another. Finished results are kept in FOLDER, so a later call continues where the last one stopped, and repeats the
tests that failed; `--again lowest` first discards the results of `lowest`. A test that fails is run once more on
its own. The page is printed at the end; the exit code is 1 if a test still fails. `--pin` fixes a version at both ends,
for a package that is available only in some versions; the page then says that its bound was not tried.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
import tomllib
import xml.etree.ElementTree as ET
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ENDS = {"lowest": "lowest-direct", "newest": "highest"}  # end -> uv's name for the resolution
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FOLDERS = sorted(f.name for f in (ROOT / "tests").iterdir() if any(f.rglob("test_*.py")))
DECLARED = {  # requirement -> package
    line: re.split(r"[\[<>=!~]", line)[0]
    for line in [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--end", action="append", choices=ENDS, help="only this end")
    parser.add_argument("--page", action="store_true", help="run nothing: print the page of what is finished")
    parser.add_argument("--again", action="append", default=[], choices=ENDS, help="start this end from the beginning")
    parser.add_argument("--pin", action="append", default=[], help="NAME==VERSION, installed at both ends")
    parser.add_argument("--find-links", help="a folder of wheels, in addition to PyPI")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the environments")
    parser.add_argument("--workers", type=int, default=2, help="number of pytest workers")
    arguments = parser.parse_args()
    if shutil.which("uv") is None:
        sys.exit("uv is not installed: pip install uv")
    for end in arguments.again:
        shutil.rmtree(arguments.folder / end, ignore_errors=True)
    for end in [] if arguments.page else arguments.end or ENDS:
        folder = arguments.folder / end
        install(folder, end, arguments)
        run_tests(folder, arguments.workers)
    results = {end: read(arguments.folder / end) for end in ENDS if (arguments.folder / end / "versions.json").exists()}
    print(page(results, arguments.pin))
    sys.exit(any(result["failed"] for pieces in results.values() for result in pieces["tests"].values()))


def install(folder: Path, end: str, arguments: argparse.Namespace) -> None:
    """Make the environment for `end` (lowest or newest), and list its versions, unless they are listed already."""
    listing = folder / "versions.json"
    if listing.exists():
        return
    environment = folder / "env"
    shutil.rmtree(environment, ignore_errors=True)
    say(f"{end}: installing into {environment}")
    links = ["--find-links", arguments.find_links] if arguments.find_links else []
    extras = ",".join(PROJECT["optional-dependencies"])
    run("uv", "venv", "--quiet", "--no-python-downloads", "--python", arguments.python, environment)
    run(
        "uv", "pip", "install", "--quiet", "--python", environment / "bin" / "python", "--resolution", ENDS[end],
        *links, "--editable", f"{ROOT}[{extras}]", *arguments.pin,
    )  # fmt: skip
    code = (
        "import json, platform\nfrom importlib.metadata import distributions\n"
        "found = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in distributions()}\n"
        "print(json.dumps({'python': platform.python_version(), 'packages': found}))"
    )
    found = subprocess.run([environment / "bin" / "python", "-c", code], capture_output=True, text=True, check=True)
    listing.write_text(found.stdout)


def run_tests(folder: Path, workers: int) -> None:
    """Run the tests that have not been run: the files at the top of tests/, and each of its folders."""
    tests = ROOT / "tests"
    pieces = {"*.py": sorted(tests.glob("test_*.py"))} | {name: [tests / name] for name in FOLDERS}
    for name, paths in pieces.items():
        kept = folder / "tests" / f"{name}.json"
        kept.parent.mkdir(exist_ok=True)
        result = json.loads(kept.read_text()) if kept.exists() else None
        if result and not result["failed"]:
            continue
        say(f"{folder.name}: tests/{name}")
        if result is None:
            result = pytest(folder, [str(path) for path in paths], workers)
            result |= {"passed": len(result["passed"]), "passed_later": []}
        if result["failed"]:  # now or in an earlier call
            again = set(pytest(folder, list(result["failed"]), 0)["passed"])
            result["passed_later"] += sorted(again & result["failed"].keys())
            result["failed"] = {name: why for name, why in result["failed"].items() if name not in again}
        kept.write_text(json.dumps(result | {"commit": commit()}, indent=1))


def pytest(folder: Path, tests: list[str], workers: int) -> dict[str, Any]:
    """Run tests in the environment in `folder`. Exits if pytest could not run them at all."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    options = ["-n", str(workers), "-p", "no:cacheprovider", f"--junit-xml={report}", "-o", "junit_family=xunit1"]
    words = [str(folder / "env" / "bin" / "pytest"), *options, *tests]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    (folder / "output.txt").write_text(done.stdout + done.stderr)
    if not report.exists():
        sys.exit(f"pytest ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    result: dict[str, Any] = {"passed": [], "failed": {}, "skipped": []}
    for case in ET.parse(report).iter("testcase"):
        problem = next((p for kind in ("failure", "error") if (p := case.find(kind)) is not None), None)
        if problem is not None:
            reason = problem.get("message") or (problem.text or "").strip().splitlines()[-1]
            result["failed"][test_id(case)] = " ".join(reason.split())[:300]
        elif (skipped := case.find("skipped")) is not None:
            result["skipped"].append(" ".join((skipped.get("message") or "").split()))
        else:
            result["passed"].append(test_id(case))
    return result


def test_id(case: ET.Element) -> str:
    """The argument for pytest: file::class::name, or only the file's name if the file could not be read."""
    file = case.get("file") or f"{case.get('name', '').replace('.', '/')}.py"
    within = (case.get("classname") or "").removeprefix(file.removesuffix(".py").replace("/", ".")).strip(".")
    return "::".join(filter(None, [file, *within.split("."), case.get("name")])) if case.get("file") else file


def read(folder: Path) -> dict[str, Any]:
    kept = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("tests/*.json"))}
    return json.loads((folder / "versions.json").read_text()) | {"tests": kept}


def page(results: dict[str, dict[str, Any]], pins: list[str]) -> str:
    ends = list(results)
    pythons = ", ".join(sorted({result["python"] for result in results.values()}))
    pieces = [piece for result in results.values() for piece in result["tests"].values()]
    lines = [
        f"# The lowest and the newest versions, {date.today()}",
        "",
        f"`python benchmarks/version_bounds.py`, commit {', '.join(sorted({piece['commit'] for piece in pieces}))}, "
        f"Python {pythons}: the quick tests. A test counts as failed if it also fails when run again alone.",
        "",
        f"| | {' | '.join(ends)} |",
        f"|---|{'---|' * len(ends)}",
        *(
            row(f"tests/{name}", [counts(r["tests"].get(name)) for r in results.values()])
            for name in ["*.py", *FOLDERS]
        ),
    ]
    for end, result in results.items():
        failed = {name: why for piece in result["tests"].values() for name, why in piece["failed"].items()}
        if failed:
            lines += ["", f"Failed with the {end} versions:", ""]
            lines += [f"- `{name}`: {why}" for name, why in failed.items()]
        reasons = Counter(why for piece in result["tests"].values() for why in piece["skipped"])
        skipped = "; ".join(f"{n} × {why}" for why, n in reasons.most_common())
        lines += ["", f"Skipped with the {end} versions: {skipped}."]
    lines += ["", f"| declared requirement | {' | '.join(ends)} |", f"|---|{'---|' * len(ends)}"]
    pinned = {pin.split("==")[0] for pin in pins}
    for requirement, name in DECLARED.items():
        shown = f"{requirement} (lower bound not tested)" if name in pinned else requirement
        lines.append(row(shown, [result["packages"].get(name, "") for result in results.values()]))
    own = {*DECLARED.values(), PROJECT["name"]}
    for end, result in results.items():
        others = (f"{n} {v}" for n, v in sorted(result["packages"].items()) if n not in own)
        lines += ["", f"Dependencies of these packages, with the {end} versions: {', '.join(others)}."]
    return "\n".join(lines)


def counts(piece: dict[str, Any] | None) -> str:
    """The outcomes of a folder of tests as the cell of a table."""
    if piece is None:
        return "not run"
    later = len(piece["passed_later"])
    again = f" ({later} of them on a later try)" if later else ""
    return f"{piece['passed'] + later} passed{again}, {len(piece['failed'])} failed, {len(piece['skipped'])} skipped"


def row(head: str, cells: list[Any]) -> str:
    return f"| {head} | {' | '.join(map(str, cells))} |"


def commit() -> str:
    words = ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"


def run(*words: object) -> None:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))} failed:\n{done.stderr[-3000:]}")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
