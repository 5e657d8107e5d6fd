"""The memory that is planned on the simulated GPU."""

from sae.train.memory import run_memory
from sae.train.passes import Resized, pass_memory
from sae.train.recipe import find_recipe
from sae.train.variant import RunConfig

from .functions import simulated_gpu


def memory(recipe: str) -> dict[str, tuple[int, ...]]:
    """What a run takes by its trace on each device, and what its pass takes."""
    run = Resized(find_recipe(recipe), {}, None, RunConfig(64, 512, 100, 256))
    with simulated_gpu():
        planned = {device: (*run_memory(run, device), *pass_memory([run], device)) for device in ("cpu", "cuda")}
    return planned
