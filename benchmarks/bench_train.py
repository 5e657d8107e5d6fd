"""Cost of a trainer step: `python benchmarks/bench_train.py [--d-in 512] [--width 1,8] [--saelens PYTHON]`.

Prints six tables. All but `threads` use processor time of one thread, which other work on the machine hardly changes.
Measurements run in rounds, in random order, one process at a time. Cells are the median and the interquartile range
over rounds.

    step       relu, topk and batchtopk next to the peers' published trainers on the same batches (environments as in
               peers/agree_train.py), and relative to a lower bound: the five matrix products of a dense step alone, in
               the same rounds. A step whose ratio to this bound is below 1 gathers rows instead of computing dense
               products (train/sparse_ops.py). FLOP are counted by torch, for matrix products only; gathering rows
               counts as zero FLOP.
    recipes    every recipe relative to its base: topk if it keeps a fixed number of latents, else relu. The work that
               mechanisms do every N steps is included, divided by N.
    together   V relu runs in one pass over a cache, relative to V runs one after the other.
    compiled   --compile relative to eager.
    precision  --precision bfloat16 relative to float32, next to the gain expected from the speed-up of the five
               products alone and their share of a step. Not measured if the processor does not support bfloat16.
    threads    the speed-up of relu, topk, batchtopk and the five products alone from a second thread. This speed-up is
               measured in wall time, because processor time does not show it; the machine therefore needs two idle
               cores.

With `--json FILE` the table of recipes is also added to FILE, and replaces a table of the same sizes there. FILE has
the format of evaluate/papers/step_times.json, the file that claims about the cost of a step are compared with.
"""

import argparse
import json
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peers.time_peer import batches, flops, timed

import sae.train.variants  # noqa: F401  (registers the recipes)
from common import ARRAY, Spent, commit, in_rounds, machine, make_cache
from sae.cache.loader import BatchLoader
from sae.cache.reader import Cache
from sae.common.device import keep_freed_memory
from sae.common.precision import reason_against
from sae.train.activation_functions import KeepTopK
from sae.train.compile import compile_step
from sae.train.loop import Trainer, train_loop
from sae.train.recipe import RECIPES, find_recipe
from sae.train.variant import RunConfig

Step = Callable[[int], object]
STEPS = 100_000  # length of the run that a step belongs to: no latent is dead yet
BASES = ("relu", "topk", "batchtopk")
ROUNDED = (*BASES, "jumprelu", "gated", "matryoshka", "decorrelation")  # in the table of precisions


class Peer:
    """The process of a peer library, which computes only while it answers a request."""

    def __init__(self, name: str, python: str) -> None:
        script = Path(__file__).parent / "peers" / "time_peer.py"
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([python, str(script), name], stdin=pipe, stdout=pipe, text=True)

    def ask(self, do: str, recipe: str = "", **other: Any) -> float:
        assert self.process.stdin and self.process.stdout
        print(json.dumps({"do": do, "recipe": recipe, **other}), file=self.process.stdin, flush=True)
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"the peer exited with {self.process.wait()}; its output is above")
        return json.loads(line)


def make_trainer(recipe: str, config: RunConfig) -> Trainer:
    torch.manual_seed(0)
    return Trainer(find_recipe(recipe).make(config, {}), config.steps, "cpu", precision=config.precision)


def make_step(trainer: Trainer, config: RunConfig) -> Step:
    x = batches(config.batch_size, config.d_in)

    def step(number: int) -> object:
        return trainer.step(x[number % len(x)])

    first = trainer.step(x[0])
    with torch.no_grad():  # an empty table of pairs would cost less than a filled one
        for mechanism in trainer.variant.mechanisms:
            if mechanism.every:
                mechanism.every_n_steps(first)
    return step


def products(config: RunConfig) -> Step:
    """Only the matrix products of a dense step: encode, decode, and the gradients of latents, W_dec and W_enc."""
    kind = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    tokens, d_in, d_sae = config.batch_size, config.d_in, config.d_sae
    sizes = ((tokens, d_in), (tokens, d_sae), (d_in, d_sae), (d_sae, d_in))
    x_BD, f_BF, w_DF, w_FD = (torch.randn(size).to(kind) for size in sizes)

    def step(number: int) -> object:
        return x_BD @ w_DF, f_BF @ w_FD, x_BD @ w_FD.T, f_BF.T @ x_BD, x_BD.T @ f_BF

    step(0)
    return step


