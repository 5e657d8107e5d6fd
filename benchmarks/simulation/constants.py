"""The assumptions of the simulations: each number with its unit and its source. `benchmarks/scale.py --set name=value`
changes one.

Nothing here was measured on a GPU, a cluster or a bucket. If a source names a page, the number was read there.
After "measured", the source says what was measured on two CPU cores, and which script did it. "assumed" marks a
guess on which the result depends.
"""

from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

BLOCK_PARAMETERS = 2304 * (2048 + 2 * 1024 + 2048) + 3 * 2304 * 9216  # of Gemma-2-2B: attention, MLP
S3_GUIDELINES = "Amazon S3 user guide, performance guidelines"


def constant(value: float, unit: str, source: str) -> Any:
    return field(default=value, metadata={"unit": unit, "source": source})


@dataclass(frozen=True)
class Constants:
    """See the module. Times in seconds, sizes in bytes."""

    # The machines.
    gpu_flops: float = constant(790e12, "FLOP/s", "of an H200 in bfloat16, as in benchmarks/step_budget.py")
    gpu_share: float = constant(0.5, "", "assumed: share of gpu_flops that a model reaches")
    block_flops: float = constant(2 * BLOCK_PARAMETERS, "FLOP/token", "products of a block of Gemma-2-2B")
    gpu_memory: float = constant(139 * 2**30, "B", "of an H200")
    gpu_memory_share: float = constant(0.9, "", "train/passes.py: FREE_SHARE")
    node_link: float = constant(
        8.0e9, "B/s", "a c5n.18xlarge (100 Gbit/s) and S3: 8,003 MB/s, github.com/dvassallo/s3-benchmark, 2019"
    )
    disk: float = constant(6e9, "B/s", "assumed: local NVMe disks of a node")
    speed_spread: float = constant(0.02, "", "assumed: standard deviation of the speed of nodes")
    # The store.
    connection: float = constant(85e6, "B/s", f"{S3_GUIDELINES}: one request per 85-90 MB/s")
    latency: float = constant(0.1, "s", f"{S3_GUIDELINES}: 100-200 ms, the lower end, for each request")
    put_rate: float = constant(3500, "1/s", f"{S3_GUIDELINES}: for each partition of the keys")
    get_rate: float = constant(5500, "1/s", f"{S3_GUIDELINES}: for each partition of the keys")
    partitions: float = constant(4, "", "assumed: partitions of a cache's keys in the store; a new bucket has 1")
    # Failures.
    node_failures: float = constant(
        419 / (54 * 24 * 2048), "1/h", "Llama 3 (arXiv 2407.21783, 3.3.4): 419 unexpected interruptions of 2,048 nodes "
        "in 54 days"
    )  # fmt: skip
    restart: float = constant(180, "s", "assumed: time until a lost process is scheduled again and its node is up")
    start: float = constant(40, "s", "assumed: imports, CUDA, rendezvous and weights of a process")
    checkpoint: float = constant(1.4e9, "B/s", "measured by --measure: sha256 of a training state, in one thread")
    step_share: float = constant(0.65, "", "assumed: share of its modelled speed that a training step reaches")
    step_memory: float = constant(10e9, "B", "assumed: memory of a step in addition to the states of its pass")
    # The program on a CPU.
    writer: float = constant(
        1173e6, "B/s", "measured: statistics, checksums and files of activations, two threads of a process; "
        "benchmarks/results/2026-11-21-harvest-epyc-2-cores.md"
    )  # fmt: skip
    encode: float = constant(4.7e5, "token/s", "measured by --measure: each thread of the tokenizer")
    encode_threads: float = constant(16, "", "assumed: cores that the tokenizer uses")
    cut: float = constant(4.5e6, "token/s", "measured by --measure: the thread that cuts the text")
    read_commit: float = constant(1.6e-4, "s", "measured by --measure: to read and check a commit")
    merge_file: float = constant(1.2e-5, "s", "measured by --measure: to add a file to the manifest")
    row_memory: float = constant(35, "B", "measured by --measure: per row, while an array is sealed")


def describe(constants: Constants) -> list[str]:
    """The constants as rows of a Markdown table."""
    rows = ["| constant | value | unit | source |", "|---|---|---|---|"]
    return rows + [
        f"| `{one.name}` | {getattr(constants, one.name):,.6g} | {one.metadata['unit']} | {source_of(one, constants)} |"
        for one in fields(constants)
    ]


def source_of(one: Field[Any], constants: Constants) -> str:
    return one.metadata["source"] if getattr(constants, one.name) == one.default else "--set"


def parse_settings(settings: Iterable[str]) -> Constants:
    """The constants with `name=value` settings. Raises ValueError for an unknown name, and for a value that is not a
    number or is negative."""
    names = {one.name for one in fields(Constants)}
    values = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in names:
            raise ValueError(f"unknown constant {name!r}: expected one of {', '.join(sorted(names))}")
        if (number := float(value)) < 0:
            raise ValueError(f"{name} is {number:g}: expected 0 or more")
        values[name] = number
    return replace(Constants(), **values)
