"""SAELens' side: `python saelens.py rows.bin folder [--dtype float16] [--check]` prints a line of JSON.

SAELens' runner writes the cache end to end, and its store reads the cache as in training. Only two parts are replaced:
the model, by one that returns the precomputed rows, and the tokens, which are prepared beforehand.
"""

import argparse
import logging
import math
import warnings
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path

import datasets
import feed
import numpy as np
import torch
from sae_lens import (
    CacheActivationsRunner,
    CacheActivationsRunnerConfig,
    LanguageModelSAERunnerConfig,
    LoggingConfig,
    StandardTrainingSAEConfig,
    cache_activations_runner,
)
from sae_lens.training.activations_store import ActivationsStore

HOOK = "blocks.12.hook_resid_post"


class Precomputed:
    """Replaces the model: returns the next contexts, in bfloat16 as a model would."""

    W_E = torch.empty(0)  # the store asks on which device the embedding is

    def __init__(self, fed: np.ndarray) -> None:
        self.rows, self.ids = torch.from_numpy(fed.view(np.int16)).view(torch.bfloat16), feed.ids(len(fed))
        self.at = 0

    def tokens(self, **_: object) -> torch.Tensor:
        return torch.from_numpy(self.ids[self.at : self.at + feed.BATCH_CONTEXTS].astype(np.int64))

    def run_with_cache(self, tokens: torch.Tensor, **_: object) -> tuple[None, dict[str, torch.Tensor]]:
        rows = self.rows[self.at : self.at + len(tokens)]
        self.at += len(tokens)
        return None, {HOOK: rows}


def buffers(batches: int, bytes_a_batch: int) -> int:
    """The smallest number of equal buffers of at most 2 GB, each with a whole number of batches. SAELens writes only
    full buffers."""
    needed = math.ceil(batches * bytes_a_batch / 2e9)
    return next(n for n in range(needed, batches + 1) if batches % n == 0)


def write(folder: Path, fed: np.ndarray, dtype: str) -> None:
    batches = len(fed) // feed.BATCH_CONTEXTS
    bytes_a_batch = feed.TOKENS_A_BATCH * feed.D_IN * getattr(torch, dtype).itemsize
    config = CacheActivationsRunnerConfig(
        dataset_path="precomputed",
        model_name="precomputed",
        model_batch_size=feed.BATCH_CONTEXTS,
        hook_name=HOOK,
        d_in=feed.D_IN,
        training_tokens=batches * feed.TOKENS_A_BATCH,
        context_size=feed.CONTEXT,
        new_cached_activations_path=str(folder),
        dtype=dtype,
        device="cpu",
        buffer_size_gb=(batches // buffers(batches, bytes_a_batch) + 0.5) * bytes_a_batch / 1e9,  # it rounds down
    )
    model = Precomputed(fed)
    cache_activations_runner.load_model = lambda **_: model
    runner = CacheActivationsRunner(config, override_dataset=one_row())
    runner.activations_store.get_batch_tokens = model.tokens
    runner.run()
    if model.at != len(fed):
        raise SystemExit(f"the runner took {model.at:,} contexts of {len(fed):,}")


def one_row() -> datasets.Dataset:
    """A text that the constructors require; nothing is read from it."""
    return datasets.Dataset.from_dict({"tokens": [[0] * feed.CONTEXT]})


def store(folder: Path, batch: int, dtype: str) -> ActivationsStore:
    """A store as SAELens' training creates it, but with a buffer of at least a batch, as SAELens requires."""
    config = LanguageModelSAERunnerConfig(
        sae=StandardTrainingSAEConfig(d_in=feed.D_IN, d_sae=feed.D_IN),
        model_name="precomputed",
        dataset_path="precomputed",
        hook_name=HOOK,
        context_size=feed.CONTEXT,
        training_tokens=10**9,
        train_batch_size_tokens=batch,
        n_batches_in_buffer=max(20, batch // feed.CONTEXT),
        use_cached_activations=True,
        cached_activations_path=str(folder),
        dtype=dtype,
        device="cpu",
        verbose=False,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return ActivationsStore.from_config(None, config, override_dataset=one_row())


def batches(folder: Path, batch: int, dtype: str) -> Generator[torch.Tensor]:
    """An endless iterator of batches."""
    opened = store(folder, batch, dtype)
    while True:
        yield opened.next_batch()


def bits(rows: torch.Tensor) -> np.ndarray:
    """The 16-bit words of rows. Rows that come back as float32 must be exact in bfloat16."""
    if rows.dtype == torch.float16:
        return rows.view(torch.int16).numpy().view(np.uint16)
    words = rows.contiguous().numpy().view(np.uint32)
    if (words & 0xFFFF).any():
        raise SystemExit("the store returned a float32 that is not exact in bfloat16")
    return (words >> 16).astype(np.uint16)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16"])
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    datasets.disable_progress_bars()
    fed = feed.load(asked.rows)
    tokens = fed.size // feed.D_IN
    seconds = feed.timed(lambda: write(asked.folder, fed, asked.dtype))
    flush = feed.timed(lambda: feed.flush(asked.folder))
    result = {
        "versions": f"sae-lens {version('sae-lens')}, datasets {datasets.__version__}, torch {torch.__version__}",
        "write": tokens / seconds,
        "write flushed": tokens / (seconds + flush),
        "bytes": feed.size(asked.folder),
    }
    result |= feed.passes(asked.folder, tokens, lambda batch: batches(asked.folder, batch, asked.dtype))
    if asked.check:
        opened, served = store(asked.folder, 4096, asked.dtype), batches(asked.folder, 4096, asked.dtype)
        held = (feed.row_hashes(bits(opened.get_raw_llm_batch()[0])) for _ in range(tokens // feed.TOKENS_A_BATCH))
        given = (feed.row_hashes(bits(next(served))) for _ in range(tokens // 4096))
        if asked.dtype == "float16":
            fed = torch.from_numpy(fed.view(np.int16)).view(torch.bfloat16).half().view(torch.int16).numpy()
        result["check"] = feed.check(fed.view(np.uint16), held, given)
    feed.print_result(result)


if __name__ == "__main__":
    main()
