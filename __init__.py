"""Sparse autoencoders for language models, in two stages with a cache of activations on disk between them.

    harvest/    text -> activations: the language model, its text, the embedded gemma-2-mini
    cache/      every byte of activations on disk: format, writer, reader, shuffled batches
    train/      activations -> SAE: parts, recipes (one file a paper in train/variants/), the loop, run folders
    evaluate/   SAE + model -> numbers, tables, pages
    cli.py      `sae harvest`, `sae train`, `sae evaluate`, `sae demo`

Public from Python: `sae.open_cache(folder)`, `sae.load_sae(run)`, `sae.activations(texts, model=..., layer=...)`,
`sae.evaluate_saes({name: sae}, cache=..., layer=...)`, `sae.steering(model, s, latent=..., strength=...)`,
`sae.export_sae(run, to)`, `sae.import_sae(path)`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache.reader import open_cache as open_cache
    from .evaluate.run import evaluate_saes as evaluate_saes
    from .evaluate.steering import steering as steering
    from .harvest.activations import activations as activations
    from .train.formats.export import export_sae as export_sae
    from .train.formats.importing import import_sae as import_sae
    from .train.sae import load_sae as load_sae

__version__ = "0.1.0"
PUBLIC = {
    "activations": "harvest.activations",
    "evaluate_saes": "evaluate.run",
    "export_sae": "train.formats.export",
    "import_sae": "train.formats.importing",
    "load_sae": "train.sae",
    "open_cache": "cache.reader",
    "steering": "evaluate.steering",
}  # name -> where it is
__all__ = list(PUBLIC)


def __getattr__(name: str) -> Any:  # so that `sae --help` does not wait for torch
    if name in PUBLIC:
        return getattr(import_module(f".{PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module 'sae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *PUBLIC]
