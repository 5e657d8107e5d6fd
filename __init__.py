"""Sparse autoencoders for language models, in two stages with a cache of activations on disk between them.

    harvest/    text -> activations: the language model, its text, the embedded gemma-2-mini
    cache/      every byte of activations on disk: format, writer, reader, shuffled batches
    train/      activations -> SAE: parts, recipes (one file a paper in train/variants/), the loop, run folders
    evaluate/   SAE + model -> numbers, tables, pages
    cli.py      `sae harvest`, `sae train`, `sae evaluate`, `sae demo`

Public from Python: `sae.open_cache(folder)`, `sae.load_sae(run)`, `sae.export_sae(run, to)`, `sae.import_sae(path)`.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["export_sae", "import_sae", "load_sae", "open_cache"]


def __getattr__(name: str) -> Any:  # so that `sae --help` does not wait for torch
    if name == "load_sae":
        from .train.sae import load_sae

        return load_sae
    if name == "open_cache":
        from .cache.reader import open_cache

        return open_cache
    if name == "export_sae":
        from .train.formats.export import export_sae

        return export_sae
    if name == "import_sae":
        from .train.formats.importing import import_sae

        return import_sae
    raise AttributeError(f"module 'sae' has no attribute {name!r}")
