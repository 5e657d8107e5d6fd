"""Sparse autoencoders for language models, in two stages with a cache of activations on disk between them.

    harvest/    text -> activations: the language model, its text, the embedded gemma-2-mini
    cache/      every byte of activations on disk: format, writer, reader, shuffled batches
    train/      activations -> SAE: parts, recipes (one file a paper in train/variants/), the loop, run folders
    evaluate/   SAE + model -> numbers, tables, pages
    cli.py      `sae harvest`, `sae train`, `sae evaluate`, `sae demo`

Public from Python: `sae.open_cache(folder)`, `sae.load_sae(run)`, `sae.evaluate_saes({name: sae}, cache=..., layer=...)`.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["evaluate_saes", "load_sae", "open_cache"]


def __getattr__(name: str) -> Any:  # so that `sae --help` does not wait for torch
    if name == "evaluate_saes":
        from .evaluate.run import evaluate_saes

        return evaluate_saes
    if name == "load_sae":
        from .train.sae import load_sae

        return load_sae
    if name == "open_cache":
        from .cache.reader import open_cache

        return open_cache
    raise AttributeError(f"module 'sae' has no attribute {name!r}")
