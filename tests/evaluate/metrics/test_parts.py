"""The number of tokens per part is bounded by memory, and no result depends on it."""

import pytest
import torch

from sae.cache.hooks import Hook
from sae.evaluate.metrics import parts, splice_losses
from sae.evaluate.metrics.base import EvalTarget
from sae.evaluate.metrics.core import Core
from sae.evaluate.metrics.parts import tokens_at_once, tokens_in_cache

from .test_core import LAYER, make_ctx, model, own_folder, ragged, random_sae, silent  # noqa: F401  (fixtures)

TOLERANCE = 1e-6  # relative, because rounding depends on the number of rows in a matrix product


def test_on_a_cpu_a_part_has_8_mb_and_at_least_128_tokens():
    assert tokens_at_once(8192, "cpu") == 256
    assert tokens_at_once(256_000, "cpu") == 128


def test_free_memory_bounds_a_part(monkeypatch):
    monkeypatch.setenv("SAE_MEMORY_GB", "0.1")  # half of this holds 4 tensors of 12 tokens
    assert tokens_at_once(256_000, "cpu") == 12
    monkeypatch.setenv("SAE_MEMORY_GB", "0.001")
    assert tokens_at_once(256_000, "cpu") == 1


def test_on_a_gpu_half_of_the_free_memory_is_filled(monkeypatch):
    monkeypatch.setattr(parts, "available_memory", {"cuda": 64e9}.__getitem__)
    assert tokens_at_once(256_000, "cuda") == 7812  # 4 tensors of 8 GB
    assert tokens_at_once(65_536, "cuda") == 30_517
    monkeypatch.setattr(parts, "available_memory", lambda _: float("inf"))
    assert tokens_at_once(65_536, "cuda") == 32_767  # 2^31 numbers


def test_the_cache_of_a_cpu_holds_a_few_tokens():
    assert tokens_in_cache(8192, torch.device("cpu"), 256) == 32
    assert tokens_in_cache(10**6, torch.device("cpu"), 256) == 1
    assert tokens_in_cache(8192, torch.device("cuda"), 256) == 256


@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_results_do_not_depend_on_the_size_of_the_parts(model, monkeypatch, kind):  # noqa: F811
    """35 tokens, with and without outlier rows, in parts of 3 and 2, give the same results as in one part."""
    ctx = make_ctx(model, ragged())
    norms = torch.cat([model.capture_hooks(batch.ids, [Hook(LAYER)])[Hook(LAYER)][batch.counted].norm(dim=1)
                       for batch in ctx.batches(2, 3)])  # fmt: skip
    limit = float(norms.sort().values[-4])
    target = EvalTarget(random_sae(kind), Hook(LAYER), norm_limit=limit)
    asked = []

    def measured(tokens: int, in_cache: int):
        for module in (parts, splice_losses):
            monkeypatch.setattr(module, "tokens_at_once", lambda numbers, _: asked.append(numbers) or tokens)
        monkeypatch.setattr(splice_losses, "tokens_in_cache", lambda *_: in_cache)
        (result,) = Core(batch_contexts=5).measure(ctx, [target], silent)
        return result

    small, large = measured(3, 2), measured(1000, 1000)
    assert sorted(set(asked)) == [40, 8192] and large.masked
    for one, other in ((small, large), (small.masked, large.masked)):
        assert one.metrics.keys() == other.metrics.keys()
        for category, group in one.metrics.items():
            assert group == pytest.approx(other.metrics[category], rel=TOLERANCE, abs=1e-7), category
        for entry, expected in zip(one.details, other.details, strict=True):
            assert numbers(entry) == pytest.approx(numbers(expected), rel=TOLERANCE, abs=1e-9)


def numbers(entry: dict) -> dict[str, float]:
    return {name: -1 if value is None else value for name, value in entry.items()}
