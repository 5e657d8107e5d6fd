"""Make a page from measurements on a GPU: `python benchmarks/gpu_report.py FILE`. benchmarks/gpu/run.py writes FILE.

Writes benchmarks/results/DATE-gpu.md, with the modelled milliseconds from the newest page of step_budget.py next to the
measured ones. Also prints the measured values of constants: those of the cost model in step_budget.py, and those in
train/sparse_ops.py.
"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

COLUMNS = 11  # of a table of step_budget.py; the ninth has the milliseconds of a step
RESULTS = Path(__file__).with_name("results")
Found = Mapping[str, Mapping[str, Any]]


def modelled_ms(folder: Path) -> dict[str, float]:
    """The modelled milliseconds of a step from the newest page of step_budget.py; keys are "recipe latentsxtokens"."""
    pages = sorted(folder.glob("*-step-budget.md"))
    lines = pages[-1].read_text().splitlines() if pages else []
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")]
    return {f"{row[0].strip('`')} {row[1]}x{row[2]}": float(row[8]) for row in rows if len(row) == COLUMNS}


def constants(parts: Mapping[str, Any]) -> dict[str, float]:
    """The measured constants of the model, by their names in the code."""
    found: Found = parts.get("ceilings", {}).get("found", {})
    named = {
        "FLOPS_BFLOAT16": ("product bfloat16", "flops"), "FLOPS_FLOAT32": ("product float32", "flops"),
        'FLOPS["tf32"]': ("product tf32", "flops"), "BANDWIDTH": ("memory", "bytes_per_s"), "LAUNCH": ("launch", "s"),
    }  # fmt: skip
    return {name: found[key][field] for name, (key, field) in named.items() if key in found} | border_of(parts)


def border_of(parts: Mapping[str, Any]) -> dict[str, float]:
    """The n/k above which sparse products are faster, interpolated between the measured n/k on a logarithmic scale."""
    found: Found = parts.get("border", {}).get("found", {})
    gain = sorted(
        (float(r), f["dense_ms"] / f["sparse_ms"]) for r, f in found.items() if f["dense_ms"] and f["sparse_ms"]
    )
    for (low, before), (high, after) in zip(gain, gain[1:], strict=False):
        if before < 1 <= after:
            share = math.log(1 / before) / math.log(after / before)
            return {'SPARSE_FROM["cuda"]["bfloat16"]': low * (high / low) ** share}
    return {}


def number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "; ".join(map(str, value)) or "none"
    return "refused" if value is None else str(value)


def table(found: Found) -> Iterator[str]:
    """One row for each result, with a column for every quantity."""
    columns = list(dict.fromkeys(name for one in found.values() for name in one))
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for key, one in found.items():
        yield f"| {key} | {' | '.join(number(one[name]) if name in one else '' for name in columns)} |"


def page(record: Mapping[str, Any], modelled: Mapping[str, float]) -> str:
    parts = {name: dict(part, found=dict(part["found"])) for name, part in record["parts"].items()}
    environment: Mapping[str, Any] = parts.get("ceilings", {"found": {}})["found"].pop("environment", {})
    versions = environment.get("versions", {})
    gpu = ", ".join(environment.get("gpus", [])) or "an unknown GPU"
    lines = [f"# Measured on a GPU: {gpu}\n"]
    if record["simulated"]:
        lines.append("**This is the simulated GPU of the tests: the code was tried, and nothing was measured.**\n")
    lines += [
        f"`python benchmarks/gpu/run.py`, {record['date']}, torch {versions.get('torch', '?')}, CUDA",
        f"{environment.get('cuda')}, Triton {versions.get('triton', 'none')}. Times are medians. `modelled_ms` is the",
        "model of benchmarks/step_budget.py, not measured; all other numbers are measured.\n",
        "| constant | measured |",
        "|---|---|",
        *(f"| `{name}` | {number(value)} |" for name, value in constants(record["parts"]).items()),
    ]
    for key, one in parts.get("steps", {"found": {}})["found"].items():
        if key in modelled:
            parts["steps"]["found"][key] = {**one, "modelled_ms": modelled[key]}
    for name, part in parts.items():
        lines += [f"\n## {name}\n", *table(part["found"])]
        if "error" in part:
            lines.append(f"\nThis part is incomplete: {part['error']}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the JSON of benchmarks/gpu/run.py")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DATE-gpu.md")
    args = parser.parse_args()
    record = json.loads(args.file.read_text())
    out = args.out or RESULTS / f"{record['date']}-gpu.md"
    out.write_text(page(record, modelled_ms(RESULTS)))
    print(f"{out} is written. The constants of the model, as measured:")
    for name, value in constants(record["parts"]).items():
        where = "benchmarks/step_budget.py" if name.isupper() else "train/sparse_ops.py"
        print(f"  {name} = {value:.4g}  ({where})")


if __name__ == "__main__":
    main()
