"""Sparse autoencoders for language models: harvest activations into a cache on disk, train on it, evaluate.

    harvest/    text -> activations: the language model, datasets, the embedded gemma-2-mini
    cache/      activations on disk: format, writer, reader, shuffled batches
    train/      activations -> SAE: recipes (train/variants/, one file per paper), the training loop, run folders
    evaluate/   SAE + language model -> metrics, tables, pages
    workflows/  combinations of stages: harvesting while training, reproducing a paper, the demo
    cli/        the command line, one file per command

The public API, in the ten lines that do what `sae demo` does:

    import sae

    cache = sae.harvest_activations("gemma-2-mini", layers=[12], tokens=200_000)
    runs = sae.train_saes(
        ["relu", "topk", "batchtopk", "decorrelation"], cache=cache, width="4x", steps=900, batch_size=1024,
        options={"decorrelation.fraction": 0.05, "decorrelation.strength": 0.2},
    )
    rows = sae.evaluate_saes(runs, suite="core", tokens=16_000)
    for row in rows:
        print(row.name, row.results["core"].sound.metrics["reconstruction_quality"]["fve"])

Each name is loaded when it is first used, so that `sae --help` does not import torch.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from .cache.opening import open_cache as open_cache
    from .common.errors import DamagedError as DamagedError
    from .common.errors import Interrupted as Interrupted
    from .common.errors import SaeError as SaeError
    from .common.errors import UnavailableError as UnavailableError
    from .common.errors import UsageError as UsageError
    from .evaluate.latents.steering import steering as steering
    from .evaluate.run import evaluate_saes as evaluate_saes
    from .harvest.in_memory import activations as activations
    from .harvest.run import harvest_activations as harvest_activations
    from .train.formats.export import export_sae as export_sae
    from .train.formats.import_ import import_sae as import_sae
    from .train.run import train_saes as train_saes
    from .train.sae import SAE as SAE
    from .train.sae import load_sae as load_sae
    from .workflows.controls import train_controls as train_controls

__version__ = "0.1.0"

_MODULES = {
    "DamagedError": "common.errors",
    "Interrupted": "common.errors",
    "SAE": "train.sae",
    "SaeError": "common.errors",
    "UnavailableError": "common.errors",
    "UsageError": "common.errors",
    "activations": "harvest.in_memory",
    "evaluate_saes": "evaluate.run",
    "export_sae": "train.formats.export",
    "harvest_activations": "harvest.run",
    "import_sae": "train.formats.import_",
    "load_sae": "train.sae",
    "open_cache": "cache.opening",
    "steering": "evaluate.latents.steering",
    "train_controls": "workflows.controls",
    "train_saes": "train.run",
}  # public name -> the module that defines it
__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(_import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module 'sae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