def options_for(recipe: str, config: RunConfig) -> dict[str, Any]:
    """The options of our recipe, in the form that a peer's trainer expects."""
    variant = make_trainer(recipe, config).variant
    options = variant.options | {"l1_warmup": 1000, "warmup": 1000, "dead_tokens": config.dead_after_tokens}
    sizes = {"d_in": config.d_in, "d_sae": config.d_sae, "batch": config.batch_size, "steps": config.steps}
    return asdict(variant.optimization) | options | sizes


def spread(times: list[float]) -> str:
    low, middle, high = quartiles(times)
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def show_steps(config: RunConfig, peers: Mapping[str, Peer], rounds: int, steps: int) -> None:
    limit = products(config)
    ways: dict[str, Callable[[], float]] = {"products": lambda: timed(limit, steps)}
    counted = {"products": flops(limit)}
    for recipe in BASES:
        ours = make_step(make_trainer(recipe, config), config)
        counted[f"{recipe}, ours"] = flops(ours)
        ways[f"{recipe}, ours"] = lambda ours=ours: timed(ours, steps)
        for name, peer in peers.items():
            request = {"recipe": recipe, "options": options_for(recipe, config), "steps": steps}
            counted[f"{recipe}, {name}"] = int(peer.ask("flops", **request))
            ways[f"{recipe}, {name}"] = lambda peer=peer, request=request: peer.ask("time", **request)
    times_of = in_rounds(ways, rounds)
    middle = {name: statistics.median(times) for name, times in times_of.items()}
    title = f"d_in {config.d_in}, n {config.d_sae}, {config.batch_size} tokens"
    print(f"\n| {title} | ms | GFLOP | over the five products | over ours |\n|---|---|---|---|---|")
    for name, times in times_of.items():
        ours = middle.get(f"{name.split(',')[0]}, ours", middle[name])
        shares = f"{middle[name] / middle['products']:.2f} | {middle[name] / ours:.2f}"
        print(f"| {name} | {spread(times)} | {counted[name] / 1e9:.3g} | {shares} |", flush=True)
    for peer in peers.values():
        peer.ask("forget")


def periodic_cost(trainer: Trainer, config: RunConfig) -> float:
    """Milliseconds per step of the work that mechanisms do every N steps, divided by N."""
    step, spent = trainer.step(batches(config.batch_size, config.d_in)[0]), 0.0
    with torch.no_grad():
        for mechanism in trainer.variant.mechanisms:
            if mechanism.every:
                spent += timed(lambda number, m=mechanism: m.every_n_steps(step), 1) / mechanism.every
    return spent


def show_recipes(config: RunConfig, rounds: int, steps: int, file: Path | None = None) -> None:
    ways: dict[str, Callable[[], float]] = {}
    periodic, base = {}, {}
    for recipe in RECIPES:
        trainer = make_trainer(recipe, config)
        step = make_step(trainer, config)
        ways[recipe] = lambda step=step: timed(step, steps)
        periodic[recipe] = periodic_cost(make_trainer(recipe, config), config)
        base[recipe] = "topk" if any(isinstance(link, KeepTopK) for link in trainer.variant.sae.activation) else "relu"
    found = in_rounds(ways, rounds)
    middle = {name: statistics.median(times) + periodic[name] for name, times in found.items()}
    print(f"\n| recipe at d_in {config.d_in}, n {config.d_sae} | ms | of which periodic | base | relative to base |")
    print("|---|---|---|---|---|")
    for name in sorted(RECIPES, key=lambda name: -middle[name] / middle[base[name]]):
        over = middle[name] / middle[base[name]]
        print(f"| {name} | {spread(found[name])} | {periodic[name]:.2f} | {base[name]} | {over:.2f} |", flush=True)
    if file:
        write_step_times(file, config, found, periodic)


