"""The cost of `sae reproduce all` on google/gemma-2-2b: tokens, disk, memory, and the modelled time on one H200.

    python benchmarks/papers/gemma_2_2b.py                      # plans the readings `evidence` and `literal`
    python benchmarks/papers/gemma_2_2b.py --reading literal    # plans only the reading `literal`

Paper 003 has no reading `evidence`, so its reading `field` is planned instead. The script plans the command as `sae
reproduce all --dry-run` does. It needs the model's config.json (below) and a tokenizer, but no weights, no Hub and no
GPU. The plan reads python-stdlib, which is longer than any of the runs needs, instead of the papers' text, and assumes
that the disk is large enough. Nothing is measured: benchmarks/step_budget.py computes the time of a step with a cost
model, for the recipe with the options of the reading. The time of a harvest is the time of its matrix products at the
same speed or the time that the host needs to write its bytes, whichever is longer. Evaluation and checkpoints are not
counted.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

NAME = "google/gemma-2-2b"
CONFIG = {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "torch_dtype": "float32", "hidden_size": 2304,
    "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 256, "vocab_size": 256000, "max_position_embeddings": 8192, "sliding_window": 4096,
    "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip
DISK = 4e12  # bytes that the machine is assumed to have free
HOST = 0.94e9  # bytes per second of a harvest that two cores of a host write (`bench_harvest.py --host`)
READINGS = (None, "literal")  # None: the default on this model


@contextlib.contextmanager
def config_alone() -> Iterator[None]:
    """A context manager that simulates a machine with a large disk, the model's config but no weights, and no network.

    Enter it before transformers is imported, since transformers reads the location of its files on import.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"HF_HOME": folder, "HF_HUB_OFFLINE": "1", "SAE_HOME": folder}
        make_hub(Path(folder))
        from sae.harvest import plan
        from sae.train import estimate

        with (
            mock.patch.object(plan, "free_space", return_value=DISK),
            mock.patch.object(estimate, "free_space", return_value=DISK),
        ):
            yield


def make_hub(folder: Path) -> None:
    """Create a Hub cache that contains the config and the embedded model's tokenizer."""
    from sae.harvest import mini

    snapshot = folder / "hub" / f"models--{NAME.replace('/', '--')}" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(CONFIG))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (snapshot / file).write_bytes((Path(mini.__file__).parent / "weights" / file).read_bytes())
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)


def block_parameters() -> int:
    """Weights of the matrix products of one block."""
    d, heads, kv = CONFIG["hidden_size"], CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
    attention = d * CONFIG["head_dim"] * (2 * heads + 2 * kv)  # type: ignore[operator]
    return attention + 3 * d * CONFIG["intermediate_size"]  # type: ignore[operator]


class StepTimes:
    """Milliseconds of a step, from the cost model of step_budget.py; each kind of step is computed once."""

    def __init__(self, gpu: Any) -> None:
        self.gpu, self.known = gpu, dict[str, float | str]()

    def __call__(self, run: Any) -> float | str:
        """The milliseconds of a step of a run, or the reason why the run cannot be built."""
        import step_budget

        config = run.config
        asked = {
            "recipe": run.recipe.name, "d_in": config.d_in, "d_sae": config.d_sae, "batch": config.batch_size,
            "options": dict(run.options),
        }  # fmt: skip
        key = json.dumps(asked, sort_keys=True)
        if key not in self.known:
            counted = self.gpu("counting.count_step", **asked)
            self.known[key] = (
                counted
                if isinstance(counted, str)
                else step_budget.StepCost(run.recipe.name, config.d_sae, config.batch_size, counted).step_ms
            )
        return self.known[key]


def plan_of(reading: str | None) -> Any:
    from sae.workflows.reproduce import ReproduceConfig, plan_reproduction

    asked = ReproduceConfig(["all"], model=NAME, dataset="python-stdlib", reading=reading, device="cpu")
    return plan_reproduction(asked)


