"""What a training step costs: `python benchmarks/bench_train.py [--d-in 512 --width 1,8] [--saelens env-saelens/bin/python]`.

Four tables, all on one thread and in its processor time, which others on the machine hardly move; in rounds, in random
order, one process at a time; median and spread (the middle half) of the rounds.

    step       of relu, topk and batchtopk, beside the peers' trainers as published on the same batches (environments as in
               peers/agree_train.py), and beside the limit: the five products of a dense step alone, in the same rounds.
               Below 1 of it: rows are gathered (train/sparse_ops.py). FLOP are those of matrix products, by torch's counter,
               which counts none for gathered rows.
    recipes    every recipe over its base, topk where a fixed number of latents is kept and relu elsewhere; with what
               mechanisms do every so many steps, spread over those.
    together   V runs of relu on one stream from a cache, over V runs one after the other.
    compiled   --compile over eager.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peers.time_peer import batches, flops, timed

import sae.train.variants  # noqa: F401  (registers the recipes)
from common import ARRAY, Spent, in_rounds, machine, make_cache
from sae.cache.loader import BatchLoader
from sae.cache.reader import Cache
from sae.train.activations import KeepTopK
from sae.train.compile import compile_step
from sae.train.loop import Trainer, train_loop
from sae.train.recipe import RECIPES, find_recipe
from sae.train.variant import RunConfig

Step = Callable[[int], object]
STEPS = 100_000  # of the run that a step is of: no latent is dead yet
BASES = ("relu", "topk", "batchtopk")


class Peer:
    """A peer's process, which works while it is asked."""

    def __init__(self, name: str, python: str) -> None:
        script = Path(__file__).parent / "peers" / "time_peer.py"
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([python, str(script), name], stdin=pipe, stdout=pipe, text=True)

    def ask(self, do: str, recipe: str = "", **other: Any) -> float:
        assert self.process.stdin and self.process.stdout
        print(json.dumps({"do": do, "recipe": recipe, **other}), file=self.process.stdin, flush=True)
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"the peer ended with {self.process.wait()}; what it said stands above")
        return json.loads(line)


def training_of(recipe: str, setting: RunConfig) -> Trainer:
    torch.manual_seed(0)
    return Trainer(find_recipe(recipe).make(setting, {}), setting.steps, "cpu")


def step_of(training: Trainer, setting: RunConfig) -> Step:
    x = batches(setting.batch_size, setting.d_in)

    def step(number: int) -> object:
        return training.step(x[number % len(x)])

    step(0)
    return step


def products(setting: RunConfig) -> Step:
    """Encode, decode, and the gradients to latents, W_dec and W_enc; nothing else."""
    x_BD, f_BF = torch.randn(setting.batch_size, setting.d_in), torch.randn(setting.batch_size, setting.d_sae)
    w_DF, w_FD = torch.randn(setting.d_in, setting.d_sae), torch.randn(setting.d_sae, setting.d_in)

    def step(number: int) -> object:
        return x_BD @ w_DF, f_BF @ w_FD, x_BD @ w_FD.T, f_BF.T @ x_BD, x_BD.T @ f_BF

    step(0)
    return step


def options_for(recipe: str, setting: RunConfig) -> dict[str, Any]:
    """Our recipe's numbers, for a peer's trainer."""
    variant = training_of(recipe, setting).variant
    own = variant.options | {"l1_warmup": 1000, "warmup": 1000, "dead_tokens": setting.dead_after_tokens}
    sizes = {"d_in": setting.d_in, "d_sae": setting.d_sae, "batch": setting.batch_size, "steps": setting.steps}
    return asdict(variant.optimization) | own | sizes


def spread(times: list[float]) -> str:
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return f"{statistics.median(times):.1f} ({low:.1f} to {high:.1f})"


def show_steps(setting: RunConfig, peers: Mapping[str, Peer], rounds: int, steps: int) -> None:
    limit = products(setting)
    ways: dict[str, Callable[[], float]] = {"products": lambda: timed(limit, steps)}
    counted = {"products": flops(limit)}
    for recipe in BASES:
        ours = step_of(training_of(recipe, setting), setting)
        counted[f"{recipe}, ours"] = flops(ours)
        ways[f"{recipe}, ours"] = lambda ours=ours: timed(ours, steps)
        for name, peer in peers.items():
            asked = {"recipe": recipe, "options": options_for(recipe, setting), "steps": steps}
            counted[f"{recipe}, {name}"] = int(peer.ask("flops", **asked))
            ways[f"{recipe}, {name}"] = lambda peer=peer, asked=asked: peer.ask("time", **asked)
    found = in_rounds(ways, rounds)
    middle = {name: statistics.median(times) for name, times in found.items()}
    title = f"d_in {setting.d_in}, n {setting.d_sae}, {setting.batch_size} tokens"
    print(f"\n| {title} | ms | GFLOP | over the five products | over ours |\n|---|---|---|---|---|")
    for name, times in found.items():
        ours = middle.get(f"{name.split(',')[0]}, ours", middle[name])
        shares = f"{middle[name] / middle['products']:.2f} | {middle[name] / ours:.2f}"
        print(f"| {name} | {spread(times)} | {counted[name] / 1e9:.3g} | {shares} |", flush=True)
    for peer in peers.values():
        peer.ask("forget")


def events(training: Trainer, setting: RunConfig) -> float:
    """Milliseconds a step of what mechanisms do between steps, spread over the steps from one time to the next."""
    step, spent = training.step(batches(setting.batch_size, setting.d_in)[0]), 0.0
    with torch.no_grad():
        for mechanism in training.variant.mechanisms:
            if mechanism.every:
                spent += timed(lambda number, m=mechanism: m.every_n_steps(step), 1) / mechanism.every
    return spent