def write_step_times(
    file: Path, config: RunConfig, found: Mapping[str, list[float]], periodic: Mapping[str, float]
) -> None:
    """Add a table to a file of step times: for each recipe, the quartiles and the time of work done every N steps."""
    table = {
        "machine": machine().split(",")[0],
        "date": date.today().isoformat(),
        "commit": commit(),
        "source": "benchmarks/bench_train.py --tables recipes",
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "batch_size": config.batch_size,
        "ms": {
            name: [round(time, 2) for time in (*quartiles(times), periodic[name])]
            for name, times in sorted(found.items())
        },
    }
    tables = json.loads(file.read_text(encoding="utf-8"))["tables"] if file.exists() else []
    sizes = ("d_in", "d_sae", "batch_size")
    kept = [one for one in tables if any(one[size] != table[size] for size in sizes)]
    text = json.dumps({"tables": [*kept, table]}, indent=1)
    text = re.sub(
        r"(?<=,)\s+(?=\d)", " ", re.sub(r"(?<=\[)\s+(?=\d)|(?<=\d)\s+(?=])", "", text)
    )  # a recipe in one line
    file.write_text(text + "\n", encoding="utf-8")


def quartiles(times: list[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return low, statistics.median(times), high


def train_together(cache: Cache, config: RunConfig, seeds: range) -> None:
    trainers = []
    for seed in seeds:
        torch.manual_seed(seed)
        trainers.append(Trainer(find_recipe("relu").make(config, {}), config.steps, "cpu"))
    with BatchLoader(cache, ARRAY, config.batch_size, threads=1) as stream:
        train_loop(trainers, islice(stream, config.steps), range(config.steps), lambda number: False)


def show_together(folder: Path, rounds: int) -> None:
    cache = make_cache(folder / "cache", 0.1)
    config = RunConfig(cache.array(ARRAY).shape[1], 256, 16, 512)

    def spent(work: Callable[[], object]) -> float:
        started = Spent.now()
        work()
        return Spent.since(started).processor * 1e3

    ways: dict[str, Callable[[], float]] = {}
    for count in (1, 2, 4, 8):
        ways[f"{count} together"] = lambda n=count: spent(lambda: train_together(cache, config, range(n)))
        one = [range(seed, seed + 1) for seed in range(count)]
        ways[f"{count} apart"] = lambda one=one: spent(lambda: [train_together(cache, config, s) for s in one])
    found = in_rounds(ways, rounds)
    title = f"relu {config.d_in} -> {config.d_sae}, {config.steps} batches of {config.batch_size} from a cache, ms"
    print(f"\n| {title}; number of runs V |", end="")
    print(" together | apart | together / apart |\n|---|---|---|---|")
    for count in (1, 2, 4, 8):
        both = [found[f"{count} {how}"] for how in ("together", "apart")]
        share = statistics.median(both[0]) / statistics.median(both[1])
        print(f"| {count} | {spread(both[0])} | {spread(both[1])} | {share:.2f} |", flush=True)


def show_compiled(config: RunConfig, rounds: int, steps: int) -> None:
    ways: dict[str, Callable[[], float]] = {}
    took = {}
    for recipe in (*BASES, "decorrelation"):
        trainer = make_trainer(recipe, config)
        started = time.perf_counter()
        why = compile_step(trainer, config.batch_size)
        took[recipe] = why or f"{time.perf_counter() - started:.0f} s"
        for name, one in ((f"{recipe} eager", make_trainer(recipe, config)), (f"{recipe} compiled", trainer)):
            step = make_step(one, config)
            ways[name] = lambda step=step: timed(step, steps)
    middle = {name: statistics.median(times) for name, times in in_rounds(ways, rounds).items()}
    print("\n| --compile | to compile | ms eager | ms compiled | compiled / eager |\n|---|---|---|---|---|")
    for recipe, seconds in took.items():
        eager, compiled = middle[f"{recipe} eager"], middle[f"{recipe} compiled"]
        print(f"| {recipe} | {seconds} | {eager:.1f} | {compiled:.1f} | {compiled / eager:.2f} |", flush=True)


def show_precision(config: RunConfig, rounds: int, steps: int) -> None:
    if reason := reason_against("bfloat16", "cpu"):
        print(f"\nprecision: not measured: this processor has no bfloat16 ({reason})")
        return
    ways: dict[str, Callable[[], float]] = {}
    counted = {}
    for kind in ("float32", "bfloat16"):
        sized = config._replace(precision=kind)
        made = {"products": products(sized)} | {name: make_step(make_trainer(name, sized), sized) for name in ROUNDED}
        for name, step in made.items():
            ways[f"{name} {kind}"] = lambda step=step: timed(step, steps)
            counted[name] = flops(step)
    found = in_rounds(ways, rounds)
    middle = {name: statistics.median(times) for name, times in found.items()}
    gain = middle["products float32"] / middle["products bfloat16"]
    title = f"--precision at d_in {config.d_in}, n {config.d_sae}, {config.batch_size} tokens"
    print(f"\n| {title} | ms float32 | ms bfloat16 | float32 / bfloat16 | share of products | expected gain |")
    print("|---|---|---|---|---|---|")
    for name, count in counted.items():
        plain, rounded = f"{name} float32", f"{name} bfloat16"
        share = count / counted["products"] * middle["products float32"] / middle[plain]
        times = f"{spread(found[plain])} | {spread(found[rounded])} | {middle[plain] / middle[rounded]:.2f}"
        print(f"| {name} | {times} | {share:.2f} | {1 / (1 - share + share / gain):.2f} |", flush=True)


def wall_ms(step: Step, steps: int, threads: int) -> float:
    """Milliseconds of wall time per step with a given number of threads."""
    torch.set_num_threads(threads)
    try:
        step(0)  # the threads are started in an untimed step
        started = time.perf_counter()
        for number in range(steps):
            step(number)
        return (time.perf_counter() - started) / steps * 1e3
    finally:
        torch.set_num_threads(1)


def show_threads(config: RunConfig, rounds: int, steps: int) -> None:
    names = ("products", *BASES)
    made = {name: make_step(make_trainer(name, config), config) for name in BASES} | {"products": products(config)}
    ways: dict[str, Callable[[], float]] = {
        f"{name} {threads}": lambda step=made[name], threads=threads: wall_ms(step, steps, threads)
        for name in names
        for threads in (1, 2)
    }
    found = in_rounds(ways, rounds)
    middle = {name: statistics.median(times) for name, times in found.items()}
    gain = {name: middle[f"{name} 1"] / middle[f"{name} 2"] for name in names}
    print(f"\n| d_in {config.d_in}, n {config.d_sae}, {config.batch_size} tokens | ms, 1 thread |", end="")
    print(" ms, 2 threads | gain | over the products' gain |\n|---|---|---|---|---|")
    for name in names:
        cells = " | ".join(spread(found[f"{name} {threads}"]) for threads in (1, 2))
        print(f"| {name} | {cells} | {gain[name]:.2f} | {gain[name] / gain['products']:.2f} |", flush=True)


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=2304)
    parser.add_argument("--width", type=numbers, default=[1, 8], help="times d_in")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--small", type=int, default=256, help="d_in of the tables recipes, compiled and precision")
    tables = ["step", "recipes", "together", "compiled", "precision", "threads"]
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps timed at once")
    parser.add_argument("--dictionary-learning", help="Python of an environment with dictionary_learning")
    parser.add_argument("--saelens", help="Python of an environment with SAELens")
    parser.add_argument("--json", type=Path, help="a file of step times, to which the table of recipes is added")
    parser.add_argument(
        "--small-width",
        type=int,
        default=4,
        help="d_sae of the tables recipes, compiled and precision, as a multiple of d_in",
    )
    parser.add_argument("--folder", default=".", help="folder for a temporary cache of 0.1 GB")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as `sae train` does
    print(machine(), flush=True)
    pythons = {"dictionary_learning": args.dictionary_learning, "saelens": args.saelens}
    peers = {name: Peer(name, python) for name, python in pythons.items() if python}
    for width in args.width if "step" in args.tables else ():
        config = RunConfig(args.d_in, width * args.d_in, STEPS, args.batch)
        show_steps(config, peers, args.rounds, args.steps)
    small = RunConfig(args.small, args.small_width * args.small, STEPS, args.batch)
    if "recipes" in args.tables:
        show_recipes(small, args.rounds, args.steps, args.json)
    if "together" in args.tables:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            show_together(Path(folder), args.rounds)
    if "compiled" in args.tables:
        show_compiled(small, args.rounds, args.steps)
    if "precision" in args.tables:
        show_precision(small, args.rounds, args.steps)
    for width in args.width if "threads" in args.tables else ():
        show_threads(RunConfig(args.d_in, width * args.d_in, STEPS, args.batch), args.rounds, args.steps)
    for peer in peers.values():
        assert peer.process.stdin
        peer.process.stdin.close()
        peer.process.wait()


if __name__ == "__main__":
    main()
