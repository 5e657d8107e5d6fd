"""Parts about data: a harvest of a model with random weights, the loader, and the metric core."""

import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from sizes import Sizes, seconds
from transformers import AutoModel, Gemma2Config

sys.path.insert(1, str(Path(__file__).parents[1]))
import sae  # noqa: E402
from common import ARRAY, make_cache  # noqa: E402
from sae.cache.hooks import Hook  # noqa: E402
from sae.cache.loader import BatchLoader  # noqa: E402
from sae.cache.writer import CacheWriter  # noqa: E402
from sae.common.remote_code import from_config  # noqa: E402
from sae.harvest import stages  # noqa: E402
from sae.harvest.description import describe_harvest  # noqa: E402
from sae.harvest.model import LanguageModel  # noqa: E402
from sae.harvest.plan import HarvestConfig, plan_harvest  # noqa: E402
from sae.harvest.run import run_harvest  # noqa: E402
from sae.harvest.windows import WindowComputer  # noqa: E402

Entries = Iterator[tuple[str, dict[str, Any]]]


def model_config(sizes: Sizes) -> Any:
    """Gemma 2 2B up to the deepest harvested layer, with the width given by the sizes."""
    heads = max(1, sizes.d_in // 288)
    return Gemma2Config(
        vocab_size=256_000 if sizes.d_in > 1000 else 8192, hidden_size=sizes.d_in, intermediate_size=4 * sizes.d_in,
        num_hidden_layers=max(sizes.layers) + 1, num_attention_heads=heads, num_key_value_heads=max(1, heads // 2),
        head_dim=256 if sizes.d_in > 1000 else 8, query_pre_attn_scalar=256, sliding_window=4096,
    )  # fmt: skip


def harvest(sizes: Sizes) -> Entries:
    """Tokens per second of a harvest of the embedded text with a model that has random weights."""
    config = model_config(sizes)
    torch.manual_seed(0)
    with torch.device("cuda" if sizes.d_in > 1000 else "cpu"):
        trunk: Any = from_config(AutoModel, config, dtype=torch.bfloat16, attn_implementation="eager")
    model = LanguageModel(trunk.to("cuda").eval())
    with tempfile.TemporaryDirectory() as folder:
        wanted = HarvestConfig(
            model="gemma-2-mini", layers=sizes.layers, tokens=sizes.harvested, window=sizes.window, device="cuda",
            dtype="bfloat16", out=Path(folder) / "cache",
        )  # fmt: skip
        plan = replace(plan_harvest(wanted), model_config=config, hooks=[Hook(layer) for layer in sizes.layers])
        lines = [line for line in describe_harvest(plan) if line.startswith(("window", "memory"))]
        timed = {WindowComputer: "_compute", CacheWriter: "write_window"}
        spent = dict.fromkeys(timed.values(), 0.0)
        begun: list[float] = []

        def timing(owner: type, method: str) -> Any:
            original = getattr(owner, method)

            def call(*given: Any, **options: Any) -> Any:
                started = time.perf_counter()
                begun.append(started)
                if method == "_compute":
                    torch.cuda.set_sync_debug_mode("warn")
                try:
                    return original(*given, **options)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                    spent[method] += time.perf_counter() - started

            return mock.patch.object(owner, method, call)

        with (
            mock.patch.object(stages, "load_model_for", lambda *_: model),
            warnings.catch_warnings(record=True) as warned,
            timing(WindowComputer, "_compute"),
            timing(CacheWriter, "write_window"),
        ):
            warnings.simplefilter("always")
            run_harvest(plan)
        whole = time.perf_counter() - begun[0]
        written = sum(path.stat().st_size for path in plan.folder.glob("*/c.*"))
        waits = sorted({f"{w.filename}:{w.lineno}: {w.message}" for w in warned if "synchroniz" in str(w.message)})
        yield "gemma 2 2b, random weights", {
            "plan": lines, "tokens": sizes.harvested, "tokens_per_s": sizes.harvested / whole,
            "bytes_per_s": written / whole, "waits": waits, "computing_s": spent["_compute"],
            "writing_s": spent["write_window"], "s": whole,
        }  # fmt: skip


def loader(sizes: Sizes) -> Entries:
    """The time until a batch is on the GPU, in the second epoch of a cache on disk."""
    with tempfile.TemporaryDirectory() as folder:
        cache = make_cache(Path(folder) / "cache", sizes.cache_gb, d_in=sizes.d_in, most=32_768)
        rows = min(4096, cache.rows // 4)
        with BatchLoader(cache, ARRAY, rows, device="cuda") as batches:
            for _ in range(batches.order.batches_per_epoch):
                next(batches)
            spent = seconds(lambda: next(batches), sizes, calls=10)
        yield f"batches of {rows}", {"s": spent, "bytes_per_s": 2 * rows * sizes.d_in / spent}


def core(sizes: Sizes) -> Entries:
    """Run the three stages on gemma-2-mini, which needs no download, and time core for one SAE and for two."""
    folder = Path(tempfile.mkdtemp())
    try:
        cache = sae.harvest_activations(
            "gemma-2-mini", layers=12, tokens=sizes.core_rows, out=folder / "cache", device="cuda"
        )
        options: dict[str, Any] = {"layers": 12, "steps": 20, "batch_size": 256, "out": folder / "runs"}
        runs = sae.train_saes(["topk", "relu"], cache=cache, device="cuda", **options)
        for count in (1, 2):
            started = time.perf_counter()
            folders = [run.folder for run in runs[:count]]
            sae.evaluate_saes(
                folders, cache=cache, suite="core", tokens=sizes.core_tokens, device="cuda", force=True,
                references=False,
            )  # fmt: skip
            yield f"{count} SAEs", {"s": time.perf_counter() - started}
    finally:
        shutil.rmtree(folder)
