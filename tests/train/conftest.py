"""A cache of sparse combinations of known directions, and trainers that read it and write no run folder."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._inductor.config

from sae.cache.contexts import Contexts
from sae.cache.layout import Layout
from sae.cache.loader import BatchLoader, as_uint16
from sae.cache.opening import open_cache
from sae.cache.reader import Cache
from sae.cache.writer import CacheWriter, WindowRows
from sae.train.loop import Trainer
from sae.train.parse import parse_options
from sae.train.recipe import find_recipe
from sae.train.variant import RunConfig, Variant

D_IN, D_SAE, BATCH, ROWS, WINDOW = 32, 512, 64, 4096, 1024


def sparse_rows(seed: int, rows: int = ROWS) -> torch.Tensor:
    """Rows (rows, D_IN) of about four of 64 unit atoms with positive weights, shifted by a nonzero vector."""
    generator = torch.Generator().manual_seed(seed)
    atoms_FD = torch.nn.functional.normalize(torch.randn(64, D_IN, generator=generator), dim=1)
    active_RF = torch.rand(rows, 64, generator=generator) < 4 / 64
    weights_RF = active_RF * (1 + torch.rand(rows, 64, generator=generator))
    return 3 * (weights_RF @ atoms_FD) + torch.randn(D_IN, generator=generator)


def write_cache(folder: Path, seed: int, max_norm: float | None = None) -> Cache:
    """A cache of layers 0 and 1, with rows of `sparse_rows`, sixteen to a context.

    Rows whose norm is above `max_norm` times the median are outliers.
    """
    layout = Layout(ROWS, WINDOW)
    contexts, length = ROWS // 16, 17
    Contexts(
        ids=np.zeros((contexts, length), np.uint32), length=np.full(contexts, length, np.uint16),
        document=np.arange(contexts, dtype=np.uint32), held_out=np.zeros(contexts, np.bool_),
    ).write(folder)  # fmt: skip
    identity = {"model": {"name": "synthetic", "revision": "0"}, "data": {"name": f"atoms-{seed}"}, "context": length}
    writer = CacheWriter(folder, identity, layout, {"layer_00": D_IN, "layer_01": D_IN})
    bits = {f"layer_{n:02d}": as_uint16(sparse_rows(seed + n).bfloat16()) for n in (0, 1)}
    for window in writer.missing_windows():
        rows = layout.row_range(window)
        number = np.arange(rows.start, rows.stop)
        block = {name: np.ascontiguousarray(all_rows[rows.start : rows.stop]) for name, all_rows in bits.items()}
        ctx, pos = (number // 16).astype(np.uint32), (number % 16 + 1).astype(np.uint16)
        writer.write_window(window, WindowRows(block, ctx, pos), {})
    writer.finish(max_norm)
    return open_cache(folder)


@pytest.fixture(scope="module", autouse=True)
def small(one_thread: None) -> None:
    """Matrix products here are too small for several threads."""


@pytest.fixture(scope="session")
def sparse_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of layers 0 and 1 with 4,096 rows of width 32. Read it; never write."""
    return write_cache(tmp_path_factory.mktemp("activations") / "synthetic", seed=0)


@pytest.fixture(scope="session")
def another_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of the same shape as `sparse_cache` with other rows."""
    return write_cache(tmp_path_factory.mktemp("activations") / "synthetic-1", seed=10)


@pytest.fixture(scope="session")
def masked_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """A cache of the rows of `sparse_cache`, in which rows whose norm is above 1.5 times the median are outliers."""
    return write_cache(tmp_path_factory.mktemp("activations") / "masked", seed=0, max_norm=1.5)


@pytest.fixture(scope="session")
def batches(sparse_cache: Cache) -> list[torch.Tensor]:
    """The first forty batches of layer 0."""
    with BatchLoader(sparse_cache, "layer_00", BATCH) as stream:
        return [x_BD.clone() for x_BD in islice(stream, 40)]


@pytest.fixture(scope="session")
def make() -> Callable[..., Variant]:
    """A function that builds the variant of a recipe.

    Options are keywords, or they follow the name of the recipe, as in "recipe option=value ...".
    """

    def build(name: str, setting: RunConfig, **options: object) -> Variant:
        name, *written = name.split()
        return find_recipe(name).make(setting, parse_options(written, [find_recipe(name)])[name] | options)

    return build


@pytest.fixture
def make_variant(sparse_cache: Cache, make: Callable[..., Variant]) -> Callable[..., Variant]:
    """A function that builds a variant with seed 0 and the cache's constants. Options are keywords."""

    def build(name: str, steps: int = 30, **options: object) -> Variant:
        torch.manual_seed(0)
        variant = make(name, RunConfig(D_IN, D_SAE, steps, BATCH), **options)
        mean_D = torch.from_numpy(sparse_cache.mean("layer_00")).float()
        variant.set_normalization(mean_D, sparse_cache.statistics("layer_00")["mean_square_norm"])
        return variant

    return build


@pytest.fixture
def make_trainer(make_variant: Callable[..., Variant]) -> Callable[..., Trainer]:
    """A trainer whose periodic mechanisms act every fourth step and whose latents are dead after three silent batches.

    So what a real run does every few hundred steps happens several times in thirty steps.
    """

    def build(name: str, steps: int = 30, **options: object) -> Trainer:
        variant = make_variant(name, steps, **options)
        variant.dead.after_tokens = 3 * BATCH
        for mechanism in variant.mechanisms:
            if mechanism.every:
                mechanism.every = min(mechanism.every, 4)
        return Trainer(variant, steps, "cpu")

    return build


@pytest.fixture
def take(batches: list[torch.Tensor]) -> Callable[[Trainer, range], Iterator[int]]:
    """A function that takes the steps of a range on the first batches of the cache. It yields after each step."""

    def steps(trainer: Trainer, numbers: range) -> Iterator[int]:
        for number in numbers:
            trainer.run_periodic(number, trainer.step(batches[number]))
            yield number

    return steps


@pytest.fixture
def compiled_by_one_thread() -> Iterator[None]:
    """Keep torch.compile from starting worker processes, which takes longer than compiling here."""
    with torch._inductor.config.patch(compile_threads=1):
        yield