def key_of(run: Any) -> Any:
    """What identifies a run. Until a cache is harvested, runs with different options can have the same folder."""
    return run.folder, run.config, json.dumps(run.options, sort_keys=True)


def rows_of(reading: str | None, times: StepTimes) -> tuple[list[str], dict[str, float]]:
    """A row of the page for each paper, and the totals."""
    import step_budget

    from sae.train.passes import pass_memory

    plan = plan_of(reading)
    (harvest,) = plan.harvests
    blocks = max(hook.layer for hook in harvest.hooks) + 1
    products = 2 * block_parameters() * blocks * harvest.tokens / step_budget.FLOPS_BFLOAT16
    totals = {
        "tokens": harvest.tokens, "activations": harvest.bytes_to_write,
        "harvest": max(products, harvest.bytes_to_write / HOST), "runs": 0, "training": 0.0,
    }  # fmt: skip
    of_paper: dict[str, dict[Any, Any]] = {}  # a run that several papers share counts for each of them
    for jobs, one in zip(plan.passes, plan.train_plans, strict=True):
        for job in jobs:
            own = of_paper.setdefault(job.paper, {})
            own.update((key_of(run), run) for run in one.runs if run.recipe.name == job.recipe)
    lines, counted = [], set[Any]()
    for number, own in sorted(of_paper.items()):
        seconds, refused = 0.0, list[str]()
        for key, run in own.items():
            ms = times(run)
            if isinstance(ms, str):
                refused.append(f"not {run.recipe.name}: {ms}")
                continue
            seconds += ms / 1000 * run.config.steps
            if key not in counted:
                counted.add(key)
                totals["training"] += ms / 1000 * run.config.steps
        memory = max(pass_memory([run], "cpu").total for run in own.values())
        widths = ", ".join(f"{width:,}" for width in sorted({run.config.d_sae for run in own.values()}))
        steps = sorted({(run.config.steps, run.config.batch_size) for run in own.values()})
        lines.append(
            f"| {number} | {len(own)} | {widths} | {', '.join(f'{a:,} x {b:,}' for a, b in steps)} "
            f"| {memory / 1e9:.1f} | {seconds / 60:.0f} | {' '.join(dict.fromkeys(refused)) or 'all'} |"
        )
    totals["runs"] = len({key for own in of_paper.values() for key in own})
    return lines, totals


def page(found: Mapping[str, tuple[list[str], dict[str, float]]]) -> str:
    from common import commit

    lines = [
        "# The modelled cost of `sae reproduce all` on Gemma-2-2B\n",
        f"`python benchmarks/papers/gemma_2_2b.py`, {date.today()}, commit {commit()}. **Nothing was run.** The",
        "command is planned from the model's config.json. Times come from the model in",
        "[step_budget.py](../step_budget.py) for one H200 on which the steps run one after the other.",
        "Evaluation is not included.\n",
    ]
    for name, (rows, totals) in found.items():
        lines += [
            f"## {name}\n",
            f"The harvest reads {totals['tokens']:,.0f} tokens, writes {totals['activations'] / 1e9:.0f} GB of "
            f"activations of three layers, and takes {totals['harvest'] / 60:.1f} min. "
            f"Training {totals['runs']:.0f} SAEs takes {totals['training'] / 60:.0f} min.\n",
            "| paper | SAEs | latents | steps x tokens per step | most memory of a run, GB | "
            "minutes for this paper alone | recipes that were modelled |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reading", choices=["default", "literal"], help="default: both")
    args = parser.parse_args()
    chosen = {"default": READINGS[:1], "literal": READINGS[1:], None: READINGS}[args.reading]
    with config_alone():
        import step_budget

        with step_budget.start_gpu() as gpu:
            times = StepTimes(gpu)
            print(page({f"Reading {name or 'evidence (003: field)'}": rows_of(name, times) for name in chosen}))


if __name__ == "__main__":
    main()
