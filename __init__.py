"""Sparse autoencoders for language models, in two stages with a cache of activations on disk between them.

    harvest/    text -> activations: the language model, its text, the embedded gemma-2-mini
    cache/      every byte of activations on disk: format, writer, reader, shuffled batches
    train/      activations -> SAE: parts, recipes (one file a paper in train/variants/), the loop, run folders
    evaluate/   SAE + model -> numbers, tables, pages
    cli.py      `sae harvest`, `sae train`, `sae evaluate`, `sae demo`

Public from Python: `sae.open_cache(folder)`, `sae.load_sae(run)`, `sae.evaluate_saes({name: sae}, cache=..., layer=...)`,
`sae.export_sae(run, to)`, `sae.import_sae(path)`.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
PUBLIC = {  # name -> where it is, imported when asked for: `sae --help` does not wait for torch
    "evaluate_saes": ".evaluate.run",
    "export_sae": ".train.formats.export",
    "import_sae": ".train.formats.importing",
    "load_sae": ".train.sae",
    "open_cache": ".cache.reader",
}
__all__ = list(PUBLIC)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'sae' has no attribute {name!r}")
    return getattr(import_module(PUBLIC[name], __name__), name)