def show_recipes(setting: RunConfig, rounds: int, steps: int) -> None:
    ways: dict[str, Callable[[], float]] = {}
    between, base = {}, {}
    for recipe in RECIPES:
        training = training_of(recipe, setting)
        step = step_of(training, setting)
        ways[recipe] = lambda step=step: timed(step, steps)
        between[recipe] = events(training_of(recipe, setting), setting)
        base[recipe] = "topk" if any(isinstance(link, KeepTopK) for link in training.variant.sae.activation) else "relu"
    found = in_rounds(ways, rounds)
    middle = {name: statistics.median(times) + between[name] for name, times in found.items()}
    print(f"\n| recipe at d_in {setting.d_in}, n {setting.d_sae} | ms | of it between steps | base | over it |")
    print("|---|---|---|---|---|")
    for name in sorted(RECIPES, key=lambda name: -middle[name] / middle[base[name]]):
        over = middle[name] / middle[base[name]]
        print(f"| {name} | {spread(found[name])} | {between[name]:.2f} | {base[name]} | {over:.2f} |", flush=True)


def on_one_stream(cache: Cache, setting: RunConfig, seeds: range) -> None:
    trainings = []
    for seed in seeds:
        torch.manual_seed(seed)
        trainings.append(Trainer(find_recipe("relu").make(setting, {}), setting.steps, "cpu"))
    with BatchLoader(cache, ARRAY, setting.batch_size, threads=1) as stream:
        train_loop(trainings, islice(stream, setting.steps), range(setting.steps), lambda number: False)


def show_together(folder: Path, rounds: int) -> None:
    cache = make_cache(folder / "cache", 0.1)
    setting = RunConfig(cache.array(ARRAY).shape[1], 256, 16, 512)

    def spent(work: Callable[[], object]) -> float:
        started = Spent.now()
        work()
        return Spent.since(started).processor * 1e3

    ways: dict[str, Callable[[], float]] = {}
    for count in (1, 2, 4, 8):
        ways[f"{count} together"] = lambda n=count: spent(lambda: on_one_stream(cache, setting, range(n)))
        one = [range(seed, seed + 1) for seed in range(count)]
        ways[f"{count} apart"] = lambda one=one: spent(lambda: [on_one_stream(cache, setting, s) for s in one])
    found = in_rounds(ways, rounds)
    print(
        f"\n| relu {setting.d_in} -> {setting.d_sae}, {setting.steps} batches of {setting.batch_size} from a cache, ms |",
        end="",
    )
    print(" together | apart | together / apart |\n|---|---|---|---|")
    for count in (1, 2, 4, 8):
        both = [found[f"{count} {how}"] for how in ("together", "apart")]
        share = statistics.median(both[0]) / statistics.median(both[1])
        print(f"| {count} | {spread(both[0])} | {spread(both[1])} | {share:.2f} |", flush=True)


def show_compiled(setting: RunConfig, rounds: int, steps: int) -> None:
    ways: dict[str, Callable[[], float]] = {}
    took = {}
    for recipe in (*BASES, "decorrelation"):
        training = training_of(recipe, setting)
        started = time.perf_counter()
        why = compile_step(training, setting.batch_size)
        took[recipe] = why or f"{time.perf_counter() - started:.0f} s"
        for name, one in ((f"{recipe} eager", training_of(recipe, setting)), (f"{recipe} compiled", training)):
            step = step_of(one, setting)
            ways[name] = lambda step=step: timed(step, steps)
    middle = {name: statistics.median(times) for name, times in in_rounds(ways, rounds).items()}
    print("\n| --compile | to compile | ms eager | ms compiled | compiled / eager |\n|---|---|---|---|---|")
    for recipe, told in took.items():
        eager, compiled = middle[f"{recipe} eager"], middle[f"{recipe} compiled"]
        print(f"| {recipe} | {told} | {eager:.1f} | {compiled:.1f} | {compiled / eager:.2f} |", flush=True)


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=2304)
    parser.add_argument("--width", type=numbers, default=[1, 8], help="times d_in")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument(
        "--small", type=int, default=256, help="d_in of the tables of recipes and of --compile; n is 4 times"
    )
    tables = ["step", "recipes", "together", "compiled"]
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="timed at once")
    parser.add_argument("--dictionary-learning", help="the python of an environment that has it")
    parser.add_argument("--saelens", help="the python of an environment that has it")
    parser.add_argument("--folder", default=".", help="where a cache of 0.1 GB is written, and removed from")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), flush=True)
    given = {"dictionary_learning": asked.dictionary_learning, "saelens": asked.saelens}
    peers = {name: Peer(name, python) for name, python in given.items() if python}
    for width in asked.width if "step" in asked.tables else ():
        setting = RunConfig(asked.d_in, width * asked.d_in, STEPS, asked.batch)
        show_steps(setting, peers, asked.rounds, asked.steps)
    small = RunConfig(asked.small, 4 * asked.small, STEPS, asked.batch)
    if "recipes" in asked.tables:
        show_recipes(small, asked.rounds, asked.steps)
    if "together" in asked.tables:
        with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
            show_together(Path(folder), asked.rounds)
    if "compiled" in asked.tables:
        show_compiled(small, asked.rounds, asked.steps)
    for peer in peers.values():
        assert peer.process.stdin
        peer.process.stdin.close()
        peer.process.wait()


if __name__ == "__main__":
    main()
